"""Where numbers go beside the console: metrics.jsonl, Weights & Biases and a plot of the loss.

The only file that imports wandb, and only where it is switched on. W&B gets what metrics.jsonl gets.
Neither decides whether a run goes on: what fails is said, and training continues without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import threading
import uuid
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import psutil

from flux2_ds.errors import UserError
from flux2_ds.run.atomic import atomic_path, atomic_write_text
from flux2_ds.run.logging import open_log

log = logging.getLogger("flux2_ds")

Mode = Literal["online", "offline", "disabled"]
Values = dict[str, float | str | None]

METRICS_NAME = "metrics.jsonl"
_WANDB_ID = "wandb_id"
_START, _FINISH, _MARGIN = 60.0, 120.0, 30.0
"""s that W&B gets to start, to send its last records, and to end then; what is not sent stays in wandb/."""


def check_wandb(mode: Mode) -> None:
    """Refuse W&B where it is not installed."""
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb is {mode}, but the package wandb is not installed. Install it, or set "
            "log.wandb: disabled."
        )


class Metrics:
    """Writes the metrics of one run; rank 0 has it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: Mode,
        project: str,
        config: dict[str, Any],
        resumed_at: int,
    ) -> None:
        self._run_dir = run_dir
        path = run_dir / METRICS_NAME
        _cut_after(path, resumed_at)
        if resumed_at == 0:  # what an earlier try sent to W&B is not part of this run
            (run_dir / _WANDB_ID).unlink(missing_ok=True)
        self._stream = open_log(path)
        self._full = False
        self._wandb = None if mode == "disabled" else WandbRun(run_dir, mode, project, config)

    def write(self, step: int, values: Values) -> None:
        """Record values for `step`, on disk at once; on a full disk when there is room again."""
        try:
            self._stream.write(json.dumps({"step": step, **values}) + "\n")
            self._stream.flush()  # what it cannot write it keeps for later, complete, up to 8 KiB
            self._full = False
        except OSError as error:
            if not self._full:
                log.warning("%s cannot be written (%s); training goes on", self._stream.name, error)
            self._full = True
        if self._wandb is not None:
            known = {name: value for name, value in values.items() if value is not None}
            self._wandb.log({"optimizer_step": step, **known})

    def show(self, step: int, images: list[tuple[str, Path]]) -> None:
        """Give W&B images that are on disk, each with its caption."""
        if self._wandb is not None and images:
            self._wandb.log({"optimizer_step": step, "previews": images})

    def close(self) -> None:
        """Close the file, plot the loss and finish the W&B run."""
        try:
            self._stream.close()
        except OSError as error:
            log.warning("%s: the last records cannot be written: %s", self._stream.name, error)
        _try_to_draw_loss(self._run_dir)
        if self._wandb is not None:
            self._wandb.finish()


class WandbRun:
    """A W&B run in a thread of its own, so that nothing that happens to it reaches the training."""

    def __init__(self, run_dir: Path, mode: Mode, project: str, config: dict[str, Any]) -> None:
        self._queue: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._settings: dict[str, Any] = {
            "project": project,
            "name": run_dir.name,
            "config": config,
        }
        self._run_dir, self._mode = run_dir, mode
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def log(self, values: dict[str, Any]) -> None:
        """Send values, among them images as pairs of caption and path, when W&B takes them."""
        if self._thread.is_alive():
            self._queue.put(values)

    def finish(self) -> None:
        """Wait until W&B has taken everything, but not for ever."""
        self._queue.put(None)
        self._thread.join(_FINISH + _MARGIN)
        if self._thread.is_alive():
            log.warning("W&B does not end; what it has not sent is in %s", self._run_dir / "wandb")
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if child.name().startswith("wandb"):
                        child.kill()
            self._thread.join(_MARGIN)

    def _serve(self) -> None:
        import wandb

        try:
            run = self._start()
            while run is not None and (values := self._queue.get()) is not None:
                if "previews" in values:
                    images = [wandb.Image(str(path), caption=c) for c, path in values["previews"]]
                    values = values | {"previews": images}
                run.log(values)
            if run is not None:
                run.finish()
        except Exception as error:  # of any type: wandb's, its service's, the network's
            log.warning("W&B failed (%s); the run goes on without it", _first_line(error))
        with contextlib.suppress(Exception):  # or it would do this at exit, and wait for a service
            wandb.teardown()  # that is gone

    def _start(self) -> Any:
        """The W&B run, offline where it cannot be online; None if WANDB_MODE disables it."""
        import wandb

        mode, given = self._mode, os.environ.get("WANDB_MODE", "")
        if given in ("offline", "dryrun", "disabled") and given != mode:
            log.info("W&B is %s by the environment variable WANDB_MODE", given)
            mode = "offline"
        if given == "disabled":
            return None
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            log.warning("log.wandb is online but no W&B API key is set; the W&B run stays offline")
            mode = "offline"
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            run = self._init(mode)
        except Exception as error:
            if mode == "offline":
                raise
            log.warning("W&B cannot be reached (%s); its run stays offline", _first_line(error))
            wandb.teardown()  # frees the run's id
            run = self._init("offline")
        # Our own step axis: W&B's would drop what a run repeats after a kill.
        run.define_metric("*", step_metric="optimizer_step")
        return run

    def _init(self, mode: Mode) -> Any:
        import wandb

        settings = wandb.Settings(console="off", init_timeout=_START, finish_timeout=_FINISH)
        return wandb.init(
            **self._settings,
            id=_wandb_id(self._run_dir),
            resume="allow",
            dir=self._run_dir,
            mode=mode,
            settings=settings,
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; a line that a kill cut short is none."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines and their records."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    found, damaged = [], 0
    for line in lines:
        try:
            record = json.loads(line)
            float(record["step"])
        except (ValueError, LookupError, TypeError, RecursionError):
            damaged += line.endswith("\n")
        else:
            if line.endswith("\n"):
                found.append((line, record))
    if damaged:
        log.warning("%s: %d damaged lines are passed over", path, damaged)
    return found


def _cut_after(path: Path, step: int) -> None:
    """Drop records after `step`, of step 0 with it: they are made again."""
    if path.exists():
        kept = [line for line, record in _records(path) if step and record["step"] <= step]
        atomic_write_text(path, "".join(kept))


def metrics_digest(run_dir: Path, size: int = -1) -> dict[str, Any]:
    """Size and sha256 of metrics.jsonl, or of its first `size` bytes, for checkpoints."""
    try:
        with (run_dir / METRICS_NAME).open("rb") as stream:
            content = stream.read(size)
    except FileNotFoundError:
        content = b""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def check_metrics(run_dir: Path, saved: dict[str, Any]) -> None:
    """Say so if metrics.jsonl no longer begins with what it was when a checkpoint was saved."""
    if metrics_digest(run_dir, saved["bytes"]) != saved:
        path = run_dir / METRICS_NAME
        log.warning("%s is damaged: records up to the checkpoint are lost or changed", path)


def draw_loss(run_dir: Path) -> Path:
    """Plot metrics.jsonl in loss.png: each record, and a running mean over the last tenth."""
    from matplotlib.figure import Figure  # half a second, not needed until the end

    records = read_metrics(run_dir / METRICS_NAME)
    # Between two log lines every step may have been skipped.
    points = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    window = max(1, len(losses) // 10)
    means = [
        sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))
    ]
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    axes.plot(steps, losses, linewidth=0.8, alpha=0.45, label="loss")
    axes.plot(steps, means, linewidth=1.8, label=f"mean of {window} records")
    validated = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", markersize=3, label="held-out samples")
    axes.set(xlabel="optimizer step", ylabel="flow-matching loss", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path = run_dir / "loss.png"
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")
    return path


def draw_loss_if_missing(run_dir: Path) -> None:
    """Make up for a start that was killed between its last step and its end."""
    if (run_dir / METRICS_NAME).is_file() and not (run_dir / "loss.png").is_file():
        _try_to_draw_loss(run_dir)


def _try_to_draw_loss(run_dir: Path) -> None:
    try:
        log.info("loss curve in %s", draw_loss(run_dir))
    except OSError as error:
        log.warning("the loss curve cannot be written: %s", error)


def _wandb_id(run_dir: Path) -> str:
    """The run's W&B id, kept in the run directory so that a resumed run is one run."""
    path = run_dir / _WANDB_ID
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        kept = uuid.uuid4().hex[:8]
        atomic_write_text(path, kept)
    return kept


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
