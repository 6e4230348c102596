"""The loss on held-out samples: each counts once, whatever the buckets, the batch and the processes."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.recipe import Batch, Data, Model, Objective, Recipe, Validation
from flux2_ds.data.index import Index, Shard
from flux2_ds.data.order import ValidationOrder
from flux2_ds.data.shards import Record, View, write_shard
from flux2_ds.distributed import Process
from flux2_ds.run.run_dir import stale
from flux2_ds.training.build import build_validation
from flux2_ds.training.loss import FlowObjective, Losses
from flux2_ds.training.validation import LOSS

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("process_group")
CONDITIONING = {"empty_text": torch.zeros(6, 2)}
WIDE, SQUARE = Bucket(32, 48), Bucket(32, 32)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    """Seven samples in two buckets; the latents of a sample hold its number."""
    folder, number = tmp_path_factory.mktemp("held_out"), itertools.count(1)
    shards = []
    for place, (bucket, samples) in enumerate([(WIDE, 3), (SQUARE, 3), (WIDE, 1)]):
        shape = (32, bucket.height // 8, bucket.width // 8)
        records = [
            Record(f"{n}.jpg", ("",), (View(torch.full(shape, float(n))),))
            for n in itertools.islice(number, samples)
        ]
        shard = write_shard(folder / f"{place}.tar", bucket, records, lambda _: torch.zeros(6, 2))
        shards.append(replace(shard, source="aba"[place]))
    return folder, Index("klein", 2, {}, {}, shards)


class Stand:
    """A model with dropout, as an engine; counts its passes and the samples that it sees."""

    strength = 1.0

    def __init__(self) -> None:
        self.linear, self.dropout = torch.nn.Linear(128, 128, bias=False), torch.nn.Dropout(0.5)
        torch.nn.init.eye_(self.linear.weight)
        self.shapes: list[torch.Size] = []

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        self.shapes.append(hidden_states.shape)
        predicted: torch.Tensor = self.dropout(self.linear(self.strength * hidden_states))
        return predicted

    def forward_base(self, **inputs: Any) -> torch.Tensor:
        with patch.object(self, "strength", 0.5):
            return self.forward(**inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.dropout.eval()
        yield
        self.dropout.train()


def evaluate(
    held_out: tuple[Path, Index],
    world_size: int = 1,
    micro: int = 1,
    samples: int = 64,
    stratified: bool = False,
    against_base: bool = False,
) -> tuple[dict[str, float], list[list[torch.Size]]]:
    """What `world_size` processes agree on, and the shapes of each one's forward passes."""
    folder, index = held_out
    recipe = Recipe(
        run_dir="unused",
        model=Model(path="unused"),
        data=Data(images="unused", shards=str(folder)),
        batch=Batch(global_size=64, micro_size=micro),
        objective=Objective(caption_dropout=1.0, stratified=stratified),
        validation=Validation(samples=samples, against_base=against_base),
    )
    objective = FlowObjective(
        recipe.objective,
        torch.zeros(128),
        torch.ones(128),
        guidance=False,
        global_batch=64,
        device=CPU,
    )
    sums, shapes = torch.zeros(()), []
    for rank in range(world_size):
        model: Any = Stand()
        inputs: Any = SimpleNamespace(
            recipe=recipe,
            process=Process(rank, world_size, CPU),
            held_out=index,
            conditioning=CONDITIONING,
        )
        validation = build_validation(inputs, model, objective, 0, lambda step, phase: None)
        assert validation is not None
        before = torch.get_rng_state()
        if world_size > 1:  # its collectives are of this process alone
            sums = sums + validation.sums(0, model.forward)
            shapes.append(list(model.shapes))
        else:
            found = validation.losses(0)
            shapes.append(list(model.shapes))
            assert validation.losses(9) == found  # nothing is random, and nothing is left behind
            assert [step for step, _ in validation.history] == [0, 9]
        assert torch.equal(torch.get_rng_state(), before)
        assert model.dropout.training and model.linear.weight.grad is None
    if world_size > 1:
        totals = zip(validation._groups, sums.tolist(), strict=True)
        found = {f"{LOSS}_{g}".rstrip("_"): t / n for g, (t, n) in totals if n}
    return found, shapes


def test_every_held_out_sample_counts_once(held_out, monkeypatch):
    """Against the losses of the samples one by one, whose latents are their numbers."""
    _, (shapes,) = evaluate(held_out)
    assert Counter(shape[1] for shape in shapes) == {SQUARE.tokens: 3, WIDE.tokens: 4}
    seen = []

    def recorded(self: FlowObjective, forward: Any, batch: Any) -> Losses:
        each = batch.latents.mean((1, 2, 3))
        seen.extend(each.tolist())
        return Losses(each.mean(), each, each / 7, [])  # a sample's timestep tells which it is

    monkeypatch.setattr(FlowObjective, "losses", recorded)
    found, _ = evaluate(held_out)
    assert sorted(seen) == sorted([1.0, 2, 3, 4, 5, 6, 7] * 2)
    # Samples 1 to 3 and 7 are of source a, 4 to 6 of b; 7 / 7 is in the last band.
    assert found == {
        LOSS: 4.0,
        "validation/loss_t0-25": 1.0,
        "validation/loss_t25-50": 2.5,
        "validation/loss_t50-75": 4.5,
        "validation/loss_t75-100": 6.5,
        "validation/loss_a": 13 / 4,
        "validation/loss_b": 5.0,
    }


def test_the_gain_is_what_the_adapter_takes_off_the_same_samples(held_out, monkeypatch):
    adapted, (passes,) = evaluate(held_out)
    found, (twice,) = evaluate(held_out, against_base=True)
    assert twice == 2 * passes
    monkeypatch.setattr(Stand, "strength", 0.5)
    base, _ = evaluate(held_out)
    gains = {name.replace("loss", "gain"): base[name] - adapted[name] for name in base}
    assert found == adapted | gains | {"validation/base_loss": base[LOSS]}
    assert found["validation/gain"] != 0


@pytest.mark.parametrize(
    ("losses", "patience", "ends"),
    [
        ([3, 2, 1], 1, False),
        ([3, 2, 2], 1, True),
        ([3, 2, 4], 2, False),
        ([3, 2, 4, 5], 2, True),
        ([3, 2, 4, 1], 2, False),
        ([3, 3], 2, False),
        ([], 1, False),
        ([math.nan, 3, math.nan], 1, True),
        ([math.nan, 3, 2], 1, False),
    ],
)
def test_the_loss_is_stale_after_evaluations_without_a_lower_one(losses, patience, ends):
    assert stale([(10 * n, loss) for n, loss in enumerate(losses)], patience) == ends


def test_timesteps_of_few_samples_are_of_the_whole_distribution(held_out):
    """Strata are shares of a global batch, of which the held-out samples may be a small part."""
    plain, _ = evaluate(held_out)
    stratified, _ = evaluate(held_out, stratified=True)
    assert stratified == plain


@pytest.mark.parametrize(("world_size", "micro"), [(2, 1), (1, 2), (2, 2), (4, 4)])
def test_processes_and_micro_batches_do_not_change_the_loss(held_out, world_size, micro):
    alone, _ = evaluate(held_out)
    loss, shapes = evaluate(held_out, world_size, micro)
    assert loss == pytest.approx(alone, rel=1e-6)  # in all bands and sources
    assert all(each == shapes[0] for each in shapes)  # or ZeRO-3 would wait for ever
    assert {shape[0] for shape in shapes[0]} == {micro}


def test_fewer_samples_are_taken_from_all_buckets_in_proportion():
    buckets = [Bucket(32, 32 + 16 * n) for n in range(3)]
    shards = [Shard(f"{n}.tar", buckets[n % 3], (10, 20, 30)[n % 3], 1, "") for n in range(6)]
    index = Index("klein", 2, {}, {}, shards)
    chosen = []
    for width in (1, 4, 64):
        validation_order = ValidationOrder(index, 12, width)
        chosen.append(
            [
                s
                for n in range(len(validation_order))
                for s in validation_order.batch(n)[1]
                if s.position < 12
            ]
        )
        for bucket, samples in map(validation_order.batch, range(len(validation_order))):
            assert {shards[sample.shard].bucket for sample in samples} == {bucket}
            assert len(samples) == width
    assert chosen[0] == chosen[1] == chosen[2]
    assert len({(sample.shard, sample.row) for sample in chosen[0]}) == 12
    assert [sample.shard for sample in chosen[0]] == [0, 3, 1, 1, 4, 4, 2, 2, 2, 5, 5, 5]
    assert all(sample.row < shards[sample.shard].samples for sample in chosen[0])
