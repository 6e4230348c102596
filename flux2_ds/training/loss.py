"""One training sample's way through the model: latents to tokens, noise, prediction, loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flux2_ds.config.recipe import Objective
from flux2_ds.data.loader import MicroBatch
from flux2_ds.model import flow, latents
from flux2_ds.model.flow import stratified, timesteps

Forward = Callable[..., torch.Tensor]


class Losses(NamedTuple):
    """The loss of a micro-batch."""

    mean: torch.Tensor
    """A scalar in fp32, for the backward pass."""
    each: torch.Tensor
    """Of each sample, [B] fp32, without gradient."""
    t: torch.Tensor
    """Its timestep, [B] fp32."""


@dataclass(frozen=True)
class FlowObjective:
    """Flow matching on FLUX.2.

    `mean`, `std`: [128] fp32 latent statistics.
    `guidance`: whether the variant has a guidance input. `global_batch`: the samples among which
    stratified timesteps are shared out.
    """

    settings: Objective
    mean: torch.Tensor
    std: torch.Tensor
    guidance: bool
    global_batch: int
    device: torch.device

    def loss(self, forward: Forward, batch: MicroBatch) -> torch.Tensor:
        """Mean flow-matching loss of a micro-batch; a scalar in fp32."""
        return self.losses(forward, batch).mean

    def losses(self, forward: Forward, batch: MicroBatch) -> Losses:
        """Flow-matching loss of a micro-batch and of its samples.

        Tokens and t enter the model in fp32, text as it was stored; `keep_timestep_exact` casts them
        behind t's sinusoids. No text token is trimmed or masked, because the model is used that way.
        Reference images follow the image without noise, and nothing is predicted for them.
        """
        size, settings = batch.latents.shape[0], self.settings
        x0, *references = (
            latents.to_tokens(self._here(each), self.mean, self.std)
            for each in (batch.latents, *batch.references)
        )
        noise = self._here(batch.noise)
        t = timesteps(self._deviates(batch), settings, batch.bucket.tokens)
        ids = [latents.image_ids(batch.bucket.height, batch.bucket.width, self.device)]
        if references:
            ids.append(
                latents.reference_ids(tuple(each.shape for each in batch.references), self.device)
            )
        prediction = forward(
            hidden_states=torch.cat([flow.interpolate(x0, noise, t), *references], dim=1),
            encoder_hidden_states=self._here(batch.text),
            timestep=t,
            img_ids=torch.cat(ids),
            txt_ids=latents.text_ids(batch.text.shape[1], self.device),
            guidance=t.new_full((size,), settings.guidance) if self.guidance else None,
        )[:, : x0.shape[1]]
        mask = None if batch.masks is None else self._here(batch.masks).flatten(1)
        mean, each = flow.flow_loss(prediction, flow.velocity(x0, noise), mask)
        return Losses(mean, each.detach(), t)

    def _deviates(self, batch: MicroBatch) -> torch.Tensor:
        deviates = self._here(batch.deviates)
        if not self.settings.stratified:
            return deviates
        places = [sample.position % self.global_batch for sample in batch.samples]
        return stratified(deviates, places, self.global_batch)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)
