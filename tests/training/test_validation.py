"""The loss on held-out samples: each counts once, whatever the buckets, the batch and the processes."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.recipe import Batch, Data, Model, Objective, Recipe, Validation
from flux2_ds.data.index import Index, Shard
from flux2_ds.data.order import ValidationOrder
from flux2_ds.data.shards import Record, write_shard
from flux2_ds.distributed import Process
from flux2_ds.training.build import build_validation
from flux2_ds.training.loss import FlowObjective

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
            Record(f"{n}.jpg", ("",), torch.full(shape, float(n)))
            for n in itertools.islice(number, samples)
        ]
        shards.append(
            write_shard(folder / f"{place}.tar", bucket, records, lambda _: torch.zeros(6, 2))
        )
    return folder, Index("klein", 2, {}, {}, shards)


class Stand:
    """A model with dropout, as an engine; counts its passes and the samples that it sees."""

    def __init__(self) -> None:
        self.linear, self.dropout = torch.nn.Linear(128, 128, bias=False), torch.nn.Dropout(0.5)
        torch.nn.init.eye_(self.linear.weight)
        self.shapes: list[torch.Size] = []

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        self.shapes.append(hidden_states.shape)
        predicted: torch.Tensor = self.dropout(self.linear(hidden_states))
        return predicted

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
) -> tuple[float, list[list[torch.Size]]]:
    """The loss that `world_size` processes agree on, and the shapes of each one's forward passes."""
    folder, index = held_out
    recipe = Recipe(
        run_dir="unused",
        model=Model(path="unused"),
        data=Data(images="unused", shards=str(folder)),
        batch=Batch(global_size=64, micro_size=micro),
        objective=Objective(caption_dropout=1.0, stratified=stratified),
        validation=Validation(samples=samples),
    )
    objective = FlowObjective(
        recipe.objective,
        torch.zeros(128),
        torch.ones(128),
        guidance=False,
        global_batch=64,
        device=CPU,
    )
    loss, shapes = 0.0, []
    for rank in range(world_size):
        model: Any = Stand()
        inputs: Any = SimpleNamespace(
            recipe=recipe,
            process=Process(rank, world_size, CPU),
            held_out=index,
            conditioning=CONDITIONING,
        )
        validation = build_validation(inputs, model, objective, lambda step, phase: None)
        assert validation is not None
        before = torch.get_rng_state()
        part = validation.loss(0)
        shapes.append(list(model.shapes))
        assert validation.loss(0) == part  # nothing is random, and nothing is left behind
        assert torch.equal(torch.get_rng_state(), before)
        assert model.dropout.training and model.linear.weight.grad is None
        loss += part
    return loss, shapes


def test_every_held_out_sample_counts_once(held_out, monkeypatch):
    """Against the losses of the samples one by one, whose latents are their numbers."""
    _, (shapes,) = evaluate(held_out)
    assert Counter(shape[1] for shape in shapes) == {SQUARE.tokens: 3, WIDE.tokens: 4}
    seen = []

    def recorded(self: FlowObjective, forward: Any, batch: Any, counted: int) -> torch.Tensor:
        seen.append(float(batch.latents.mean()))
        return torch.tensor(seen[-1])

    monkeypatch.setattr(FlowObjective, "loss", recorded)
    mean, _ = evaluate(held_out)
    assert sorted(seen) == sorted([1.0, 2, 3, 4, 5, 6, 7] * 2)
    assert mean == 4


def test_timesteps_of_few_samples_are_of_the_whole_distribution(held_out):
    """Strata are shares of a global batch, of which the held-out samples may be a small part."""
    plain, _ = evaluate(held_out)
    stratified, _ = evaluate(held_out, stratified=True)
    assert stratified == plain


@pytest.mark.parametrize(("world_size", "micro"), [(2, 1), (1, 2), (2, 2), (4, 4)])
def test_processes_and_micro_batches_do_not_change_the_loss(held_out, world_size, micro):
    alone, _ = evaluate(held_out)
    loss, shapes = evaluate(held_out, world_size, micro)
    assert loss == pytest.approx(alone, rel=1e-6)
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
