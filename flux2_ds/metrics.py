"""Where numbers go: the console, metrics.jsonl, Weights & Biases and a picture of the loss.

The only file that imports wandb. W&B gets what metrics.jsonl gets and never decides whether a run
goes on: without a key it stays offline.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any, Literal

import matplotlib
import wandb

matplotlib.use("Agg")  # no display on a training machine
from matplotlib import pyplot

log = logging.getLogger("flux2_ds")

METRICS_NAME = "metrics.jsonl"


class Metrics:
    """Writes the metrics of one run; one process of the run has it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: Literal["online", "offline", "disabled"],
        project: str,
        config: dict[str, Any],
        resumed_at: int,
    ) -> None:
        self._path = run_dir / METRICS_NAME
        _cut_after(self._path, resumed_at)
        self._stream = self._path.open("a")
        if mode == "online" and not _has_wandb_key():
            log.warning("log.wandb is online but no W&B API key is set; the W&B run stays offline")
            mode = "offline"
        os.environ.setdefault("WANDB_SILENT", "true")

        def start(mode: Literal["online", "offline", "disabled"]) -> Any:
            return wandb.init(
                project=project,
                name=run_dir.name,
                id=_wandb_id(run_dir),
                resume="allow",
                dir=run_dir,
                config=config,
                mode=mode,
                settings=wandb.Settings(console="off", init_timeout=60),
            )

        try:
            self._run = start(mode)
        except wandb.errors.Error as error:
            log.warning("W&B does not start (%s); the W&B run stays offline", error)
            self._run = start("offline")
        # Our own step axis: W&B's would drop what a run repeats after a kill.
        self._run.define_metric("*", step_metric="optimizer_step")

    def write(self, step: int, values: dict[str, float | str | None]) -> None:
        """Record values for `step`, on disk at once."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        known = {name: value for name, value in values.items() if value is not None}
        self._run.log({"optimizer_step": step, **known})

    def close(self) -> None:
        """Finish the W&B run and close the file."""
        self._stream.close()
        self._run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics.jsonl; a line that a kill cut short is none."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_loss(run_dir: Path) -> Path:
    """Draw loss.png from metrics.jsonl: each record, and a running mean over the last tenth."""
    # Between two log lines every step may have been skipped.
    records = [r for r in read_metrics(run_dir / METRICS_NAME) if r["loss"] is not None]
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    window = max(1, len(losses) // 10)
    means = [
        sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))
    ]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.plot(steps, losses, linewidth=0.8, alpha=0.45, label="loss")
    axes.plot(steps, means, linewidth=1.8, label=f"mean of {window} records")
    evaluated = [(r["step"], r["evaluation_loss"]) for r in records if "evaluation_loss" in r]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", markersize=3, label="held-out samples")
    axes.set(xlabel="optimizer step", ylabel="flow-matching loss", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path = run_dir / "loss.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _cut_after(path: Path, step: int) -> None:
    """Drop records after `step`: those steps are done again."""
    if path.is_file():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(path)


def _wandb_id(run_dir: Path) -> str:
    """The run's W&B id, kept in the run directory so that a resumed run is one run."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text().strip()


def _has_wandb_key() -> bool:
    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
