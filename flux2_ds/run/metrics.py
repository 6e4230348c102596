"""Where numbers go beside the console: metrics.jsonl, Weights & Biases and a picture of the loss.

The only file that imports wandb, and only where it is switched on. W&B gets what metrics.jsonl gets.
Neither decides whether a run goes on: without a key W&B stays offline, and a full disk costs records,
which is said.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any, Literal

from flux2_ds.errors import UserError
from flux2_ds.run.atomic import atomic_write_text

log = logging.getLogger("flux2_ds")

Mode = Literal["online", "offline", "disabled"]

METRICS_NAME = "metrics.jsonl"
_WANDB_ID = "wandb_id"
_FINISH = 120.0
"""s that W&B gets to send its last records before the run ends without them; they stay in wandb/."""


def check_wandb(mode: Mode) -> None:
    """Refuse W&B where it is not installed.

    Raises:
        UserError: naming the setting.
    """
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb is {mode}, but the package wandb is not installed. Install it, or set "
            "log.wandb: disabled."
        )


class Metrics:
    """Writes the metrics of one run; one process of the run has it."""

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
        self._stream = path.open("a")
        self._full = False
        self._run = None if mode == "disabled" else _start_wandb(run_dir, mode, project, config)

    def write(self, step: int, values: dict[str, float | str | None]) -> None:
        """Record values for `step`, on disk at once; on a full disk when there is room again."""
        try:
            self._stream.write(json.dumps({"step": step, **values}) + "\n")
            self._stream.flush()  # what it cannot write it keeps for later, whole, up to 8 KiB
            self._full = False
        except OSError as error:
            if not self._full:
                log.warning("%s cannot be written (%s); training goes on", self._stream.name, error)
            self._full = True
        if self._run is not None:
            known = {name: value for name, value in values.items() if value is not None}
            self._run.log({"optimizer_step": step, **known})

    def show(self, step: int, pictures: list[tuple[str, Path]]) -> None:
        """Give W&B pictures that are on disk, each with its caption."""
        if self._run is not None and pictures:
            import wandb

            images = [wandb.Image(str(path), caption=caption) for caption, path in pictures]
            self._run.log({"optimizer_step": step, "previews": images})

    def close(self) -> None:
        """Finish the W&B run, close the file and draw the loss."""
        try:
            self._stream.close()
            log.info("loss curve in %s", draw_loss(self._run_dir))
        except OSError as error:
            log.warning("the last records or the loss curve cannot be written: %s", error)
        if self._run is not None:
            self._run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics.jsonl; a line that a kill cut short is none."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_loss(run_dir: Path) -> Path:
    """Draw loss.png from metrics.jsonl: each record, and a running mean over the last tenth."""
    from matplotlib.figure import Figure  # half a second, not needed until the end

    # Between two log lines every step may have been skipped.
    records = [r for r in read_metrics(run_dir / METRICS_NAME) if r["loss"] is not None]
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    window = max(1, len(losses) // 10)
    means = [
        sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))
    ]
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    axes.plot(steps, losses, linewidth=0.8, alpha=0.45, label="loss")
    axes.plot(steps, means, linewidth=1.8, label=f"mean of {window} records")
    evaluated = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", markersize=3, label="held-out samples")
    axes.set(xlabel="optimizer step", ylabel="flow-matching loss", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path = run_dir / "loss.png"
    figure.savefig(path)
    return path


def draw_loss_if_missing(run_dir: Path) -> None:
    """Make up for a start that was killed between its last step and its end."""
    if (run_dir / METRICS_NAME).is_file() and not (run_dir / "loss.png").is_file():
        draw_loss(run_dir)


def _start_wandb(run_dir: Path, mode: Mode, project: str, config: dict[str, Any]) -> Any:
    """The W&B run, offline where it cannot be online."""
    import wandb

    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        log.warning("log.wandb is online but no W&B API key is set; the W&B run stays offline")
        mode = "offline"
    os.environ.setdefault("WANDB_SILENT", "true")

    def start(mode: Mode) -> Any:
        return wandb.init(
            project=project,
            name=run_dir.name,
            id=_wandb_id(run_dir),
            resume="allow",
            dir=run_dir,
            config=config,
            mode=mode,
            settings=wandb.Settings(console="off", init_timeout=60, finish_timeout=_FINISH),
        )

    try:
        run = start(mode)
    except wandb.errors.Error as error:
        log.warning("W&B does not start (%s); the W&B run stays offline", error)
        run = start("offline")
    # Our own step axis: W&B's would drop what a run repeats after a kill.
    run.define_metric("*", step_metric="optimizer_step")
    return run


def _cut_after(path: Path, step: int) -> None:
    """Drop records after `step`: those steps are done again."""
    if path.is_file():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def _wandb_id(run_dir: Path) -> str:
    """The run's W&B id, kept in the run directory so that a resumed run is one run."""
    path = run_dir / _WANDB_ID
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text().strip()
