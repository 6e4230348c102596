"""Reference images and masks, against the pipeline's own preparation and against plain loops."""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from factories import SPECS, build_transformer

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.recipe import Objective, Preservation
from flux2_ds.data.loader import MicroBatch
from flux2_ds.data.order import Sample
from flux2_ds.model import latents
from flux2_ds.training.loss import FlowObjective, Losses, LossParts

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


@pytest.mark.parametrize("sizes", REFERENCES)
def test_a_batch_with_references_is_its_samples_alone(sizes: list[tuple[int, int]]) -> None:
    """Loss and gradients are the means of those of the two samples."""
    masks = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(5))
    objective, batch, model = (
        objective_for("dev"),
        batch_with(sizes, masks),
        build_transformer(SPECS["dev"]),
    )

    def passed(batch: MicroBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = objective.loss(lambda **given: model(**given).sample, batch)
        return loss, list(torch.autograd.grad(loss, model.parameters()))

    def alone(row: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        one = slice(row, row + 1)
        tensors = {
            n: getattr(batch, n)[one] for n in ("latents", "text", "noise", "deviates", "masks")
        }
        return passed(replace(batch, references=[r[one] for r in batch.references], **tensors))

    (loss, gradients), (first, firsts), (second, seconds) = passed(batch), alone(0), alone(1)
    torch.testing.assert_close(loss, (first + second) / 2)
    for found, *pair in zip(gradients, firsts, seconds, strict=True):
        torch.testing.assert_close(found, sum(pair) / 2, rtol=1e-3, atol=1e-5)


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


def test_what_a_mask_leaves_out_has_the_weight_that_is_given() -> None:
    masks = torch.zeros(2, 3, 4)
    masks[:, 0], masks[1, 1] = 1, 0.5
    model, soft = build_transformer(SPECS["klein"]), 0.25 + 0.75 * masks
    objective = replace_settings(objective_for("klein"), unmasked_weight=0.25)
    found = objective.loss(lambda **given: model(**given).sample, batch_with([], masks))
    plain = objective_for("klein").loss(lambda **given: model(**given).sample, batch_with([], soft))
    assert torch.equal(found, plain)


def replace_settings(objective: FlowObjective, **settings: Any) -> FlowObjective:
    return replace(objective, settings=replace(objective.settings, **settings))


def test_the_shift_of_a_source_moves_its_timesteps_alone() -> None:
    batch = replace(batch_with([]), sources=["faces", "places"])
    seen: list[torch.Tensor] = []

    def forward(**given: Any) -> torch.Tensor:
        seen.append(given["timestep"])
        return torch.zeros(2, 12, 128)

    objective_for("klein").losses(forward, batch)
    replace_settings(objective_for("klein"), source_shift={"places": 3.0}).losses(forward, batch)
    (first, second), (same, moved) = seen
    assert first == same
    assert moved == pytest.approx(3 * second / (1 + 2 * second))


def preserving(**settings: Any) -> FlowObjective:
    """The plain model predicts 7 everywhere."""
    return replace(
        objective_for("klein"),
        preservation=Preservation(**settings),
        forward_base=lambda **given: torch.full((2, 14, 128), 7.0),
    )


@pytest.mark.parametrize(
    ("settings", "prompted", "roles", "to_base"),
    [
        ({}, [False, False], [0, 0], [False, False]),
        ({"sources": ["prior"]}, [False, False], [0, 1], [False, False]),
        ({"sources": ["prior"], "target": "base"}, [False, False], [0, 1], [False, True]),
        ({"prompts": ["a cat"], "share": 0.5}, [True, False], [2, 0], [True, False]),
        ({"sources": ["prior"], "prompts": ["a cat"]}, [True, False], [2, 1], [True, False]),
    ],
)
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_samples_that_preserve_have_their_target_and_weight(
    settings: Any, prompted: list[bool], roles: list[int], to_base: list[bool], weight: float
) -> None:
    masks = torch.zeros(2, 3, 4)
    masks[:, 0] = 1
    batch = replace(batch_with([(1, 2)], masks), sources=["cat", "prior"], prompted=prompted)
    objective = preserving(**settings, weight=weight)
    prediction = torch.randn(2, 14, 128, generator=torch.Generator().manual_seed(5))
    found = objective.losses(lambda **given: prediction, batch)
    x0 = latents.to_tokens(batch.latents, objective.mean, objective.std)
    own = (prediction[:, :12] - (batch.noise - x0)).square().mean(-1)[:, :4].mean(1)
    base = (prediction[:, :12] - 7).square().mean((1, 2))  # without the mask
    each = torch.where(torch.tensor(to_base), base, own)
    torch.testing.assert_close(found.each, each)
    weights = torch.tensor([weight if role else 1.0 for role in roles])
    torch.testing.assert_close(found.mean, (weights * each).mean())
    assert found.roles == roles


def test_the_plain_model_is_asked_only_where_a_sample_needs_it() -> None:
    """But in all passes where ranks that see other samples take part."""
    base = Mock(return_value=torch.zeros(2, 12, 128))
    batch = replace(batch_with([]), sources=["cat", "cat"], prompted=[False, False])
    every_third = {"prompts": ["x"], "every": 3}
    cases: list[tuple[dict[str, Any], bool, bool, int, int]] = [
        ({"prompts": ["x"]}, False, False, 0, 0),
        ({"prompts": ["x"]}, True, False, 0, 1),
        ({"prompts": ["x"]}, False, True, 0, 1),
        (every_third, True, False, 1, 0),
        (every_third, True, False, 2, 1),
        (every_third | {"sources": ["y"], "target": "base"}, True, False, 1, 1),
    ]
    for kept, always, prompted, step, calls in cases:
        base.reset_mock()
        objective = replace(preserving(**kept), forward_base=base, always_base=always)
        samples = [Sample(0, 0, 2 * step + place) for place in range(2)]
        one = replace(batch, prompted=[False, prompted], samples=samples)
        objective.losses(lambda **given: torch.zeros(2, 12, 128), one)
        assert base.call_count == calls, kept


@pytest.mark.usefixtures("process_group")
def test_parts_of_the_loss_are_means_by_role() -> None:
    parts = LossParts(CPU)
    for each, roles in (([1.0, 2.0], [0, 2]), ([4.0, math.nan], [2, 0]), ([5.0, 7.0], [0, 0])):
        parts.add(Losses(torch.zeros(()), torch.tensor(each), torch.zeros(2), roles))
    assert parts.means() == {"train/loss_images": 13 / 3, "train/loss_preservation": 3.0}
    assert parts.means() == {}


def test_a_white_mask_is_no_mask() -> None:
    objective, model = objective_for("klein"), build_transformer(SPECS["klein"])
    losses = [
        objective.loss(lambda **given: model(**given).sample, batch_with([], masks))
        for masks in (None, torch.ones(2, 3, 4))
    ]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
