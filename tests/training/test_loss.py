"""Reference images and masks, against the pipeline's own preparation and against plain loops."""

import math
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from factories import SPECS, build_transformer

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.recipe import Objective
from flux2_ds.data.loader import MicroBatch
from flux2_ds.model import latents
from flux2_ds.training.loss import FlowObjective

CPU = torch.device("cpu")
BUCKET = Bucket(48, 64)
# Heights and widths in tokens: none, one, three of their own sizes.
REFERENCES = [[], [(3, 4)], [(2, 5), (4, 4), (1, 3)]]


def objective_for(variant: str) -> FlowObjective:
    generator = torch.Generator().manual_seed(4)
    mean, std = torch.randn(128, generator=generator), torch.rand(128, generator=generator) + 0.5
    return FlowObjective(Objective(), mean, std, SPECS[variant].guidance, 2, CPU)


def batch_with(sizes: list[tuple[int, int]], masks: torch.Tensor | None = None) -> MicroBatch:
    generator = torch.Generator().manual_seed(3)
    return MicroBatch(
        BUCKET,
        [],
        torch.randn(2, 32, 6, 8, generator=generator),
        torch.randn(2, 7, 48, generator=generator),
        torch.randn(2, 12, 128, generator=generator),
        torch.tensor([0.3, -1.2]),
        masks,
        [torch.randn(2, 32, 2 * h, 2 * w, generator=generator) for h, w in sizes],
    )


def normalised(raw: torch.Tensor, objective: FlowObjective) -> torch.Tensor:
    patches = Flux2Pipeline._patchify_latents(raw)
    return (patches - objective.mean.view(1, -1, 1, 1)) / objective.std.view(1, -1, 1, 1)


@pytest.mark.parametrize("variant", SPECS)
@pytest.mark.parametrize("sizes", REFERENCES)
def test_references_enter_as_the_pipeline_lets_them(
    variant: str, sizes: list[tuple[int, int]]
) -> None:
    """Tokens, ids, and the loss of the prediction at the image tokens alone."""
    objective, batch, model = (
        objective_for(variant),
        batch_with(sizes),
        build_transformer(SPECS[variant]),
    )
    given: dict[str, Any] = {}

    def forward(**inputs: Any) -> torch.Tensor:
        given.update(inputs)
        return model(**inputs).sample

    loss = objective.loss(forward, batch)

    kind = Flux2Pipeline if variant == "dev" else Flux2KleinPipeline
    pipeline = kind(vae=None, text_encoder=None, tokenizer=None, scheduler=None, transformer=None)
    x0 = normalised(batch.latents, objective)
    ids = [pipeline._prepare_latent_ids(x0)[0]]
    tokens = [given["hidden_states"][:, :12]]
    if sizes:
        references = [normalised(raw, objective) for raw in batch.references]
        ids.append(pipeline._prepare_image_ids([each[:1] for each in references])[0])
        tokens += [pipeline._pack_latents(each) for each in references]
    assert torch.equal(given["img_ids"], torch.cat(ids))
    torch.testing.assert_close(given["hidden_states"], torch.cat(tokens, dim=1))
    moments = given["img_ids"][:, 0].unique().tolist()
    assert moments == [10 * k for k in range(len(sizes) + 1)]
    s = math.exp(0.5 + 0.65 * (12 - 256) / 3840)  # of the image tokens alone
    t = torch.sigmoid(batch.deviates)
    torch.testing.assert_close(given["timestep"], s * t / (1 + (s - 1) * t))
    prediction = model(**given).sample[:, :12]
    expected = (prediction - (batch.noise - pipeline._pack_latents(x0))).square().mean()
    torch.testing.assert_close(loss, expected)


def test_references_matter_and_the_order_too() -> None:
    objective, model = objective_for("klein"), build_transformer(SPECS["klein"])

    def loss(batch: MicroBatch) -> float:
        return float(objective.loss(lambda **given: model(**given).sample, batch).detach())

    batch = batch_with([(2, 5), (2, 5)])
    swapped = batch_with([(2, 5), (2, 5)])
    object.__setattr__(swapped, "references", batch.references[::-1])
    assert len({loss(batch_with([])), loss(batch_with([(2, 5)])), loss(batch), loss(swapped)}) == 4


def test_a_masked_loss_counts_every_sample_the_same() -> None:
    """Half of the first sample's tokens, one and a half of the second's."""
    masks = torch.zeros(2, 3, 4)
    masks[0, :, 2:] = 1
    masks[1, 1, 3], masks[1, 2, 0] = 1, 0.5
    objective, batch, model = (
        objective_for("klein"),
        batch_with([], masks),
        build_transformer(SPECS["klein"]),
    )
    seen: list[torch.Tensor] = []

    def forward(**given: Any) -> torch.Tensor:
        seen.append(model(**given).sample)
        return seen[-1]

    loss = objective.loss(forward, batch)
    x0 = latents.to_tokens(batch.latents, objective.mean, objective.std)
    errors = (seen[0] - (batch.noise - x0)).double().square().mean(-1).view(2, 3, 4)
    first = sum(errors[0, y, x] for y in range(3) for x in (2, 3)) / 6
    second = (errors[1, 1, 3] + 0.5 * errors[1, 2, 0]) / 1.5
    torch.testing.assert_close(loss.double(), (first + second) / 2)


def test_a_white_mask_is_no_mask() -> None:
    objective, model = objective_for("klein"), build_transformer(SPECS["klein"])
    losses = [
        objective.loss(lambda **given: model(**given).sample, batch_with([], masks))
        for masks in (None, torch.ones(2, 3, 4))
    ]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
