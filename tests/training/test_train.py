"""The loop and what a start of the trainer refuses, with stand-ins for DeepSpeed's collectives."""

import dataclasses
import errno
import itertools
import json
import logging
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from flux2_ds import distributed as agreement
from flux2_ds import train
from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.checkpoint import manager as saving
from flux2_ds.checkpoint.tensor_store import TensorShard
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import Memory
from flux2_ds.config.model_files import fingerprint
from flux2_ds.config.model_spec import read_spec
from flux2_ds.config.parse import load_recipe
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import (
    Checkpoint,
    Data,
    Log,
    Lora,
    Model,
    Optimizer,
    Recipe,
    recipe_values,
)
from flux2_ds.data.index import Index, Shard
from flux2_ds.data.loader import MicroBatch
from flux2_ds.data.order import Sample
from flux2_ds.distributed import Process
from flux2_ds.errors import OutageError, UserError
from flux2_ds.run.run_dir import lock_run_dir
from flux2_ds.training import loop
from flux2_ds.training.nonfinite import NonFinite
from flux2_ds.training.stop import StopRequest

KINDS = ("weights", "exp_avg", "exp_avg_sq")
FIRST, SECOND = (Process(rank, 2, torch.device("cpu")) for rank in (0, 1))
INDEX = Index("klein", 32, {}, {}, [Shard("x.tar", Bucket(32, 32), 3, 5, "ab")])


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group."""
    monkeypatch.setattr(loop, "average", lambda value: value)
    monkeypatch.setattr(loop, "any_rank", lambda flag, device: flag)
    monkeypatch.setattr(loop, "barrier", lambda: None)
    monkeypatch.setattr(train, "broadcast_from_rank0", lambda value, device: value)
    monkeypatch.setattr(saving, "all_gather_object", lambda value: [value])


# Starting


def test_a_second_start_touches_nothing_of_a_running_one(tmp_path, monkeypatch):
    """Its refusal must not look like a failure of the processes that train."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: m}\ndata: {images: i, shards: s}\n")
    monkeypatch.setattr(
        "sys.argv", ["train", "--config", str(recipe), "--run_dir", str(tmp_path / "r")]
    )
    monkeypatch.setattr(StopRequest, "listen", lambda self: None)
    with (
        lock_run_dir(load_recipe(recipe, [f"--run_dir={tmp_path / 'r'}"])),
        pytest.raises(UserError, match="another process is training"),
    ):
        train.main()
    assert [path.name for path in (tmp_path / "r").iterdir()] == [".lock"]


def test_processes_that_read_different_indexes_are_refused(monkeypatch):
    recipe = Recipe(run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s"))
    train.check_same(INDEX, recipe, SECOND)
    monkeypatch.setattr(train, "broadcast_from_rank0", lambda value, device: value + 1)
    with pytest.raises(UserError, match=r"index of data.shards s on .* is not the first process's"):
        train.check_same(INDEX, recipe, SECOND)


# Asking it to stop


def test_a_stop_file_is_seen_once_and_by_the_first_process(tmp_path):
    stop, other = StopRequest(tmp_path / "stop"), StopRequest(tmp_path / "stop")
    assert not stop.seen(FIRST)
    stop.file.write_text("SIGTERM")
    assert not other.seen(SECOND)
    assert stop.seen(FIRST)
    assert stop.reason == "SIGTERM"
    assert not stop.file.exists()  # the next start does not stop
    assert stop.seen(FIRST)
    stop.file.touch()  # by hand
    assert stop.seen(FIRST)
    assert stop.reason == "stop"


def test_a_stop_file_of_an_earlier_run_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    stop = StopRequest(tmp_path / "stop")
    stop.file.touch()
    stop.listen()
    assert stop.file.exists()  # meant for this process
    os.utime(stop.file, (0, 0))
    stop.listen()
    assert not stop.file.exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_seen_by_any_process(tmp_path, name):
    number = signal.Signals[name]
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    stop = StopRequest(tmp_path / "stop")
    try:
        stop.listen()
        os.kill(os.getpid(), number)
        assert stop.seen(SECOND)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stop.reason == name


@pytest.mark.parametrize(("processes", "late"), [(1, True), (2, False)])
def test_several_processes_look_for_a_stop_when_asked_and_one_alone_when_it_is_needed(
    processes, late, monkeypatch
):
    monkeypatch.setattr(agreement.distributed, "get_world_size", lambda: processes)
    monkeypatch.setattr(agreement.distributed, "all_reduce", lambda value, op: None)
    flags = {"up": False}
    answer = agreement.any_rank(lambda: flags["up"], torch.device("cpu"))
    flags["up"] = True
    assert answer() == late
    monkeypatch.setattr(agreement.distributed, "all_reduce", lambda value, op: value.fill_(1))
    assert agreement.any_rank(lambda: processes == 1, torch.device("cpu"))()


# The loop


class StandIn:
    """An engine whose loss and gradient norm are given for each step."""

    skips_overflows = False

    def __init__(self, losses: list[float], norms: list[float] | None = None) -> None:
        self.losses, self.norms = iter(losses), iter(norms or [1.0] * len(losses))
        self.norm = math.nan
        self.state = SimpleNamespace(
            sharded=False,
            tensor_shards=lambda: [TensorShard("weights", "a", torch.zeros(1))],
            counters=lambda: {"updates": 0},
        )

    def forward(self) -> torch.Tensor:
        return torch.tensor(next(self.losses))

    def backward(self, loss: torch.Tensor) -> None:
        pass

    def step(self, learning_rate: float) -> None:
        self.norm = next(self.norms)

    def gradient_norm(self) -> float:
        return self.norm


BATCH = MicroBatch(
    Bucket(32, 32),
    [Sample(0, 1, 7)],
    latents=torch.tensor([[0.0, 2.0, math.nan]]),
    text=torch.ones(1, 2),
    noise=torch.full((1, 2), math.inf),
    deviates=torch.tensor([0.5]),
)


def run_loop(
    folder: Path,
    engine: StandIn,
    steps: int,
    metrics: Any = None,
    policy: Any = "stop",
    validation: Any = None,
    previews: Any = None,
    watchdog: Any = None,
    log_every: int = 1,
    save_every: int = 100,
) -> bool:
    recipe = recipe_for(
        folder,
        run_dir=str(folder),
        steps=steps,
        log=Log(every=log_every),
        checkpoint=Checkpoint(every=save_every, keep_last=9),
    )
    return loop.train(
        engine,  # type: ignore[arg-type]
        SimpleNamespace(steps=lambda first, last: itertools.repeat([BATCH], last - first)),  # type: ignore[arg-type]
        SimpleNamespace(loss=lambda forward, batch: forward()),  # type: ignore[arg-type]
        metrics,
        FIRST,
        recipe,
        StopRequest(folder / "stop"),
        watchdog or Mock(),
        NonFinite(
            folder / "nonfinite", policy, engine.skips_overflows, lambda s: {"row": s.row}, rank=1
        ),
        first_step=0,
        steps_per_epoch=3,
        run_state={},
        validation=validation,
        previews=previews,
    )


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in folder.glob("checkpoints/step_*"))


def test_checkpoints_and_log_lines_keep_their_own_cadence(tmp_path):
    metrics = Mock()
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert run_loop(tmp_path, StandIn(losses), 7, metrics, log_every=3, save_every=2)
    assert saved(tmp_path) == [2, 4, 6, 7]
    written = [call.args for call in metrics.write.call_args_list]
    # Means since the line before; a checkpoint in between does not shorten them.
    assert [(step, values["loss"]) for step, values in written] == [(3, 2.0), (6, 5.0), (7, 7.0)]


def test_evaluations_come_at_their_cadence_and_at_the_end_but_not_when_stopping(tmp_path):
    metrics, validation = Mock(), SimpleNamespace(every=2, loss=Mock(side_effect=[0.5, 0.4, 0.3]))
    assert run_loop(tmp_path, StandIn([1.0] * 5), 5, metrics, validation=validation, log_every=3)
    written = {call.args[0]: call.args[1] for call in metrics.write.call_args_list}
    found = {step: values.get("validation_loss") for step, values in written.items()}
    assert found == {2: 0.5, 3: None, 4: 0.4, 5: 0.3}
    (tmp_path / "stop").write_text("SIGTERM")
    validation.loss = Mock(side_effect=AssertionError)
    assert not run_loop(tmp_path, StandIn([1.0] * 5), 5, Mock(), validation=validation)


def test_previews_come_first_at_their_cadence_and_at_the_end_but_not_when_stopping(tmp_path):
    previews = SimpleNamespace(every=2, render=Mock(return_value=[("a cat", tmp_path / "0.png")]))
    metrics = Mock()
    assert run_loop(tmp_path, StandIn([1.0] * 5), 5, metrics, previews=previews, log_every=3)
    assert [call.args[0] for call in previews.render.call_args_list] == [0, 2, 4, 5]
    assert [call.args[0] for call in metrics.show.call_args_list] == [0, 2, 4, 5]
    # A line is written before each, so that no step's time has a preview in it.
    assert [call.args[0] for call in metrics.write.call_args_list] == [2, 3, 4, 5]
    previews.render.reset_mock()
    (tmp_path / "stop").write_text("SIGTERM")
    assert not run_loop(tmp_path, StandIn([1.0] * 5), 5, Mock(), previews=previews)
    assert [call.args[0] for call in previews.render.call_args_list] == [0]


def test_a_stop_file_ends_the_loop_after_its_step_with_a_checkpoint(tmp_path, caplog):
    metrics = Mock()
    metrics.write.side_effect = lambda step, values: (tmp_path / "stop").write_text("SIGHUP")
    with caplog.at_level(logging.INFO, logger="flux2_ds"):
        assert not run_loop(tmp_path, StandIn([1.0] * 9), 9, metrics)
    assert saved(tmp_path) == [2]  # asked for during the first step's log line
    assert "stopped by SIGHUP after step 2" in caplog.text


@pytest.mark.parametrize(
    ("losses", "norms", "message"),
    [
        ([1.0, 1.0, math.nan], None, "the loss is nan at step 4"),
        ([1.0, 1.0, 1.0, math.inf], None, "the loss is inf at step 4"),
        ([1.0] * 4, [1.0, 1.0, 1.0, math.inf], "the gradient norm is inf at step 4"),
    ],
)
def test_what_is_not_finite_is_not_saved(tmp_path, losses, norms, message):
    engine = StandIn([*losses, 1.0, 1.0], norms)
    with pytest.raises(UserError, match=message):
        run_loop(tmp_path, engine, 6, log_every=100, save_every=2)
    assert saved(tmp_path) == [2]


def test_what_is_not_finite_is_written_down(tmp_path):
    with pytest.raises(UserError, match=r"step_00000003-process_1.json has this process's samples"):
        run_loop(tmp_path, StandIn([1.0] * 9, [1.0, 1.0, math.nan]), 9)
    (path,) = tmp_path.glob("nonfinite/*")
    facts = json.loads(path.read_text())
    assert (facts["step"], facts["gradient_norm"]) == (3, "nan")
    (batch,) = facts["micro_batches"]
    assert (batch["samples"], batch["deviates"], batch["loss"]) == ([{"row": 1}], [0.5], "1.0")
    assert batch["latents"] == [{"not_finite": 1, "mean": 1, "std": 1, "min": 0, "max": 2}]
    assert batch["noise"] == [{"not_finite": 2}]


def test_skipped_steps_are_counted_and_their_losses_are_not(tmp_path, caplog):
    metrics = Mock()
    norms = [1.0, math.inf, 2.0, math.nan, math.nan, 1.0]
    engine = StandIn([1.0, math.nan, 3.0, 9.0, math.nan, 5.0], norms)
    assert run_loop(tmp_path, engine, 6, metrics, policy="skip", log_every=3)
    values = [call.args[1] for call in metrics.write.call_args_list]
    assert [(v["loss"], v["skipped_steps"]) for v in values] == [(2.0, 1), (5.0, 3)]
    assert caplog.text.count("Skipped; ") == 3
    assert len(list(tmp_path.glob("nonfinite/*"))) == 3


def test_what_cannot_be_written_down_does_not_end_a_run_that_skips(tmp_path, caplog):
    (tmp_path / "nonfinite").touch()  # no folder can be made
    assert run_loop(tmp_path, StandIn([1.0] * 3, [1.0, math.nan, 1.0]), 3, policy="skip")
    assert "What was in it could not be written: [Errno 17]" in caplog.text


def test_old_checkpoints_that_stay_do_not_end_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "remove_old", Mock(side_effect=OSError(39, "not empty")))
    assert run_loop(tmp_path, StandIn([1.0] * 4), 4, save_every=2)
    assert saved(tmp_path) == [2, 4]
    assert caplog.text.count("old checkpoints cannot be removed") == 2


def test_slow_work_outside_the_step_moves(tmp_path):
    watchdog = Mock()
    validation = SimpleNamespace(every=2, loss=lambda heartbeat: heartbeat() or 0.5)
    assert run_loop(tmp_path, StandIn([1.0] * 2), 2, validation=validation, watchdog=watchdog)
    places = [call.args for call in watchdog.heartbeat.call_args_list]
    assert places == [
        *((1, "waiting for data"), (1, "computing"), (1, "agreeing")),
        *((2, "waiting for data"), (2, "computing"), (2, "agreeing")),
        *((2, "evaluating"), (2, "saving"), (2, "saving"), (3, "waiting for data")),
    ]


def test_a_run_that_only_skips_stops(tmp_path):
    norms = [1.0] + 9 * [math.nan] + [1.0] + 10 * [math.nan]
    with pytest.raises(UserError, match=r"norm is nan at step 21; .* the 10th such step in a row"):
        run_loop(tmp_path, StandIn([1.0] * 30, norms), 30, policy="skip")


def test_steps_that_the_loss_scaler_skips_are_no_failure(tmp_path):
    engine, metrics = StandIn([4.0, 2.0, math.nan], [math.inf, 1.0, math.inf]), Mock()
    engine.skips_overflows = True
    with pytest.raises(UserError, match="norm is inf at step 3"):  # but a loss that is NaN is
        run_loop(tmp_path, engine, 4, metrics)
    values = [call.args[1] for call in metrics.write.call_args_list]
    assert [(v["loss"], v["skipped_steps"]) for v in values] == [(None, 1), (2.0, 1)]


def test_a_run_goes_on_when_a_checkpoint_cannot_be_written(tmp_path, monkeypatch, caplog):
    write = checkpoint.write_files

    def full(partial: Path, tensor_shards: Any, part: int | None) -> Any:
        if "04" in partial.name or "09" in partial.name:
            (partial / "weights.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(partial, tensor_shards, part)

    monkeypatch.setattr(checkpoint, "write_files", full)
    assert run_loop(tmp_path, StandIn([1.0] * 6), 6, save_every=2)
    assert "step 4 cannot be written" in caplog.text
    assert "No space left on device (process 0)" in caplog.text
    assert saved(tmp_path) == [2, 6]
    with pytest.raises(UserError, match="the checkpoint of step 9 cannot be written"):
        run_loop(tmp_path, StandIn([1.0] * 9), 9)
    assert saved(tmp_path) == [2, 6]
    assert not list(tmp_path.glob("checkpoints/.*"))  # the half is removed


def test_dropout_is_a_function_of_seed_step_and_rank():
    def dropped(*place: int) -> list[float]:
        loop.seed_dropout(*place)
        return torch.rand(4).tolist()

    with torch.random.fork_rng(devices=[]):
        first = dropped(3, 7, 1)
        others = [dropped(*place) for place in ((4, 7, 1), (3, 8, 1), (3, 7, 0), (7, 3, 1))]
        assert dropped(3, 7, 1) == first
    assert first not in others


# What a start refuses


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    recipe = Recipe(
        run_dir=str(folder / "run"),
        model=Model(path=str(folder / "model")),
        data=Data(images="photos", shards="shards"),
    )
    return dataclasses.replace(recipe, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        (
            {"settings": {"resolution": 512}},
            "data.resolution is 1024, but data.shards shards .* 512",
        ),
        ({"settings": {"max_upscale": 1.5}}, r"data.max_upscale is 1.0, .* prepared with 1\.5"),
        ({"text_width": 48}, "text width 48"),
        ({"fingerprint": {"vae": "0"}}, "made by another model"),
        ({"fingerprint": {"padding": "none"}}, "their padding is none"),
    ],
)
def test_shards_that_do_not_belong_to_the_recipe_are_refused(tmp_path, tiny_model, change, message):
    spec, recipe = read_spec(tiny_model), recipe_for(tmp_path)
    data = recipe.data
    settings = {"resolution": data.resolution, "max_upscale": data.max_upscale}
    index = Index(spec.variant, spec.text_width, fingerprint(tiny_model), settings)
    index = dataclasses.replace(index, **change)
    if message is None:
        train.check_shards(index, index, spec, tiny_model, recipe)
    else:
        with pytest.raises(UserError, match=message):
            train.check_shards(index, index, spec, tiny_model, recipe)


def save(write: Callable[..., Path], recipe: Recipe, step: int, index: Index = INDEX) -> Path:
    tensor_shards = [(kind, "a", torch.full((2,), float(step))) for kind in KINDS]
    state = {"updates": step - 1, "index": index.digest, "recipe": recipe_values(recipe)}
    return write(Path(recipe.run_dir) / "checkpoints", step, tensor_shards, state)


def test_a_new_run_starts_at_the_beginning(tmp_path):
    assert train.resume(Mock(), recipe_for(tmp_path), INDEX, FIRST) == 0


def test_a_run_goes_on_from_the_newest_intact_checkpoint(tmp_path, caplog, write_checkpoint):
    recipe, engine = recipe_for(tmp_path), Mock()
    for step in (10, 20, 30):
        last = save(write_checkpoint, recipe, step)
    (last / "exp_avg.safetensors").unlink()
    assert train.resume(engine, recipe, INDEX, FIRST) == 20
    assert "exp_avg.safetensors is missing" in caplog.text
    (loaded,) = engine.state.load.call_args.args
    assert loaded.tensors("weights")["a"].tolist() == [20, 20]
    assert (loaded.kinds(), loaded.state()["updates"]) == (sorted(KINDS), 19)
    assert not last.exists()
    assert last.with_name(f"{last.name}.damaged").is_dir()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`train.run` from step 10 with a loop that does nothing; returns that."""
    for name in ("build_loader", "build_objective", "warm_up", "Metrics"):
        monkeypatch.setattr(train, name, Mock())
    monkeypatch.setattr(loop, "train", trained := Mock())
    engine = Mock(skips_overflows=False)
    engine.state.updates.return_value = 7
    inputs = train.Inputs(
        make_plan(recipe_for(tmp_path), 1),
        FIRST,
        tmp_path,
        spec=Mock(),
        index=INDEX,
        held_out=dataclasses.replace(INDEX, shards=[]),
        order=Mock(),
        conditioning={"empty_text": torch.zeros(1)},
    )
    expected = Memory({"CUDA graphs": 1}, {})
    return partial(train.run, inputs, engine, expected, Mock(), Mock(), first_step=10), trained


def test_a_card_that_is_too_small_for_a_step_is_answered_with_settings(run):
    """With another exit code than a recipe that is wrong, for a restart may find more memory."""
    start, trained = run
    trained.side_effect = torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB.\nstack")
    with pytest.raises(
        OutageError, match=r"not enough for a step .*Tried 9 GiB.\). Set .*cuda_graphs: false"
    ) as raised:
        start()
    assert raised.value.code == 1 and "stack" not in str(raised.value)


def test_steps_that_an_earlier_start_skipped_are_counted_on(run):
    start, trained = run
    start()
    (nonfinite,) = (each for each in trained.call_args.args if isinstance(each, NonFinite))
    assert nonfinite.skipped == 3


def test_other_shards_are_refused_unless_the_change_is_accepted(tmp_path, write_checkpoint, caplog):
    save(write_checkpoint, recipe_for(tmp_path), 10)
    other = dataclasses.replace(INDEX, shards=[*INDEX.shards, *INDEX.shards])
    engine = Mock()
    with pytest.raises(UserError, match=f"index {other.digest}, was {INDEX.digest}"):
        train.resume(engine, recipe_for(tmp_path), other, FIRST)
    engine.state.load.assert_not_called()
    assert train.resume(engine, recipe_for(tmp_path, accept_changes=True), other, FIRST) == 10
    assert f"accepted: other shards in data.shards shards (index {other.digest}, was" in caplog.text


@pytest.mark.parametrize(
    ("before", "now"),
    [("adamw", "adafactor"), ("adamw", "muon"), ("prodigy", "adamw"), ("adamw8bit", "adamw")],
)
def test_another_optimizer_is_refused_before_anything_changes(
    tmp_path, write_checkpoint, before, now
):
    save(write_checkpoint, recipe_for(tmp_path, optimizer=Optimizer(name=before)), 10)
    other = recipe_for(tmp_path, optimizer=Optimizer(name=now), accept_changes=True)
    engine = Mock()
    with pytest.raises(UserError, match=f"optimizer.name was {before}, is {now}"):
        train.resume(engine, other, INDEX, FIRST)
    engine.state.load.assert_not_called()


def test_eight_bit_adamw_may_be_paged_from_a_checkpoint_on(tmp_path, write_checkpoint):
    save(write_checkpoint, recipe_for(tmp_path, optimizer=Optimizer(name="adamw8bit")), 10)
    paged = recipe_for(tmp_path, optimizer=Optimizer(name="adamw8bit_paged"), accept_changes=True)
    assert train.resume(Mock(), paged, INDEX, FIRST) == 10


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], Any]:
    """`train.train` with stand-ins for the model, the engine and the loop; returns run()'s."""
    spec, index = Mock(), Mock(digest=INDEX.digest, largest_tokens=1)
    stand_ins = {
        "start_process": lambda accelerator: FIRST,
        "read_data": lambda recipe: (index, Mock(samples=0)),
        "build_model": lambda *_: (Mock(), Memory({}, {})),
        "recordable": lambda plan, index: plan,
        "read_spec": lambda *_, **__: spec,
    }
    for name in ("model_directory", "check_same", "check_shards", "check_wandb", "build_order",
                 "read_conditioning", "barrier", "say_plan", "say_memory", "stop_process", "build_engine", "run"):  # fmt: skip
        monkeypatch.setattr(train, name, Mock())
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(train, name, stand_in)

    def starts(recipe: Recipe) -> Any:
        train.train(recipe, Mock(), Mock())
        return train.run

    return starts


def test_a_refused_start_leaves_the_run_directory_as_it_was(
    tmp_path, start, write_checkpoint, caplog
):
    recipe = recipe_for(tmp_path)
    start(recipe)
    save(write_checkpoint, recipe, 10)
    written = {path: path.read_text() for path in (tmp_path / "run").glob("*.*")}
    assert {path.name for path in written} == {"recipe.yaml", "deepspeed.json", "versions.json"}
    changed = recipe_for(tmp_path, lora=Lora(rank=8), accept_changes=True)
    train.build_engine().state.load.side_effect = UserError("does not fit")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="does not fit"):
        start(changed)
    assert {path: path.read_text() for path in (tmp_path / "run").glob("*.*")} == written
    assert "accepted" not in caplog.text

    train.build_engine().state.load.side_effect = None  # type: ignore[attr-defined]
    start(changed)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").lora.rank == 8
    assert "accepted: lora.rank was 32, is 8" in caplog.text


@pytest.mark.parametrize(
    ("schedule", "remedy"), [("constant", "raise steps"), ("cosine", "raise steps and set accept_")]
)
def test_a_run_that_is_past_its_steps_says_where_it_is(
    tmp_path, start, write_checkpoint, caplog, schedule, remedy
):
    recipe = recipe_for(tmp_path, steps=7, optimizer=Optimizer(schedule=schedule))
    save(write_checkpoint, recipe, 10)
    with caplog.at_level(logging.INFO, logger="flux2_ds"):
        start(recipe).assert_not_called()
    assert f"newest checkpoint is of step 10, and steps is 7. To go on, {remedy}" in caplog.text


def test_a_process_that_does_not_see_the_checkpoint_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "broadcast_from_rank0", lambda value, device: 10)
    with pytest.raises(UserError, match=r"process 1 does not see .*step_00000010"):
        train.resume(Mock(), recipe_for(tmp_path), INDEX, SECOND)
