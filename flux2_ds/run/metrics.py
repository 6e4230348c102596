"""Where numbers go beside the console: metrics.jsonl, Weights & Biases, TensorBoard and a plot of the loss.

The trackers get what metrics.jsonl gets; docs/watching.md has all names. Nothing here decides whether a run goes on: what
fails is said, and training continues without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from flux2_ds.config.recipe import Log
from flux2_ds.errors import MALFORMED
from flux2_ds.run.atomic import atomic_path, atomic_write_text
from flux2_ds.run.logging import open_log
from flux2_ds.run.tensorboard import TensorBoard
from flux2_ds.run.wandb_run import WANDB_ID, Stall, WandbRun

log = logging.getLogger("flux2_ds")

Values = dict[str, float | str | list[float] | None]
"""Numbers by name; a list has one for each rank, and the trackers do without."""

METRICS_NAME = "metrics.jsonl"


class Metrics:
    """Writes the metrics of one run; rank 0 has it.

    `config`: what W&B shows of the run. `stall` and `patience`: as `WandbRun` takes them.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: Log,
        *,
        config: dict[str, Any],
        resumed_at: int,
        stall: Stall = lambda: (0.0, ""),
        patience: float = 0.0,
    ) -> None:
        self._run_dir, self._settings = run_dir, settings
        path = run_dir / METRICS_NAME
        _cut_after(path, resumed_at)
        if resumed_at == 0:  # what an earlier try sent to W&B is not part of this run
            (run_dir / WANDB_ID).unlink(missing_ok=True)
        records = read_metrics(path)
        self._losses = [r["train/loss"] for r in records if r.get("train/loss") is not None]
        self._reporter: subprocess.Popen[bytes] | None = None
        self._stream = open_log(path)
        self._full = False
        self._wandb = None
        if settings.wandb != "disabled":
            self._wandb = WandbRun(run_dir, settings, config, stall, patience)
        board = TensorBoard(run_dir, config, resumed_at) if settings.tensorboard else None
        self._trackers = [tracker for tracker in (self._wandb, board) if tracker is not None]

    def smoothed(self, loss: float | None) -> float | None:
        """Mean of the losses on record, `loss` being the next: of the last tenth, and at least five."""
        if loss is not None:
            self._losses.append(loss)
        recent = self._losses[-max(5, len(self._losses) // 10) :]
        return statistics.fmean(recent) if recent else None

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
        for tracker in self._trackers:
            tracker.log(step, {n: v for n, v in values.items() if isinstance(v, int | float | str)})

    def show(self, step: int, images: list[tuple[str, Path]]) -> None:
        """Give the trackers images that are on disk, each with its prompt."""
        for tracker in self._trackers:
            tracker.log_previews(step, images)
        self._refresh_report()

    def saved(self, step: int, checkpoint: Path) -> None:
        """Give W&B a checkpoint, if it is to have them."""
        if self._wandb is not None and "checkpoints" in self._settings.artifacts:
            self._wandb.log_artifact("checkpoint", [checkpoint], step)
        self._refresh_report()

    def alert(self, title: str, text: str, *, last: bool = False) -> None:
        """Have W&B tell the user; `last`: the run ends."""
        if self._wandb is not None:
            self._wandb.alert(title, text, last=last)

    def close(self) -> None:
        """Close the file, plot the loss and finish the W&B run."""
        try:
            self._stream.close()
        except OSError as error:
            log.warning("%s: the last records cannot be written: %s", self._stream.name, error)
        _try_to_draw_loss(self._run_dir)
        for tracker in self._trackers:
            tracker.finish()
        if self._reporter is not None:  # the last report is the run's own
            self._reporter.kill()
            self._reporter.wait()

    def _refresh_report(self) -> None:
        """Have a process of its own write report.html anew, unless one is at it: images take seconds."""
        if self._reporter is None or self._reporter.poll() is not None:
            report = [sys.executable, "-m", "flux2_ds.commands.report", "--run", str(self._run_dir)]
            with contextlib.suppress(OSError):  # no memory, no processes: the report is older then
                self._reporter = subprocess.Popen(
                    ["nice", *report],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl, if there is one; a line that a kill cut short is none."""
    return [record for _, record in _records(path)] if path.is_file() else []


def best_held_out(records: list[dict[str, Any]]) -> tuple[int, float] | None:
    """Step and value of the lowest held-out loss, if there is one."""
    losses = [
        (r["step"], loss)
        for r in records
        if math.isfinite(loss := r.get("validation/loss", math.inf))
    ]
    return min(losses, key=lambda point: point[1], default=None)


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines and their records."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    found, damaged = [], 0
    for line in lines:
        try:
            record = dict(json.loads(line))
            float(record["step"])
        except MALFORMED:
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
    """Plot metrics.jsonl in loss.png: each record, smoothed, and held out."""
    from matplotlib.figure import Figure  # half a second, not needed until the end

    records = read_metrics(run_dir / METRICS_NAME)
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    for name, label, style in (
        ("train/loss", "loss", {"linewidth": 0.8, "alpha": 0.45}),
        ("train/loss_smoothed", "loss, smoothed", {"linewidth": 1.8}),
        ("validation/loss", "held-out samples", {"marker": "o", "markersize": 3}),
    ):
        # Between two log lines every step may have been skipped.
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="flow-matching loss")
    axes.set_title(run_dir.name, parse_math=False)  # a $ is a $
    axes.grid(alpha=0.3)
    if axes.lines:
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
