"""What the steps gave: checked one step behind the device, averaged between log lines."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._dynamo.utils import counters

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import GIB
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.loader import MicroBatch
from flux2_ds.distributed import AsyncScalar, Process, all_reduce_mean
from flux2_ds.engine.engine import Engine
from flux2_ds.errors import UserError
from flux2_ds.run.metrics import Metrics
from flux2_ds.training.nonfinite import NonFinite

log = logging.getLogger("flux2_ds")

Values = dict[str, float | str | None]


@dataclass(frozen=True)
class PendingStep:
    """A step that the device may still be working on."""

    number: int
    micro_batches: list[MicroBatch]
    losses: list[torch.Tensor]
    gradient_norm: AsyncScalar


class Progress:
    """Checks every step, sums its loss on the device, and writes the log line and the record.

    `metrics` is None in all ranks but 0.
    """

    def __init__(
        self,
        engine: Engine,
        recipe: Recipe,
        process: Process,
        metrics: Metrics | None,
        nonfinite: NonFinite,
        *,
        first_step: int,
        steps_per_epoch: float,
    ) -> None:
        self._engine, self._recipe, self._process = engine, recipe, process
        self._metrics, self._nonfinite = metrics, nonfinite
        self._first_step, self._steps_per_epoch = first_step, steps_per_epoch
        self._pending: deque[PendingStep] = deque()

    def start(self) -> None:
        """The first step comes next: what was before it is in no step's time."""
        self._recompilations = Recompilations()
        self._started = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), device=self._process.device)
        self._steps = self._updates = 0
        self._since = time.perf_counter()

    def push(
        self, number: int, micro_batches: list[MicroBatch], losses: list[torch.Tensor]
    ) -> None:
        """Take in step `number` and check the one before it.

        The device works on this step while the host prepares the next: reading its numbers now would wait.

        Raises:
            UserError: gradients were not finite, and the run is to stop.
        """
        self._recompilations.check(number, micro_batches[0].bucket)
        norm = AsyncScalar(self._engine.gradient_norm())
        self._pending.append(PendingStep(number, micro_batches, losses, norm))
        while len(self._pending) > 1:
            self._check_step(self._pending.popleft())

    def _check_step(self, step: PendingStep) -> None:
        norm = float(step.gradient_norm)
        self._steps += 1
        # Losses of skipped steps do not count.
        if self._nonfinite.check(norm, step.number, step.micro_batches, step.losses):
            self._updates += 1
            self._loss += torch.stack(step.losses).mean()

    def summary(self, learning_rate: float) -> Values:
        """The numbers since the last log line, averaged over all ranks; waits for the last step. Collective.

        Raises:
            UserError: the loss is not finite. Raised before a checkpoint is written.
        """
        last = self._pending.popleft()
        self._check_step(last)
        loss = float(all_reduce_mean(self._loss / self._updates)) if self._updates else None
        if loss is not None and not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {last.number}, of which no checkpoint was written. Lower "
                "optimizer.learning_rate, or use precision: bf16 instead of fp16."
            )
        seconds = time.perf_counter() - self._since
        return {
            "loss": loss,
            "gradient_norm": float(last.gradient_norm),
            "learning_rate": learning_rate,
            "seconds_per_step": seconds / self._steps,
            "samples_per_second": self._steps * self._recipe.batch.global_size / seconds,
            "epoch": last.number / self._steps_per_epoch,
            "bucket": str(last.micro_batches[0].bucket),
            "skipped_steps": self._nonfinite.skipped,
        }

    def log(self, done: int, values: Values) -> None:
        """Write one line to the console and one record to the metrics; averages start anew."""
        if self._metrics is not None:
            self._metrics.write(done, values)
            steps, loss = self._recipe.steps, values["loss"]
            held_out = values.get("validation_loss")
            parts = [
                f"step {done:{len(str(steps))}}/{steps}",
                "loss of no step" if loss is None else f"loss {loss:.4f}",
                *([] if held_out is None else [f"held-out loss {held_out:.4f}"]),
                f"grad {values['gradient_norm']:.3f}",
                f"lr {values['learning_rate']:.2e}",
                f"{values['seconds_per_step']:.3f} s/step",
                f"{values['samples_per_second']:.2f} samples/s",
                str(values["bucket"]),
                f"epoch {values['epoch']:.2f}",
            ]
            if self._process.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self._process.device)
                parts.append(f"{peak / GIB:.1f} GiB")
            if done < steps:
                parts.append(f"{self._time_left(done)} left")
            log.info("%s", " | ".join(parts))
        self._reset()

    def _time_left(self, done: int) -> timedelta:
        """By what this start has needed until now, with validation, checkpoints and previews."""
        elapsed = time.perf_counter() - self._started
        each = elapsed / (done - self._first_step)
        return timedelta(seconds=round(each * (self._recipe.steps - done)))


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(counters["stats"]["unique_graphs"])


class Recompilations:
    """Says so when a step compiles what the warm-up has not."""

    def __init__(self) -> None:
        self._known = compiled_graphs()

    def check(self, step: int, bucket: Bucket) -> None:
        """Called after each step."""
        found = compiled_graphs()
        if found > self._known:
            log.warning(
                "step %d (%s) compiled %d graphs that the warm-up had not, %d in all",
                step,
                bucket,
                found - self._known,
                found,
            )
        self._known = found
