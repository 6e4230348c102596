"""What the steps gave: checked one step behind the device, averaged between log lines."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import psutil
import torch
from torch._dynamo.utils import counters

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import GIB, Memory
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.loader import MicroBatch
from flux2_ds.distributed import AsyncScalar, Process, all_gather_floats, all_reduce_mean
from flux2_ds.engine.engine import Engine
from flux2_ds.errors import UserError
from flux2_ds.run.metrics import Metrics, Values
from flux2_ds.training.nonfinite import NonFinite
from flux2_ds.training.step import StepTimer

log = logging.getLogger("flux2_ds")

PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.5,
    "H200": 989.5,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
}
"""Dense bf16 products with fp32 sums, by NVIDIA's data sheets; the first name that a card's has in it."""


@dataclass(frozen=True)
class PendingStep:
    """A step that the device may still be working on."""

    number: int
    micro_batches: list[MicroBatch]
    losses: list[torch.Tensor]
    gradient_norm: AsyncScalar
    timer: StepTimer


@dataclass(frozen=True)
class Facts:
    """What stays the same while a run trains."""

    spec: Spec
    samples: int
    """Of the data."""
    steps_per_epoch: float
    expected: Memory
    hosts: list[str]
    """Of all ranks."""


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
        facts: Facts,
    ) -> None:
        self._engine, self._recipe, self._process = engine, recipe, process
        self._metrics, self._nonfinite = metrics, nonfinite
        self._first_step, self._facts = first_step, facts
        self._pending: deque[PendingStep] = deque()
        on_card = process.device.type == "cuda"
        card = torch.cuda.get_device_name(process.device) if on_card else ""
        self._peak = next((peak for name, peak in PEAK_TFLOPS.items() if name in card), None)

    def start(self) -> None:
        """The first step comes next: what was before it is in no step's time."""
        self._recompilations = Recompilations()
        self._started = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), device=self._process.device)
        self._steps = self._updates = 0
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._flops = 0.0
        self._since = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """The loop has waited so long for the data of the next step."""
        self._spent["data"] += seconds

    def push(
        self,
        number: int,
        micro_batches: list[MicroBatch],
        losses: list[torch.Tensor],
        timer: StepTimer,
    ) -> None:
        """Take in step `number` and check the one before it.

        The device works on this step while the host prepares the next: reading its numbers now would wait.

        Raises:
            UserError: gradients were not finite, and the run is to stop.
        """
        self._recompilations.check(number, micro_batches[0].bucket)
        norm = AsyncScalar(self._engine.gradient_norm())
        self._pending.append(PendingStep(number, micro_batches, losses, norm, timer))
        while len(self._pending) > 1:
            self._check_step(self._pending.popleft())

    def _check_step(self, step: PendingStep) -> None:
        norm = float(step.gradient_norm)
        self._steps += 1
        for part, spent in step.timer.seconds().items():
            self._spent[part] += spent
        for batch in step.micro_batches:
            tokens = batch.bucket.tokens + sum(
                r.shape[2] * r.shape[3] // 4 for r in batch.references
            )
            flops = self._facts.spec.step_flops(tokens, self._recipe.method)
            self._flops += len(batch.samples) * flops
        # Losses of skipped steps do not count.
        if self._nonfinite.check(norm, step.number, step.micro_batches, step.losses):
            self._updates += 1
            self._loss += torch.stack(step.losses).mean()
        elif self._nonfinite.in_a_row == 1 and self._metrics is not None:
            what = f"the gradient norm is {norm} at step {step.number}"
            self._metrics.alert("a step is skipped", what)

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
        samples, facts = self._recipe.batch.global_size, self._facts
        return {
            "train/loss": loss,
            "train/gradient_norm": float(last.gradient_norm),
            "train/learning_rate": learning_rate,
            "perf/seconds_per_step": seconds / self._steps,
            "perf/samples_per_second": self._steps * samples / seconds,
            **self._performance(seconds),
            **self._memory(),
            "data/epoch": last.number / facts.steps_per_epoch,
            "data/repeats": last.number * samples / facts.samples,
            "data/bucket": str(last.micro_batches[0].bucket),
            "optim/skipped_steps": self._nonfinite.skipped,
        }

    def _performance(self, seconds: float) -> Values:
        """Where the time goes, means over the steps since the last log line. Collective."""
        parts = {
            part: self._spent[part] / self._steps
            for part in ("data", "forward", "backward", "update")
        }
        tflops = self._flops / seconds / 1e12
        values: Values = {
            "perf/tflops": tflops,
            **({"perf/mfu": tflops / self._peak} if self._peak else {}),
            "perf/data_wait_seconds": parts["data"],
            "perf/forward_seconds": parts["forward"],
            "perf/backward_seconds": parts["backward"],
            "perf/update_seconds": parts["update"],
        }
        if self._process.world_size > 1:
            # The backward pass waits for the slowest, so its time is the same in all ranks.
            own = parts["data"] + parts["forward"]
            of_ranks = [each for (each,) in all_gather_floats([own], self._process.device)]
            slowest = of_ranks.index(max(of_ranks))
            values["perf/rank_spread_seconds"] = max(of_ranks) - min(of_ranks)
            values["perf/slowest_rank"] = f"rank {slowest} on {self._facts.hosts[slowest]}"
        return values

    def _memory(self) -> Values:
        """Of rank 0, in GiB: the peaks on its card, what the plan predicts, and its host memory."""
        device, expected = self._process.device, self._facts.expected
        values: Values = {}
        if device.type == "cuda":
            values["memory/allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
            values["memory/reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
            values["memory/predicted_gib"] = expected.on_card / GIB
        values["memory/host_gib"] = psutil.Process().memory_info().rss / GIB
        return values

    def log(self, done: int, values: Values) -> None:
        """Write one line to the console and one record to the metrics; averages start anew."""
        if self._metrics is not None:
            loss = cast(float | None, values["train/loss"])
            values["train/loss_smoothed"] = self._metrics.smoothed(loss)
            self._metrics.write(done, values)
            steps, held_out = self._recipe.steps, values.get("validation/loss")
            parts = [
                f"step {done:{len(str(steps))}}/{steps}",
                "loss of no step" if loss is None else f"loss {loss:.4f}",
                *([] if held_out is None else [f"held-out loss {held_out:.4f}"]),
                f"grad {values['train/gradient_norm']:.3f}",
                f"lr {values['train/learning_rate']:.2e}",
                f"{values['perf/seconds_per_step']:.3f} s/step",
                f"{values['perf/samples_per_second']:.2f} samples/s",
                str(values["data/bucket"]),
                f"epoch {values['data/epoch']:.2f}",
            ]
            if "memory/allocated_gib" in values:
                parts.append(f"{values['memory/allocated_gib']:.1f} GiB")
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
