"""Metrics on disk, the plot of the loss, and Weights & Biases without a network."""

import json
import logging
import os
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from flux2_ds.config.recipe import Log
from flux2_ds.errors import UserError
from flux2_ds.run import wandb_run
from flux2_ds.run.metrics import (
    METRICS_NAME,
    Metrics,
    Values,
    check_metrics,
    draw_loss,
    metrics_digest,
    read_metrics,
)
from flux2_ds.run.wandb_run import STEP, check_trackers, log_export


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, an empty home, and a server address that nothing answers on."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield
    os.environ.pop("WANDB_DATA_DIR", None)  # which a run sets


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "cats"
    path.mkdir()
    return path


def start(
    run_dir: Path, mode: Any = "disabled", resumed_at: int = 0, watch: Any = None, **settings: Any
) -> Metrics:
    return Metrics(
        run_dir,
        Log(wandb=mode, **settings),
        config={"seed": 0, "derived": {"world_size": 2}},
        resumed_at=resumed_at,
        **(watch or {}),
    )


def record(metrics: Metrics, *steps: int, loss: float = 1.0) -> None:
    for step in steps:
        metrics.write(
            step, {"train/loss": loss, "train/gradient_norm": None, "data/bucket": "64x64"}
        )


def steps_in(run_dir: Path) -> list[int]:
    return [values["step"] for values in read_metrics(run_dir / METRICS_NAME)]


def test_a_record_is_on_disk_at_once(run_dir):
    metrics = start(run_dir)
    record(metrics, 10, loss=0.5)
    assert read_metrics(run_dir / METRICS_NAME) == [
        {"step": 10, "train/loss": 0.5, "train/gradient_norm": None, "data/bucket": "64x64"}
    ]
    metrics.close()


def test_the_report_is_written_anew_while_training(run_dir):
    metrics = start(run_dir)
    (run_dir / "recipe.yaml").write_text("steps: 30\nlog: {every: 10}\n")
    record(metrics, 10)
    metrics.saved(10, run_dir)
    first = metrics._reporter
    metrics.saved(20, run_dir)
    assert metrics._reporter is first  # one at a time
    assert first.wait(60) == 0
    assert "10 of 30 steps" in (run_dir / "report.html").read_text()
    (run_dir / "recipe.yaml").write_text("- damaged\n")
    metrics.show(30, [])
    second = metrics._reporter
    assert second is not first and second.wait(60) == 2  # and nothing of it comes here
    metrics.show(30, [])
    metrics.close()
    assert metrics._reporter.returncode is not None


@pytest.mark.parametrize(
    ("resumed_at", "left"), [(0, []), (20, [10, 20]), (25, [10, 20]), (90, [10, 20, 30])]
)
def test_records_after_the_step_of_the_checkpoint_are_cut(run_dir, resumed_at, left):
    metrics = start(run_dir)
    record(metrics, 0, 10, 20, 30)
    metrics.close()
    resumed = start(run_dir, resumed_at=resumed_at)
    left = [0, *left] if left else []  # what is measured before step 1 is measured again
    assert steps_in(run_dir) == left
    record(resumed, 100)
    resumed.close()
    assert steps_in(run_dir) == [*left, 100]


def test_line_that_a_crash_cut_short_does_not_stop_the_run(run_dir):
    path = run_dir / METRICS_NAME
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    assert steps_in(run_dir) == [10]  # also to who only reads
    resumed = start(run_dir, resumed_at=10)
    record(resumed, 20)
    resumed.close()
    assert steps_in(run_dir) == [10, 20]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that has so many bytes for a file, as far as the file's writer can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_once_and_records_come_when_there_is_room(run_dir, caplog):
    metrics = start(run_dir)
    record(metrics, 10)
    size = (run_dir / METRICS_NAME).stat().st_size
    with files_of_at_most(size + 20):  # the next record is cut in two
        record(metrics, 20, 30)
        assert steps_in(run_dir) == [10]
    assert caplog.text.count("cannot be written") == 1
    record(metrics, 40)
    assert steps_in(run_dir) == [10, 20, 30, 40]
    with files_of_at_most(0):
        record(metrics, *range(50, 5000, 10))  # more than can be kept
    assert caplog.text.count("cannot be written") == 2
    record(metrics, 5000)
    steps = steps_in(run_dir)
    assert steps == sorted(set(steps)) and steps[-1] == 5000
    with files_of_at_most(0):
        metrics.close()
    assert "the loss curve cannot be written" in caplog.text


def test_nothing_is_imported_that_is_not_switched_on(run_dir):
    """wandb may be missing; matplotlib is for the end."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom flux2_ds.run.metrics import Log, Metrics\n"
        "m = Metrics(Path(sys.argv[1]), Log(wandb='disabled'), config={}, resumed_at=0)\n"
        "m.write(1, {'train/loss': 1.0})\n"
        "print([name for name in ('wandb', 'matplotlib') if name in sys.modules])"
    )
    argv = [sys.executable, "-c", program, str(run_dir)]
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"


def test_trackers_that_are_missing_are_refused_where_they_are_wanted(monkeypatch):
    check_trackers(Log(tensorboard=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(Log(wandb="disabled"))
    with pytest.raises(UserError, match=r"log\.wandb is offline, but the package wandb is not"):
        check_trackers(Log())
    with pytest.raises(UserError, match=r"log\.tensorboard is true, .*flux2-ds\[tensorboard\]"):
        check_trackers(Log(wandb="disabled", tensorboard=True))


def draw(run_dir: Path, losses: list[float]) -> np.ndarray:
    (run_dir / METRICS_NAME).write_text(
        "".join(json.dumps({"step": n, "train/loss": x}) + "\n" for n, x in enumerate(losses))
    )
    with Image.open(draw_loss(run_dir)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_loss_is_drawn(run_dir):
    falling = draw(run_dir, [1 / n for n in range(1, 40)])
    assert falling.shape[1] > 400
    rising = draw(run_dir, [1 - 1 / n for n in range(1, 40)])
    difference = (falling != rising).any(axis=2)
    assert difference.mean() > 0.005  # another curve in the same frame


@pytest.mark.parametrize("count", [0, 1])
def test_loss_of_a_run_without_steps_is_drawn(run_dir, count):
    odd = run_dir / "cost$_$"  # no formula
    odd.mkdir()
    assert draw(odd, [1.0] * count).shape[1] > 400


def saved_by_wandb(run_dir: Path) -> bytes:
    """What W&B has written down, of all starts."""
    return b"".join(
        path.read_bytes() for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    )


@pytest.mark.parametrize(
    ("recipe", "variable", "message"),
    [
        ("online", None, "no W&B API key is set"),
        ("online", "offline", "W&B is offline by the environment variable WANDB_MODE"),
        ("offline", "online", ""),
    ],
)
def test_wandb_that_is_not_online_keeps_everything(
    run_dir, caplog, monkeypatch, recipe, variable, message
):
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    image = run_dir / "0.png"
    Image.new("RGB", (16, 8)).save(image)
    with caplog.at_level(logging.INFO, logger="flux2_ds"):
        metrics = start(run_dir, mode=recipe)
        record(metrics, 10)
        metrics.show(10, [("a cat on a mat", image)])
        metrics.close()
    assert message in caplog.text
    assert "W&B failed" not in caplog.text
    assert steps_in(run_dir) == [10]
    (copy,) = run_dir.glob("wandb/offline-run-*/files/media/images/samples/*.png")
    assert copy.read_bytes() == image.read_bytes()
    saved = saved_by_wandb(run_dir)
    for text in (b"optimizer_step", b"64x64", b"a cat on a mat"):
        assert text in saved
    assert b"train/gradient_norm" not in saved  # None


def test_wandb_mode_may_disable_it(run_dir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    metrics = start(run_dir, mode="online")
    record(metrics, 10)
    metrics.close()
    assert steps_in(run_dir) == [10]
    assert saved_by_wandb(run_dir) == b""


class Refuses(BaseHTTPRequestHandler):
    """A W&B server that does not know the key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def refusing_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("answer", ["none", "401"])
def test_wandb_that_cannot_be_reached_stays_offline_and_ends_no_run(
    run_dir, caplog, monkeypatch, refusing_server, answer
):
    monkeypatch.setattr(wandb_run, "_START", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if answer == "401":
        monkeypatch.setenv("WANDB_BASE_URL", refusing_server)
    for resumed_at in (0, 10):
        metrics = start(run_dir, "online", resumed_at)
        record(metrics, resumed_at + 10)
        metrics.close()
        time.sleep(1.1)  # W&B names a start's folder by the second
    assert caplog.text.count("W&B cannot be reached") == 2
    assert "W&B failed" not in caplog.text
    assert steps_in(run_dir) == [10, 20]
    identity = (run_dir / "wandb_id").read_text()
    assert len(list(run_dir.glob(f"wandb/offline-run-*-{identity}"))) == 2
    assert b"64x64" in saved_by_wandb(run_dir)


def test_a_wandb_that_fails_in_any_other_way_ends_no_run(run_dir, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    (run_dir / "wandb_id").write_text("no/id at all")
    metrics = start(run_dir, "offline", resumed_at=10)
    record(metrics, 20)
    metrics.close()
    assert caplog.text.count("W&B failed") == 1
    assert steps_in(run_dir) == [20]


SERVICE_IS_LOST = """\
import os, signal, sys, time
from pathlib import Path
import psutil
from flux2_ds.run import metrics, wandb_run
wandb_run._FINISH, wandb_run._MARGIN = 2.0, 1.0
m = metrics.Metrics(Path(sys.argv[1]), metrics.Log(), config={}, resumed_at=0)
m.write(10, {"train/loss": 1.0})
while not list(Path(sys.argv[1]).glob("wandb/*/*.wandb")):
    time.sleep(0.05)
time.sleep(0.5)
for child in psutil.Process().children():
    child.send_signal(getattr(signal, sys.argv[2]))
for step in range(20, 200, 10):
    m.write(step, {"train/loss": 1.0})
m.close()
"""


@pytest.mark.parametrize(
    ("number", "message"), [("SIGKILL", "W&B failed"), ("SIGSTOP", "W&B does not end")]
)
def test_a_wandb_service_that_is_lost_later_ends_no_run(run_dir, number, message):
    argv = [sys.executable, "-c", SERVICE_IS_LOST, str(run_dir), number]
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=root, timeout=240)
    assert done.returncode == 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert steps_in(run_dir) == list(range(10, 200, 10))


def test_a_resumed_run_is_the_same_wandb_run(run_dir):
    def identity(resumed_at: int = 0) -> str:
        start(run_dir, "offline", resumed_at).close()
        return (run_dir / "wandb_id").read_text()

    first = identity()
    assert first
    assert identity(resumed_at=10) == first
    # Two of one second: W&B numbers the second.
    assert len(list(run_dir.glob(f"wandb/offline-run-*-{first}*"))) == 2
    assert identity() != first  # after a try that left no checkpoint


def test_lost_records_are_said(run_dir, caplog):
    metrics = start(run_dir)
    record(metrics, 10, 20)
    saved = metrics_digest(run_dir)
    record(metrics, 30)
    metrics.close()
    start(run_dir, resumed_at=20).close()
    check_metrics(run_dir, saved)
    assert caplog.text == ""
    path = run_dir / METRICS_NAME
    content = path.read_text()
    for damaged in ("", content[: len(content) // 2], content.replace("1.0", "1.5")):
        path.write_text(damaged)
        check_metrics(run_dir, saved)
    path.unlink()
    check_metrics(run_dir, saved)
    assert caplog.text.count("metrics.jsonl is damaged: records up to the checkpoint") == 4


def test_damaged_lines_are_said_and_passed_over(run_dir, caplog):
    metrics = start(run_dir)
    record(metrics, 10, 20, 30, 40)
    metrics.close()
    path = run_dir / METRICS_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff\x00\n" + b"[1]\n" + b"[" * 10000 + b"\n" + lines[2])
    start(run_dir, resumed_at=30).close()
    assert steps_in(run_dir) == [10, 30]
    assert "3 damaged lines are passed over" in caplog.text


def wandb_records(run_dir: Path) -> Iterator[Any]:
    """Every record that W&B has written down, of all starts: LevelDB's log format, of W&B's own protobuf."""
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        content, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if (left := 32768 - at % 32768) < 7:  # the end of a block has no room for a header
                at += left
                continue
            _, size, kind = struct.unpack("<IHB", content[at : at + 7])
            whole += content[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # all of a record, or the last part of it
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                whole = b""
                yield record


def wandb_series(run_dir: Path) -> dict[str, list[tuple[int, Any]]]:
    """Step and value of every series."""
    series: dict[str, list[tuple[int, Any]]] = {}
    for record in wandb_records(run_dir):
        items = {tuple(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for (name, *rest), value in items.items():
            if not name.startswith("_") and name != STEP and rest in ([], ["_type"]):
                series.setdefault(name, []).append((items[STEP,], value))
    return series


def test_an_offline_run_reads_back_with_every_series(run_dir):
    settings: dict[str, Any] = {
        **{"project": "p", "entity": "me", "group": "g", "name": "n", "tags": ["a", "b"]},
        **{"notes": "why", "alerts": True, "artifacts": ["checkpoints", "exports"]},
    }
    metrics = start(run_dir, "offline", **settings)
    image, checkpoint = run_dir / "0.png", run_dir / "step_2"
    Image.new("RGB", (16, 8)).save(image)
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("w")
    for step in (1, 2):
        values: Values = {"train/loss": 1 / step, "data/bucket": "64x64", "perf/mfu": None}
        metrics.write(step, values | {"memory/rank_gib": [1.0, 2.0]})
        metrics.show(step, [("a cat", image), ("a dog", image)])
    metrics.saved(2, checkpoint)
    metrics.saved(3, run_dir / "step_3")  # which retention has removed
    metrics.alert("a step is skipped", "the gradient norm is nan at https://s.example/x?key=secret")
    metrics.close()
    log_export(Log(**settings), run_dir, [image, checkpoint / "weights"], 2)

    series = wandb_series(run_dir)
    assert series.pop("samples/images") == [(1, "images/separated"), (2, "images/separated")]
    assert series.pop("samples/previews") == [(1, "table-file"), (2, "table-file")]
    assert series == {"train/loss": [(1, 1), (2, 0.5)], "data/bucket": [(1, "64x64"), (2, "64x64")]}
    records = list(wandb_records(run_dir))
    run, again = [r.run for r in records if r.HasField("run")]
    assert (run.project, run.entity, run.run_group, run.display_name) == ("p", "me", "g", "n")
    assert (list(run.tags), run.notes, again.run_id) == (["a", "b"], "why", run.run_id)
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert (config["seed"], config["derived"]) == (0, {"world_size": 2})
    hidden = {r.metric.name for r in records if r.HasField("metric") and r.metric.options.hidden}
    assert hidden == {"optimizer_step"}
    best = {r.metric.name for r in records if r.HasField("metric") and r.metric.summary.min}
    assert best == {"train/loss", "validation/loss"}
    (alert,) = [r.alert for r in records if r.HasField("alert")]
    assert alert.title == "a step is skipped" and "secret" not in alert.text
    kinds = [
        r.artifact for r in records if r.HasField("artifact") and r.artifact.type != "run_table"
    ]
    assert [(a.type, sorted(a.aliases), [c.path for c in a.manifest.contents]) for a in kinds] == [
        ("checkpoint", ["latest", "step_2"], ["weights"]),
        ("export", ["latest", "step_2"], ["0.png", "weights"]),
    ]
    # All that is needed to send it later is in the run directory.
    assert all(Path(a.manifest.contents[0].local_path).is_relative_to(run_dir) for a in kinds)


def test_alerts_and_artifacts_are_for_those_who_ask(run_dir):
    metrics = start(run_dir, "offline", watch={"stall": lambda: (9.0, "x"), "patience": 0.0})
    metrics.alert("a", "b")
    metrics.saved(1, run_dir)
    metrics.close()
    log_export(Log(), run_dir, [run_dir], 1)
    kinds = {record.WhichOneof("record_type") for record in wandb_records(run_dir)}
    assert "run" in kinds and not kinds & {"alert", "artifact"}


def test_a_stall_is_told_once(run_dir, monkeypatch):
    monkeypatch.setattr(wandb_run, "_LOOK", 0.05)
    stalls = iter([(0.0, "")] + [(9.0, "rank 0 on node, computing in step 7")] * 3)
    looked = threading.Event()

    def stall() -> tuple[float, str]:
        found = next(stalls, None)
        if found is None:
            looked.set()
        return found or (0.0, "")

    metrics = start(run_dir, "offline", watch={"stall": stall, "patience": 5.0}, alerts=True)
    assert looked.wait(60)
    metrics.close()
    (alert,) = [r.alert for r in wandb_records(run_dir) if r.HasField("alert")]
    assert alert.text == "none for 9 s: rank 0 on node, computing in step 7"


def test_the_last_alert_of_a_run_is_sent_before_its_process_ends(run_dir, monkeypatch):
    monkeypatch.setattr(wandb_run, "_ALERT", 60.0)  # W&B has only just been asked to start
    metrics = start(run_dir, "offline", alerts=True)
    metrics.alert("the run has ended", "the loss is nan at step 4", last=True)
    # Without close(), which an error leaves out; W&B's service writes down what it has taken.
    deadline = time.monotonic() + 60
    while not any(r.HasField("exit") for r in wandb_records(run_dir)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    records = list(wandb_records(run_dir))
    assert [r.alert.text for r in records if r.HasField("alert")] == ["the loss is nan at step 4"]
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1]


def test_the_loss_is_smoothed_over_the_last_tenth_also_after_a_resume(run_dir):
    metrics = start(run_dir)
    for step in range(1, 101):
        smoothed = metrics.smoothed(float(step))
        metrics.write(step, {"train/loss": float(step), "train/loss_smoothed": smoothed})
    assert smoothed == pytest.approx(95.5)  # of 91 to 100
    metrics.close()
    resumed = start(run_dir, resumed_at=4)
    assert resumed.smoothed(None) == 2.5
    assert resumed.smoothed(5.0) == 3.0
    resumed.close()


def tensorboard(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), {"images": 0, "scalars": 0}).Reload()


def test_tensorboard_has_every_point_once_also_after_a_resume(run_dir):
    image = run_dir / "0.png"
    Image.new("RGB", (16, 8)).save(image)
    for resumed_at, steps in ((0, (10, 20, 30)), (20, (30, 40))):  # killed after 30, saved at 20
        metrics = start(run_dir, resumed_at=resumed_at, tensorboard=True)
        if resumed_at == 0:
            metrics.show(0, [("a cat", image)])
        record(metrics, *steps, loss=float(resumed_at))
        metrics.close()
    found = tensorboard(run_dir)
    points = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert points == [(10, 0.0), (20, 0.0), (30, 20.0), (40, 20.0)]
    assert found.Tags()["scalars"] == ["train/loss"]  # no text, and nothing that is None
    assert [event.step for event in found.Images("samples/0: a cat")] == [0]
    record(start(run_dir, resumed_at=0, tensorboard=True), 1)  # from the beginning
    again = tensorboard(run_dir)
    assert [event.step for event in again.Scalars("train/loss")] == [1]
    assert again.Images("samples/0: a cat") == []


def test_a_tensorboard_that_fails_ends_no_run(run_dir, caplog):
    (run_dir / "tensorboard").touch()  # no folder can be made
    metrics = start(run_dir, tensorboard=True)
    record(metrics, 10, 20)
    metrics.close()
    assert caplog.text.count("TensorBoard failed") == 1
    assert steps_in(run_dir) == [10, 20]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_tensorboard_ends_no_run(run_dir, caplog):
    metrics = start(run_dir, tensorboard=True)
    record(metrics, 10)
    with files_of_at_most(0):
        record(metrics, 20, 30)
    metrics.close()
    assert caplog.text.count("TensorBoard failed") == 1
    assert steps_in(run_dir) == [10, 20, 30]
