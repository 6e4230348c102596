"""The loop: cadence, checks one step behind, what is logged, saved and stopped at."""

import errno
import itertools
import json
import logging
import math
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from flux2_ds import train
from flux2_ds.checkpoint import manager
from flux2_ds.checkpoint.tensor_store import TensorShard
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import Memory
from flux2_ds.config.model_spec import RELEASED
from flux2_ds.config.recipe import Checkpoint, Data, Log, Model, Recipe, Validation
from flux2_ds.data.loader import MicroBatch
from flux2_ds.data.order import Sample
from flux2_ds.distributed import Process
from flux2_ds.errors import OutageError, UserError
from flux2_ds.run.metrics import Metrics, read_metrics
from flux2_ds.run.run_dir import is_finished, stale, validation_history
from flux2_ds.train import run_steps
from flux2_ds.training import progress
from flux2_ds.training.build import Run
from flux2_ds.training.cadence import Cadence
from flux2_ds.training.checkpoints import Checkpoints
from flux2_ds.training.loss import Losses
from flux2_ds.training.nonfinite import NonFinite
from flux2_ds.training.progress import Facts, Progress, product_of
from flux2_ds.training.step import seed_dropout
from flux2_ds.training.stop import StopRequest
from flux2_ds.training.validation import LOSS

ALONE = Process(0, 1, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("process_group")


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


def sample_loss(mean: torch.Tensor) -> Losses:
    """Of one sample with t = 0.8."""
    return Losses(mean, mean[None], torch.tensor([0.8]), [0])


def recorder() -> Mock:
    """Metrics whose records a test looks at."""
    return Mock(smoothed=lambda loss: loss)


FACTS = Facts(
    spec=RELEASED["black-forest-labs/FLUX.2-dev"],
    samples=6,
    steps_per_epoch=3,
    expected=Memory({}, {}),
    hosts=["here"],
)


def recipe_for(folder: Path, **settings: Any) -> Recipe:
    data = Data(images="photos", shards="shards")
    return Recipe(run_dir=str(folder), model=Model(path="model"), data=data, **settings)


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
    first_step: int = 0,
    at_start: bool = False,
    keep: Checkpoint = Checkpoint(keep_last=9),  # noqa: B008
) -> bool:
    recipe = recipe_for(
        folder, steps=steps, validation=Validation(at_start=at_start), checkpoint=keep
    )
    stand_in: Any = engine
    nonfinite = NonFinite(
        folder / "nonfinite", policy, engine.skips_overflows, lambda s: {"row": s.row}, rank=1
    )
    watchdog = watchdog or Mock()
    run = Run(
        recipe=recipe,
        process=ALONE,
        engine=stand_in,
        objective=SimpleNamespace(losses=lambda forward, batch: sample_loss(forward())),  # type: ignore[arg-type]
        loader=SimpleNamespace(steps=lambda first, last: itertools.repeat([BATCH], last - first)),  # type: ignore[arg-type]
        parts=None,
        first_step=first_step,
        cadence=Cadence(
            steps, log_every, save_every, 2 if validation else None, 2 if previews else None
        ),
        progress=Progress(
            stand_in, recipe, ALONE, metrics, nonfinite, first_step=first_step, facts=FACTS
        ),
        checkpoints=Checkpoints(stand_in, recipe, ALONE, {}, metrics, watchdog.heartbeat),
        validation=validation,
        previews=previews,
        metrics=metrics,
        stop=StopRequest(folder / "stop"),
        watchdog=watchdog,
    )
    try:
        return run_steps(run)
    finally:  # as in train()
        run.checkpoints.wait(steps)


def held_out_losses(*losses: float, patience: int = 99) -> Any:
    """A validation that finds these losses, one after the other."""
    history: list[tuple[int, float]] = []
    coming = iter(losses)

    def losses_at(step: int) -> dict[str, float]:
        history.append((step, next(coming)))
        return {LOSS: history[-1][1]}

    return SimpleNamespace(
        losses=losses_at, history=history, stale=lambda: stale(history, patience)
    )


@pytest.mark.parametrize(
    ("losses", "patience", "steps", "kept"),
    [
        ((0.5, 0.4, 0.6, 0.7), 9, 8, [4, 6, 8]),
        ((0.5, 0.4, 0.6, 0.7), 2, 8, [4, 6, 8]),
        ((0.5, 0.4, 0.6, 0.7), 1, 6, [4, 6]),
        ((0.3, 0.4, 0.6), 2, 6, [2, 4, 6]),
        ((0.5, 0.4, 0.3, 0.2), 1, 8, [6, 8]),
    ],
)
def test_a_loss_that_falls_no_more_ends_the_run_and_the_best_is_kept(
    tmp_path, losses, patience, steps, kept
):
    validation, previews, engine = (
        held_out_losses(*losses, patience=patience),
        Mock(),
        StandIn(8 * [1.0]),
    )
    options = {"save_every": 2, "keep": Checkpoint(keep_last=2, keep_best=True)}
    assert run_loop(tmp_path, engine, 8, validation=validation, previews=previews, **options)
    assert saved(tmp_path) == kept
    assert previews.render.call_args.args == (steps,)
    recipe = recipe_for(tmp_path, steps=8, validation=Validation(patience=patience))
    assert validation_history(recipe, steps) == validation.history  # what a resume goes on with
    assert is_finished(recipe, steps)  # also for the launcher, which would start the run again
    assert not is_finished(recipe, 4) and not is_finished(recipe, 0)


def test_checkpoints_and_previews_are_in_no_steps_time_but_in_the_time_left(
    tmp_path, monkeypatch, caplog
):
    now, metrics = [0.0], recorder()

    def tick(seconds: float) -> float:
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: tick(0.001)))
    previews = Mock(render=lambda step: tick(100.0))
    metrics.saved = lambda step, path: tick(10.0)
    caplog.set_level(logging.INFO, logger="flux2_ds")
    options = {"log_every": 9, "save_every": 1, "previews": previews, "metrics": metrics}
    assert run_loop(tmp_path, StandIn(8 * [1.0]), 8, **options)
    paces = [call.args[1]["perf/seconds_per_step"] for call in metrics.write.call_args_list]
    assert len(paces) == 4 and max(paces) < 1
    assert (
        "step 3/8 | about 0:03:" in caplog.text
    )  # as long as 3 checkpoints and a preview took, a step


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in folder.glob("checkpoints/step_*"))


def test_checkpoints_and_log_lines_keep_their_own_cadence(tmp_path):
    metrics = recorder()
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert run_loop(tmp_path, StandIn(losses), 7, metrics, log_every=3, save_every=2)
    assert saved(tmp_path) == [2, 4, 6, 7]
    written = [call.args for call in metrics.write.call_args_list]
    # Means since the line before; a checkpoint in between does not shorten them.
    assert [(step, values["train/loss"]) for step, values in written] == [
        (3, 2.0),
        (6, 5.0),
        (7, 7.0),
    ]


def test_evaluations_come_at_their_cadence_and_at_the_end_but_not_when_stopping(tmp_path):
    metrics, validation = recorder(), held_out_losses(0.5, 0.4, 0.3)
    assert run_loop(tmp_path, StandIn([1.0] * 5), 5, metrics, validation=validation, log_every=3)
    written = {call.args[0]: call.args[1] for call in metrics.write.call_args_list}
    found = {step: values.get("validation/loss") for step, values in written.items()}
    assert found == {2: 0.5, 3: None, 4: 0.4, 5: 0.3}
    validation.losses = Mock(side_effect=AssertionError)
    metrics.write.side_effect = lambda step, values: (tmp_path / "stop").write_text("SIGTERM")
    assert not run_loop(tmp_path, StandIn([1.0] * 5), 5, metrics, validation=validation)


@pytest.mark.parametrize(("at_start", "first", "found"), [(True, 0, [0, 2]), (False, 0, [2]), (True, 1, [2])])  # fmt: skip
def test_an_evaluation_comes_before_step_1_where_it_is_asked_for(tmp_path, at_start, first, found):
    metrics, validation = recorder(), held_out_losses(0.5, -1.5)
    engine = StandIn([1.0] * 2)
    options = {"validation": validation, "at_start": at_start, "first_step": first}
    assert run_loop(tmp_path, engine, 2, metrics, log_every=2, **options)
    written = {call.args[0]: call.args[1]["validation/loss"] for call in metrics.write.mock_calls}
    assert list(written) == found


def test_previews_come_first_at_their_cadence_and_at_the_end_but_not_when_stopping(tmp_path):
    previews, metrics = Mock(), recorder()
    previews.made.return_value = False
    assert run_loop(tmp_path, StandIn([1.0] * 5), 5, metrics, previews=previews, log_every=3)
    assert [call.args[0] for call in previews.render.call_args_list] == [0, 2, 4, 5]
    # A line is written before each, so that no step's time has a preview in it.
    assert [call.args[0] for call in metrics.write.call_args_list] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("first_step", "made", "rendered"),
    [(0, True, [5]), (3, False, [5]), (4, True, [5]), (4, False, [4, 5]), (5, False, [5]), (5, True, [])],
)  # fmt: skip
def test_previews_that_a_killed_start_owes_are_made_up_for(tmp_path, first_step, made, rendered):
    previews = Mock()
    previews.made.return_value = made
    engine = StandIn([1.0] * (5 - first_step))
    assert run_loop(tmp_path, engine, 5, previews=previews, first_step=first_step)
    found = [call.args[0] for call in previews.render.call_args_list]
    assert [step for step in found if step in (first_step, 5)] == rendered


def test_a_stop_that_was_asked_for_while_loading_is_taken_before_the_first_step(tmp_path, caplog):
    (tmp_path / "stop").write_text("SIGTERM")
    previews = Mock()
    with caplog.at_level(logging.INFO, logger="flux2_ds"):
        assert not run_loop(tmp_path, StandIn([]), 5, previews=previews)
    assert "stopped by SIGTERM before step 1" in caplog.text
    previews.render.assert_not_called()
    assert saved(tmp_path) == []


def test_a_stop_file_ends_the_loop_after_its_step_with_a_checkpoint(tmp_path, caplog):
    metrics = recorder()
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
    with pytest.raises(UserError, match=r"step_00000003-rank_1.json has this rank's samples"):
        run_loop(tmp_path, StandIn([1.0] * 9, [1.0, 1.0, math.nan]), 9)
    (path,) = tmp_path.glob("nonfinite/*")
    facts = json.loads(path.read_text())
    assert (facts["step"], facts["gradient_norm"]) == (3, "nan")
    (batch,) = facts["micro_batches"]
    assert (batch["samples"], batch["deviates"], batch["loss"]) == ([{"row": 1}], [0.5], "1.0")
    assert batch["latents"] == [{"not_finite": 1, "mean": 1, "std": 1, "min": 0, "max": 2}]
    assert batch["noise"] == [{"not_finite": 2}]


def test_skipped_steps_are_counted_and_their_losses_are_not(tmp_path, caplog):
    metrics = recorder()
    norms = [1.0, math.inf, 2.0, math.nan, math.nan, 1.0]
    engine = StandIn([1.0, math.nan, 3.0, 9.0, math.nan, 5.0], norms)
    assert run_loop(tmp_path, engine, 6, metrics, policy="skip", log_every=3)
    values = [call.args[1] for call in metrics.write.call_args_list]
    assert [(v["train/loss"], v["optim/skipped_steps"]) for v in values] == [(2.0, 1), (5.0, 3)]
    assert [v["train/loss_t75-100"] for v in values] == [2.0, 5.0]
    assert "train/loss_t0-25" not in values[0]  # no sample is there
    assert caplog.text.count("Skipped; ") == 3
    assert len(list(tmp_path.glob("nonfinite/*"))) == 3


def test_what_cannot_be_written_down_does_not_end_a_run_that_skips(tmp_path, caplog):
    (tmp_path / "nonfinite").touch()  # no folder can be made
    assert run_loop(tmp_path, StandIn([1.0] * 3, [1.0, math.nan, 1.0]), 3, policy="skip")
    assert "What was in it could not be written: [Errno 17]" in caplog.text
    away = Mock(side_effect=OutageError("the store is away"))
    stops = NonFinite(tmp_path / "other", "stop", False, away, rank=0)
    with pytest.raises(
        UserError, match=r"norm is nan at step 3.* not be written: the store is away"
    ):
        stops.check(math.nan, 3, [BATCH], [torch.ones(())])


def test_old_checkpoints_that_stay_do_not_end_a_run(tmp_path, monkeypatch, caplog):
    failures = [OSError(39, "not empty"), UserError("checkpoints cannot be read")]
    monkeypatch.setattr(manager, "remove_old", Mock(side_effect=failures))
    assert run_loop(tmp_path, StandIn([1.0] * 4), 4, save_every=2)
    assert saved(tmp_path) == [2, 4]
    assert caplog.text.count("old checkpoints cannot be removed") == 2


def test_the_watchdog_hears_of_every_phase(tmp_path):
    watchdog = Mock()
    validation = held_out_losses(0.5)
    assert run_loop(tmp_path, StandIn([1.0] * 2), 2, validation=validation, watchdog=watchdog)
    places = [call.args for call in watchdog.heartbeat.call_args_list]
    assert places == [
        *((1, "waiting for data"), (1, "computing"), (1, "agreeing")),
        *((2, "waiting for data"), (2, "computing"), (2, "agreeing")),
        *((2, "saving"), (2, "saving")),
    ]


def test_a_run_that_only_skips_stops(tmp_path):
    norms = [1.0] + 9 * [math.nan] + [1.0] + 10 * [math.nan]
    with pytest.raises(UserError, match=r"norm is nan at step 21, .* the 10th such step in a row"):
        run_loop(tmp_path, StandIn([1.0] * 30, norms), 30, policy="skip")


def test_steps_that_the_loss_scaler_skips_are_no_failure(tmp_path):
    engine, metrics = StandIn([4.0, 2.0, math.nan], [math.inf, 1.0, math.inf]), recorder()
    engine.skips_overflows = True
    with pytest.raises(UserError, match="norm is inf at step 3"):  # but a loss that is NaN is
        run_loop(tmp_path, engine, 4, metrics)
    values = [call.args[1] for call in metrics.write.call_args_list]
    assert [(v["train/loss"], v["optim/skipped_steps"]) for v in values] == [(None, 1), (2.0, 1)]


@pytest.mark.parametrize("background", [False, True])
def test_a_run_goes_on_when_a_checkpoint_cannot_be_written(
    tmp_path, monkeypatch, caplog, background
):
    write = manager.write_files

    def full(partial: Path, files: Any) -> Any:
        if "04" in partial.name or "09" in partial.name:
            (partial / "weights.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(partial, files)

    monkeypatch.setattr(manager, "write_files", full)
    keep = Checkpoint(keep_last=9, background=background)
    assert run_loop(tmp_path, StandIn([1.0] * 6), 6, save_every=2, keep=keep)
    assert "step 4 cannot be written" in caplog.text
    assert "No space left on device (rank 0)" in caplog.text
    assert saved(tmp_path) == [2, 6]
    with pytest.raises(UserError, match="the checkpoint of step 9 cannot be written"):
        run_loop(tmp_path, StandIn([1.0] * 9), 9, keep=keep)
    assert saved(tmp_path) == [2, 6]
    assert not list(tmp_path.glob("checkpoints/.*"))  # the half is removed


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_waits(
    tmp_path, monkeypatch, caplog
):
    """That of step 2 is written at the third step's log line, and step 4's waits for it."""
    write, metrics, go_on = manager.write_files, recorder(), threading.Event()
    monkeypatch.setattr(manager, "write_files", lambda *what: go_on.wait(60) and write(*what))
    seen = {}

    def record(step: int, values: dict[str, float]) -> None:
        seen[step] = saved(tmp_path), values.get("perf/checkpoint_stall_seconds")
        if step == 4:
            threading.Timer(0.2, go_on.set).start()

    metrics.write.side_effect = record
    keep = Checkpoint(background=True, keep_last=2, keep_best=True)
    options = {"save_every": 2, "keep": keep, "validation": held_out_losses(0.1, 0.2, 0.3, 0.4)}
    with caplog.at_level(logging.INFO, logger="flux2_ds"):
        assert run_loop(tmp_path, StandIn([1.0] * 8), 8, metrics, **options)
    assert seen[3][0] == seen[4][0] == []
    assert 2 in seen[5][0]
    assert seen[2][1] is None and seen[4][1] is None
    assert 0 < seen[3][1] < 0.2 <= seen[5][1]
    assert caplog.text.count("waiting for step_00000002, which is still being written") == 1
    assert saved(tmp_path) == [2, 6, 8]


def test_an_error_loses_no_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    write = manager.write_files
    monkeypatch.setattr(manager, "write_files", lambda *what: time.sleep(0.3) or write(*what))
    engine = StandIn([1.0, 1.0, math.nan, 1.0])
    with pytest.raises(UserError, match="the loss is nan at step 3"):
        run_loop(tmp_path, engine, 4, save_every=2, keep=Checkpoint(background=True))
    assert saved(tmp_path) == [2]


def test_a_defect_in_the_writing_thread_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "write_files", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        run_loop(tmp_path, StandIn([1.0] * 9), 9, save_every=2, keep=Checkpoint(background=True))


def test_dropout_is_a_function_of_seed_step_and_rank():
    def dropped(*place: int) -> list[float]:
        seed_dropout(*place)
        return torch.rand(4).tolist()

    with torch.random.fork_rng(devices=[]):
        first = dropped(3, 7, 1)
        others = [dropped(*place) for place in ((4, 7, 1), (3, 8, 1), (3, 7, 0), (7, 3, 1))]
        assert dropped(3, 7, 1) == first
    assert first not in others


@pytest.mark.parametrize(
    ("settings", "product"),
    [
        ({}, "bf16"),
        ({"precision": "fp16"}, "bf16"),
        ({"precision": "fp32"}, "fp32"),
        ({"compute": "fp8", "method": "full"}, "fp8"),
        ({"base_weights": "nf4_fp8"}, "fp8"),
        ({"base_weights": "int8"}, "int8"),
        ({"base_weights": "nf4"}, "bf16"),
    ],
)
def test_mfu_is_of_the_peak_of_what_is_multiplied(tmp_path, settings, product):
    assert product_of(recipe_for(tmp_path, **settings)) == product


def test_every_series_is_documented_and_has_a_prefix(tmp_path):
    metrics = Metrics(tmp_path, Log(wandb="disabled"), config={}, resumed_at=0)
    assert run_loop(tmp_path, StandIn([1.0] * 2), 2, metrics)
    metrics.close()
    first, last = read_metrics(tmp_path / "metrics.jsonl")
    assert (last["train/loss"], last["data/repeats"]) == (1.0, pytest.approx(2 * 8 / 6))
    assert first["perf/tflops"] > 0 and first["perf/forward_seconds"] >= 0
    root = Path(train.__file__).parent
    sources = [root / "train.py", *root.glob("training/*.py"), root / "run/wandb_run.py"]
    prefixes = "train|validation|perf|memory|data|optim|samples"
    named = {n for p in sources for n in re.findall(rf'"((?:{prefixes})/\w+)"', p.read_text())}
    assert first.keys() - {"step", "train/loss_t75-100"} < named
    page = (root.parent / "docs/watching.md").read_text()
    assert not [name for name in sorted(named) if f"`{name}`" not in page]
