"""One training sample's way through the model: latents to tokens, noise, prediction, loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from flux2_ds.config.recipe import Objective, Preservation
from flux2_ds.data.loader import MicroBatch
from flux2_ds.distributed import all_reduce_sum
from flux2_ds.model import flow, latents
from flux2_ds.model.flow import stratified, timesteps
from flux2_ds.run.metrics import Values

Forward = Callable[..., torch.Tensor]


class Losses(NamedTuple):
    """The loss of a micro-batch."""

    mean: torch.Tensor
    """A scalar in fp32, for the backward pass."""
    each: torch.Tensor
    """Of each sample, [B] fp32, without gradient."""
    t: torch.Tensor
    """Its timestep, [B] fp32."""
    roles: list[int]
    """What it is for: an index of ROLES."""


ROLES = ("images", "regularization", "preservation")
"""Samples that are learned, of regularization sources, and with a prompt whose prediction is to stay."""


@dataclass(frozen=True)
class FlowObjective:
    """Flow matching on FLUX.2.

    `mean`, `std`: [128] fp32 latent statistics.
    `guidance`: whether the variant has a guidance input. `global_batch`: the samples among which
    stratified timesteps are shared out. `forward_base`: the model's prediction without its adapter, where
    `preservation` wants it, or with `always_base` in all passes of such a step: where ranks that see other samples take part.
    """

    settings: Objective
    mean: torch.Tensor
    std: torch.Tensor
    guidance: bool
    global_batch: int
    device: torch.device
    preservation: Preservation = field(default_factory=Preservation)
    forward_base: Forward | None = None
    always_base: bool = False

    def loss(self, forward: Forward, batch: MicroBatch) -> torch.Tensor:
        """Mean flow-matching loss of a micro-batch; a scalar in fp32."""
        return self.losses(forward, batch).mean

    def losses(self, forward: Forward, batch: MicroBatch) -> Losses:
        """Flow-matching loss of a micro-batch and of its samples.

        Tokens and t enter the model in fp32, text as it was stored; `keep_timestep_exact` casts them
        behind t's sinusoids. No text token is trimmed or masked, because the model is used that way.
        Reference images follow the image without noise, and nothing is predicted for them.

        Samples with a prompt whose images are to stay, and those of regularization sources with
        `preservation.target: base`, have the prediction without the adapter for their target, everywhere.
        """
        size, settings = batch.latents.shape[0], self.settings
        x0, *references = (
            latents.to_tokens(self._here(each), self.mean, self.std)
            for each in (batch.latents, *batch.references)
        )
        noise = self._here(batch.noise)
        t = self._timesteps(batch)
        ids = [latents.image_ids(batch.bucket.height, batch.bucket.width, self.device)]
        if references:
            ids.append(
                latents.reference_ids(tuple(each.shape for each in batch.references), self.device)
            )
        inputs = {
            "hidden_states": torch.cat([flow.interpolate(x0, noise, t), *references], dim=1),
            "encoder_hidden_states": self._here(batch.text),
            "timestep": t,
            "img_ids": torch.cat(ids),
            "txt_ids": latents.text_ids(batch.text.shape[1], self.device),
            "guidance": t.new_full((size,), settings.guidance) if self.guidance else None,
        }
        target, mask, tokens = flow.velocity(x0, noise), self._mask(batch), x0.shape[1]
        roles = self._roles(batch)
        to_base = [role > 0 and self._to_base(role) for role in roles]
        if self.forward_base is not None and (any(to_base) or self._together(batch)):
            # Before the pass with gradients, whose activations then have the memory for themselves.
            base = self.forward_base(**inputs)[:, :tokens].float()
            chosen = self._here(torch.tensor(to_base))[:, None]
            target = torch.where(chosen[..., None], base, target)
            mask = None if mask is None else torch.where(chosen, 1.0, mask)
        prediction = forward(**inputs)[:, :tokens]
        mean, each = flow.flow_loss(
            prediction,
            target,
            mask,
            self._weight(t, roles),
            kind=settings.loss,
            delta=settings.huber_delta,
        )
        return Losses(mean, each.detach(), t, roles)

    def _mask(self, batch: MicroBatch) -> torch.Tensor | None:
        if batch.masks is None:
            return None
        mask, outside = self._here(batch.masks).flatten(1), self.settings.unmasked_weight
        return outside + (1 - outside) * mask if outside else mask

    def _roles(self, batch: MicroBatch) -> list[int]:
        """Of each sample, as an index of ROLES."""
        known = self.preservation.sources
        sources = batch.sources or [""] * len(batch.latents)
        prompted = batch.prompted or [False] * len(batch.latents)
        return [
            2 if keeps else int(source in known)
            for source, keeps in zip(sources, prompted, strict=True)
        ]

    def _together(self, batch: MicroBatch) -> bool:
        """Whether the pass without the adapter is made for other ranks' samples."""
        if not self.always_base or self.preservation.sources_to_base:
            return self.always_base
        return self.preservation.due(batch.samples[0].position // self.global_batch)

    def _to_base(self, role: int) -> bool:
        return ROLES[role] == "preservation" or self.preservation.target == "base"

    def _weight(self, t: torch.Tensor, roles: list[int]) -> torch.Tensor | None:
        """Of each sample in the mean, [B]; None where all have 1."""
        weight = flow.loss_weight(t, self.settings)
        if any(roles) and self.preservation.weight != 1:
            own = self._here(torch.tensor([self.preservation.weight if r else 1.0 for r in roles]))
            weight = own if weight is None else weight * own
        return weight

    def _timesteps(self, batch: MicroBatch) -> torch.Tensor:
        t = timesteps(self._deviates(batch), self.settings, batch.bucket.tokens)
        shifts = self.settings.source_shift
        if not shifts:
            return t
        s = self._here(torch.tensor([shifts.get(source, 1.0) for source in batch.sources]))
        return flow.shifted(t, s)

    def _deviates(self, batch: MicroBatch) -> torch.Tensor:
        deviates = self._here(batch.deviates)
        if not self.settings.stratified:
            return deviates
        places = [sample.position % self.global_batch for sample in batch.samples]
        return stratified(deviates, places, self.global_batch)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)


class LossParts:
    """The mean loss of the samples of each of ROLES since it was last asked, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(ROLES), 2, dtype=torch.float64, device=device)

    def add(self, losses: Losses) -> None:
        """Count a micro-batch; losses that are not finite, of steps that make no update, do not count."""
        member = torch.zeros(len(ROLES), len(losses.roles), dtype=torch.float64)
        member[losses.roles, range(len(losses.roles))] = 1
        finite = losses.each.isfinite()
        member = member.to(losses.each.device, non_blocking=True) * finite
        self._sums[:, 0] += member @ torch.where(finite, losses.each, 0.0).double()
        self._sums[:, 1] += member.sum(1)

    def means(self) -> Values:
        """Of those that had samples, over all ranks; begins anew. Collective."""
        totals = all_reduce_sum(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        return {
            f"train/loss_{role}": total / count
            for role, (total, count) in zip(ROLES, totals, strict=True)
            if count
        }
