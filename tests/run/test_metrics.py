"""Metrics on disk, the picture of the loss, and Weights & Biases without a network."""

import json
import logging
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import wandb
from PIL import Image

from flux2_ds.errors import UserError
from flux2_ds.run.metrics import METRICS_NAME, Metrics, check_wandb, draw_loss, read_metrics


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, an empty home, and a server address that nothing answers on."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "cats"
    path.mkdir()
    return path


def start(run_dir: Path, mode: str = "disabled", resumed_at: int = 0) -> Metrics:
    return Metrics(run_dir, mode=mode, project="tests", config={"seed": 0}, resumed_at=resumed_at)


def record(metrics: Metrics, *steps: int, loss: float = 1.0) -> None:
    for step in steps:
        metrics.write(step, {"loss": loss, "gradient_norm": None, "bucket": "64x64"})


def steps_in(run_dir: Path) -> list[int]:
    return [values["step"] for values in read_metrics(run_dir / METRICS_NAME)]


def test_a_record_is_on_disk_at_once(run_dir):
    metrics = start(run_dir)
    record(metrics, 10, loss=0.5)
    assert read_metrics(run_dir / METRICS_NAME) == [
        {"step": 10, "loss": 0.5, "gradient_norm": None, "bucket": "64x64"}
    ]
    metrics.close()


@pytest.mark.parametrize(
    ("resumed_at", "left"), [(0, []), (20, [10, 20]), (25, [10, 20]), (90, [10, 20, 30])]
)
def test_records_after_the_step_of_the_checkpoint_are_cut(run_dir, resumed_at, left):
    metrics = start(run_dir)
    record(metrics, 10, 20, 30)
    metrics.close()
    resumed = start(run_dir, resumed_at=resumed_at)
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
        "import sys\nfrom pathlib import Path\nfrom flux2_ds.run.metrics import Metrics\n"
        "m = Metrics(Path(sys.argv[1]), mode='disabled', project='', config={}, resumed_at=0)\n"
        "m.write(1, {'loss': 1.0})\n"
        "print([name for name in ('wandb', 'matplotlib') if name in sys.modules])"
    )
    argv = [sys.executable, "-c", program, str(run_dir)]
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"


def test_wandb_that_is_missing_is_refused_where_it_is_wanted(monkeypatch):
    check_wandb("online")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_wandb("disabled")
    with pytest.raises(UserError, match=r"log\.wandb is offline, but the package wandb is not"):
        check_wandb("offline")


def draw(run_dir: Path, losses: list[float]) -> np.ndarray:
    (run_dir / METRICS_NAME).write_text(
        "".join(json.dumps({"step": n, "loss": x}) + "\n" for n, x in enumerate(losses))
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
    assert draw(run_dir, [1.0] * count).shape[1] > 400


def test_online_without_a_key_stays_offline_and_says_so(run_dir, caplog):
    with caplog.at_level(logging.WARNING, logger="flux2_ds"):
        metrics = start(run_dir, mode="online")
    assert "stays offline" in caplog.text
    record(metrics, 10)
    metrics.close()
    assert list((run_dir / "wandb").glob("offline-run-*"))
    assert steps_in(run_dir) == [10]


@pytest.mark.parametrize("kind", ["CommError", "UsageError", "AuthenticationError"])
def test_wandb_that_does_not_start_leaves_the_run_offline(run_dir, caplog, monkeypatch, kind):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    modes = []
    init = wandb.init

    def refused_online(**arguments: object) -> object:
        modes.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise getattr(wandb.errors, kind)("no route to host")
        return init(**{**arguments, "mode": "disabled"})

    monkeypatch.setattr(wandb, "init", refused_online)
    with caplog.at_level(logging.WARNING, logger="flux2_ds"):
        metrics = start(run_dir, mode="online")
    record(metrics, 10)
    metrics.close()
    assert modes == ["online", "offline"]
    assert "no route to host" in caplog.text
    assert steps_in(run_dir) == [10]


def test_wandb_is_told_the_step_as_a_value(run_dir, monkeypatch):
    run = Mock()
    monkeypatch.setattr(wandb, "init", lambda **arguments: run)
    metrics = start(run_dir, mode="offline")
    record(metrics, 10, loss=0.5)
    metrics.close()
    run.define_metric.assert_called_once_with("*", step_metric="optimizer_step")
    run.log.assert_called_once_with({"optimizer_step": 10, "loss": 0.5, "bucket": "64x64"})


def test_wandb_is_given_pictures_with_their_captions(run_dir, monkeypatch):
    run = Mock()
    monkeypatch.setattr(wandb, "init", lambda **arguments: run)
    Image.new("RGB", (16, 8)).save(run_dir / "0.png")
    start(run_dir, "offline").show(30, [("a cat", run_dir / "0.png")])
    (values,) = run.log.call_args.args
    (picture,) = values["previews"]
    assert values["optimizer_step"] == 30
    assert (picture._caption, picture.image.size) == ("a cat", (16, 8))
    start(run_dir).show(30, [("a cat", run_dir / "0.png")])  # without W&B nothing happens


def test_a_resumed_run_is_the_same_wandb_run(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **arguments: Mock())

    def identity(resumed_at: int = 0) -> str:
        start(run_dir, "offline", resumed_at).close()
        return (run_dir / "wandb_id").read_text()

    first = identity()
    assert first
    assert identity(resumed_at=10) == first
    assert identity() != first  # after a try that left no checkpoint
    other = tmp_path / "dogs"
    other.mkdir()
    start(other, mode="offline").close()
    assert (other / "wandb_id").read_text() != first
