"""The warm-up: what is passed through the model before step 1, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from factories import ONE_OF_EACH, build_adapted

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import Memory, out_of_memory
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Batch, Data, Model, Objective, Preservation, Recipe
from flux2_ds.data.index import Index, Shard
from flux2_ds.distributed import Process
from flux2_ds.errors import UserError
from flux2_ds.model.activation_checkpointing import configure_blocks
from flux2_ds.training.loss import FlowObjective
from flux2_ds.training.progress import Recompilations, compiled_graphs
from flux2_ds.training.warmup import synthetic, warm_up


def shard(width: int, height: int, *references: Bucket) -> Shard:
    return Shard("x.tar", Bucket(height, width, references), 3, 5, "ab")


TRAINED = Index(
    "klein",
    ONE_OF_EACH.text_width,
    {},
    {},
    [
        shard(64, 32),
        shard(32, 64),
        shard(64, 48, Bucket(16, 32), Bucket(16, 16)),
        shard(32, 32, Bucket(32, 32), Bucket(32, 32)),
    ],
)
NOTHING_EXPECTED = Memory({}, {})
HELD_OUT = replace(TRAINED, shards=[shard(64, 32)])
RECIPE = Recipe(
    run_dir="run",
    model=Model(path="model"),
    data=Data(images="photos", shards="shards"),
    batch=Batch(micro_size=2),
)


class Stand:
    """The engine's passes over a model that no DeepSpeed has seen."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def forward(self, **inputs: Any) -> torch.Tensor:
        prediction: torch.Tensor = self.model(**inputs, return_dict=False)[0]
        return prediction

    forward_base = forward

    def rehearse(self, loss: Callable[..., torch.Tensor]) -> None:
        loss(self.forward).backward()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.model.eval()
        yield
        self.model.train()


def run(
    engine: Any,
    loss: Any = None,
    recipe: Recipe = RECIPE,
    expected: Memory = NOTHING_EXPECTED,
    text_dtype: torch.dtype = torch.bfloat16,
    stopping: Callable[[], bool] = lambda: False,
) -> Mock:
    """Warm up; returns the watchdog."""
    objective = FlowObjective(
        Objective(), torch.zeros(128), torch.ones(128), False, 2, torch.device("cpu")
    )
    if loss is not None:
        objective = Mock(loss=loss, device=objective.device)
    run = SimpleNamespace(
        recipe=recipe,
        engine=engine,
        objective=objective,
        first_step=4,
        process=Process(0, 1, objective.device),
        stop=Mock(any_rank=lambda process: stopping),
        watchdog=Mock(),
    )
    inputs = SimpleNamespace(
        plan=make_plan(recipe, 1),
        index=TRAINED,
        held_out=HELD_OUT,
        conditioning={"empty_text": torch.zeros(1, dtype=text_dtype)},
    )
    warm_up(run, inputs, expected)  # type: ignore[arg-type]
    return run.watchdog


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "flux2_ds"]


def test_the_training_compiles_nothing_that_the_warm_up_has(caplog, monkeypatch):
    """Both kinds of blocks, references, evaluation; each length of samples is a graph for each kind."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    before = compiled_graphs()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        model = build_adapted(ONE_OF_EACH)
        configure_blocks(model, checkpointed=1, compiled=True, attention=None)
        engine = Stand(model)
        with caplog.at_level(logging.INFO, logger="flux2_ds"):
            run(engine)
        # Three lengths with both kinds of block, one of them again without gradients.
        assert compiled_graphs() - before == 4 * 2
        assert said(caplog)[-1].endswith(" s, 8 graphs compiled")
        caplog.clear()
        recompilations = Recompilations()
        objective = FlowObjective(
            Objective(), torch.zeros(128), torch.ones(128), False, 2, torch.device("cpu")
        )
        for each in TRAINED.shards:
            batch = synthetic(2, ONE_OF_EACH.text_width, each.bucket, seed=1)
            objective.loss(engine.forward, batch).backward()
            recompilations.check(1, each.bucket)
        assert not said(caplog)
        other = Bucket(48, 48)
        objective.loss(engine.forward, synthetic(2, ONE_OF_EACH.text_width, other)).backward()
        recompilations.check(7, other)
        recompilations.check(8, other)
    (line,) = said(caplog)
    assert line.startswith("step 7 (48x48) compiled 2 graphs")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_passes_of_the_plain_model_are_warmed_up_where_training_has_them(share):
    seen = []

    def loss(forward: Any, batch: Any) -> torch.Tensor:
        seen.append(list(batch.prompted))
        return torch.zeros((), requires_grad=True)

    kept = Preservation(prompts=["a cat"] if share else [], share=share)
    recipe = replace(RECIPE, preservation=kept, compile=True)
    run(Stand(torch.nn.Linear(1, 1)), loss, recipe)
    assert seen == 3 * [[True, True] if share else []] + [[]]  # the last one evaluates


def test_the_longest_samples_come_first_and_each_length_once(caplog):
    seen = []

    def loss(forward: Any, batch: Any) -> torch.Tensor:
        seen.append((str(batch.bucket.alone), [tuple(each.shape) for each in batch.references]))
        assert batch.latents.shape == (2, 32, batch.bucket.height // 8, batch.bucket.width // 8)
        return torch.zeros((), requires_grad=True)

    with caplog.at_level(logging.INFO, logger="flux2_ds"):
        watchdog = run(Stand(torch.nn.Identity()), loss)
    assert seen == [
        ("64x48", [(2, 32, 2, 4), (2, 32, 2, 2)]),  # 12 + 2 + 1 tokens
        ("32x32", [(2, 32, 4, 4), (2, 32, 4, 4)]),  # 4 + 4 + 4
        ("64x32", []),  # 8
        ("64x32", []),
    ]
    assert said(caplog)[:5] == [
        "warm-up    compiling the blocks in 4 passes",
        "warm-up 1 of 4: 64x48 with references 32x16,16x16, 0 s",
        "warm-up 2 of 4: 32x32 with references 32x32,32x32, 0 s",
        "warm-up 3 of 4: 64x32, 32x64, 0 s",
        "warm-up 4 of 4: 64x32 for evaluation, 0 s",
    ]
    assert [call.args[0] for call in watchdog.heartbeat.call_args_list] == 4 * [5]
    assert (
        watchdog.heartbeat.call_args_list[1].args[1]
        == "warming up for 32x32 with references 32x32,32x32"
    )


def test_what_is_trained_without_its_references_is_a_length_too():
    seen = []

    def loss(forward: Any, batch: Any) -> torch.Tensor:
        seen.append((str(batch.bucket.alone), len(batch.references)))
        return torch.zeros((), requires_grad=True)

    run(
        Stand(torch.nn.Identity()),
        loss,
        replace(RECIPE, objective=Objective(reference_dropout=0.1)),
    )
    assert seen[:-1] == [("64x48", 2), ("32x32", 2), ("64x32", 0), ("32x32", 0)]


def test_without_compilation_the_longest_alone_and_a_stop_is_obeyed(caplog):
    loss = Mock(side_effect=lambda *given, **named: torch.zeros((), requires_grad=True))
    run(Stand(torch.nn.Identity()), loss, replace(RECIPE, compile=False))
    assert [str(call.kwargs["batch"].bucket.alone) for call in loss.call_args_list] == ["64x48"]
    run(Stand(torch.nn.Identity()), loss, stopping=Mock(side_effect=[False, True]))
    assert loss.call_count == 2


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({}, "Set activation_checkpointing: full (it is auto), or a smaller batch.micro_size (it is 2), or base_weights: fp8 or nf4, or base_placement: host, or a smaller"),
        ({"activation_checkpointing": "full", "batch": Batch(), "base_weights": "fp8"}, "Set offload_activations: true, or base_weights: nf4, or base_placement: host, or a smaller"),
        ({"activation_checkpointing": 0.5, "method": "full"}, "Set activation_checkpointing: full (it is 0.5), or a smaller batch.micro_size (it is 2), or a smaller data"),
        ({"activation_checkpointing": 1.0, "offload_activations": True, "batch": Batch(), "base_weights": "nf4_fp8", "base_placement": "host"}, "Set a smaller data.resolution"),
    ],
)  # fmt: skip
def test_a_card_that_is_too_small_is_said_before_step_1(change, advice):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more")
    with pytest.raises(UserError) as raised:
        run(Stand(torch.nn.Identity()), Mock(side_effect=error), replace(RECIPE, **change))
    message = str(raised.value)
    assert message.startswith(
        "the card's memory is not enough for 64x48 with references 32x16,16x16"
    )
    assert "(CUDA out of memory. Tried to allocate 2 GiB.)" in message
    assert advice in message


def test_passes_that_are_recorded_come_twice(monkeypatch):
    """The second time, when they are recorded, after all the others, whose memory graphs would hold."""
    engine = Stand(torch.nn.Identity())
    loss = Mock(side_effect=lambda *given, **named: torch.zeros((), requires_grad=True))
    run(engine, loss, expected=Memory({"CUDA graphs": 1}, {}))
    named = [str(call.kwargs["batch"].bucket.alone) for call in loss.call_args_list if call.kwargs]
    assert named == 2 * ["64x48", "32x32", "64x32"]
    assert [len(call.kwargs) for call in loss.call_args_list] == [1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_recorded_is_what_the_training_passes(dtype):
    """Captions included, which may have been stored in fp32."""
    seen = []

    def loss(forward: Any, batch: Any) -> torch.Tensor:
        seen.append(batch.text.dtype)
        return torch.zeros((), requires_grad=True)

    run(Stand(torch.nn.Identity()), loss, text_dtype=dtype)
    assert seen == [dtype] * 4


def test_the_advice_names_what_is_at_work():
    error = torch.OutOfMemoryError("no")
    for spare in ("cuda_graphs", "cache_transposed_base"):
        advice = out_of_memory(RECIPE, "step", "64x64", error, [spare])
        assert f"{spare}: false" in advice and advice.count("false") == 1
    partitioned = replace(RECIPE, deepspeed="zero3")
    assert "or deepspeed: zero2 with base_w" in out_of_memory(partitioned, "step", "", error)
