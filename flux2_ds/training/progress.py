"""What the steps gave: checked one step behind the device, averaged between log lines."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import psutil
import torch
from torch._dynamo.utils import counters
from torch.nn import functional
from tqdm import tqdm

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.cards import peak_tflops
from flux2_ds.config.memory import GIB, Memory
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.loader import MicroBatch
from flux2_ds.distributed import AsyncScalar, Process, all_gather_floats, all_reduce_mean
from flux2_ds.engine.engine import Engine
from flux2_ds.errors import UserError
from flux2_ds.ops.quantized_linear import BASE_WEIGHTS
from flux2_ds.run.logging import progress_bar
from flux2_ds.run.metrics import Metrics, Values
from flux2_ds.training.nonfinite import NonFinite
from flux2_ds.training.step import StepTrace
from flux2_ds.training.validation import BANDS, band_of

log = logging.getLogger("flux2_ds")

_PACE_STEPS = 3
"""Steps of a start after which it says how long the run takes, if no log line has by then."""


@dataclass(frozen=True)
class PendingStep:
    """A step that the device may still be working on."""

    number: int
    micro_batches: list[MicroBatch]
    losses: list[torch.Tensor]
    gradient_norm: AsyncScalar
    trace: StepTrace


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
        self._bar: tqdm[Any] | None = None
        on_card = process.device.type == "cuda"
        card = torch.cuda.get_device_name(process.device) if on_card else ""
        self._product = product_of(recipe)
        self._peak = peak_tflops(card, self._product)

    def start(self) -> None:
        """The first step comes next: what was before it is in no step's time."""
        self._recompilations = Recompilations()
        self._started = time.perf_counter()
        if self._metrics is not None:
            shape = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{remaining} left{postfix}]"
            self._bar = progress_bar(
                "",
                self._recipe.steps,
                "step",
                initial=self._first_step,
                bar_format=shape,
                smoothing=0,
            )
        self._reset()

    def close(self) -> None:
        """No step follows: take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _reset(self) -> None:
        self._loss = torch.zeros((), device=self._process.device)
        self._bands = torch.zeros(len(BANDS), 2, device=self._process.device)
        self._steps = self._updates = 0
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._flops = 0.0
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in this context is in no step's time."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def waited(self, what: str, seconds: float) -> None:
        """The loop has waited so long for the `data` of the next step, or for a `checkpoint`."""
        self._spent[what] += seconds

    def push(
        self,
        number: int,
        micro_batches: list[MicroBatch],
        losses: list[torch.Tensor],
        trace: StepTrace,
    ) -> None:
        """Take in step `number` and check the one before it.

        The device works on this step while the host prepares the next: reading its numbers now would wait.
        Refuses gradients that are not finite.
        """
        self._recompilations.check(number, micro_batches[0].bucket)
        if self._bar is not None:
            self._bar.update()
        norm = AsyncScalar(self._engine.gradient_norm())
        self._pending.append(PendingStep(number, micro_batches, losses, norm, trace))
        while len(self._pending) > 1:
            self._check_step(self._pending.popleft())
        if number == self._first_step + _PACE_STEPS + 1 and number < self._recipe.log.every:
            done, steps = number - 1, self._recipe.steps
            text = f"step {done}/{steps} | about {self._time_left(done)} left"
            self._log_beside_bar(text)

    def _check_step(self, step: PendingStep) -> None:
        norm = float(step.gradient_norm)
        self._steps += 1
        for part, spent in step.trace.seconds().items():
            self._spent[part] += spent
        for batch in step.micro_batches:
            flops = self._facts.spec.step_flops(batch.bucket.all_tokens, self._recipe.method)
            self._flops += len(batch.samples) * flops
        # Losses of skipped steps do not count.
        if self._nonfinite.check(norm, step.number, step.micro_batches, step.losses):
            self._updates += 1
            self._loss += torch.stack(step.losses).mean()
            for each, t in step.trace.samples:
                member = functional.one_hot(band_of(t), len(BANDS)).T.to(each)
                self._bands += member @ torch.stack([each, torch.ones_like(each)], dim=1)
        elif self._nonfinite.in_a_row == 1 and self._metrics is not None:
            what = f"the gradient norm is {norm} at step {step.number}"
            self._metrics.alert("a step is skipped", what)

    def summary(self, learning_rate: float) -> Values:
        """The numbers since the last log line, averaged over all ranks; waits for the last step. Collective.
        Refuses a loss that is not finite, before a checkpoint is written.
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
        memory = self._memory()
        own = [
            (self._spent["data"] + self._spent["forward"]) / self._steps,
            memory.get("memory/allocated_gib", memory["memory/host_gib"]),
        ]
        bands = self._bands.flatten().tolist()
        of_ranks = all_gather_floats([*own, *bands], self._process.device)
        times, peaks = ([round(n[i], 4) for n in of_ranks] for i in (0, 1))
        return {
            "train/loss": loss,
            **_by_band([numbers[2:] for numbers in of_ranks]),
            "train/gradient_norm": float(last.gradient_norm),
            "train/learning_rate": learning_rate,
            "perf/seconds_per_step": seconds / self._steps,
            "perf/samples_per_second": self._steps * samples / seconds,
            **self._performance(seconds),
            **memory,
            **(self._by_rank(times, peaks) if self._process.world_size > 1 else {}),
            "data/epoch": last.number / facts.steps_per_epoch,
            "data/repeats": last.number * samples / facts.samples,
            "data/bucket": str(last.micro_batches[0].bucket),
            "optim/skipped_steps": self._nonfinite.skipped,
        }

    def _performance(self, seconds: float) -> Values:
        """Where rank 0's time goes, means over the steps since the last log line."""
        parts = {
            part: self._spent[part] / self._steps
            for part in ("data", "forward", "backward", "update")
        }
        tflops = self._flops / seconds / 1e12
        values: Values = {
            "perf/tflops": tflops,
            "perf/data_wait_seconds": parts["data"],
            "perf/forward_seconds": parts["forward"],
            "perf/backward_seconds": parts["backward"],
            "perf/update_seconds": parts["update"],
        }
        if stall := self._spent["checkpoint"]:
            values["perf/checkpoint_stall_seconds"] = stall
        if self._peak:
            values["perf/mfu"] = tflops / self._peak
            values["perf/mfu_peak"] = f"{self._peak:g} TFLOP/s in {self._product}"
        return values

    def _by_rank(self, seconds: list[float], gib: list[float]) -> Values:
        """What each rank needs for its data and its forward pass, and its memory. The backward pass waits for the
        slowest, so its time is the same in all."""
        slowest, fullest = (numbers.index(max(numbers)) for numbers in (seconds, gib))
        return {
            "perf/rank_seconds": seconds,
            "perf/rank_spread_seconds": max(seconds) - min(seconds),
            "perf/slowest_rank": f"rank {slowest} on {self._facts.hosts[slowest]}",
            "memory/rank_gib": gib,
            "memory/fullest_gib": max(gib),
            "memory/fullest_rank": f"rank {fullest} on {self._facts.hosts[fullest]}",
        }

    def _memory(self) -> dict[str, float]:
        """Of this rank, in GiB: the peaks on its card, what the plan predicts, and its host memory."""
        device, expected = self._process.device, self._facts.expected
        values = {}
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
            rate = f"lr {values['train/learning_rate']:.2e}"
            pace = [
                f"{values['perf/seconds_per_step']:.3f} s/step",
                f"{values['perf/samples_per_second']:.2f} samples/s",
            ]
            memory = values.get("memory/allocated_gib")
            card = [] if memory is None else [f"{memory:.1f} GiB"]
            parts = [
                f"step {done:{len(str(steps))}}/{steps}",
                "loss of no step" if loss is None else f"loss {loss:.4f}",
                *([] if held_out is None else [f"held-out loss {held_out:.4f}"]),
                f"grad {values['train/gradient_norm']:.3f}",
                rate,
                *pace,
                str(values["data/bucket"]),
                f"epoch {values['data/epoch']:.2f}",
                *card,
            ]
            if done < steps:
                parts.append(f"{self._time_left(done)} left")
            if self._bar is not None:
                smoothed = values["train/loss_smoothed"]
                shown = [] if smoothed is None else [f"loss {smoothed:.4f}"]
                # The most telling first: a narrow terminal cuts the end.
                self._bar.set_postfix_str(" | ".join([*shown, *pace, *card, rate]))
            self._log_beside_bar(" | ".join(parts), held_out is not None)
        self._reset()

    def _log_beside_bar(self, line: str, told: bool = False) -> None:
        """The bar has it all but what is `told`."""
        in_bar = self._bar is not None and not self._bar.disable
        log.info("%s", line, extra={"console": not in_bar or told})

    def _time_left(self, done: int) -> timedelta:
        """By what this start has needed until now, with validation, checkpoints and previews."""
        elapsed = time.perf_counter() - self._started
        each = elapsed / (done - self._first_step)
        return timedelta(seconds=round(each * (self._recipe.steps - done)))


def _by_band(of_ranks: list[list[float]]) -> Values:
    """The loss in each quarter of the timesteps that has samples, from each rank's sums and counts."""
    totals = [sum(column) for column in zip(*of_ranks, strict=True)]
    bands = zip(BANDS, totals[::2], totals[1::2], strict=True)
    return {f"train/loss_{band}": total / count for band, total, count in bands if count}


def product_of(recipe: Recipe) -> str:
    """What the blocks' linears are multiplied in: the dtype of the peak that MFU is a share of. fp16 is as fast as bf16."""
    if recipe.compute == "fp8":
        return "fp8"
    if recipe.base_weights in BASE_WEIGHTS:
        return BASE_WEIGHTS[recipe.base_weights][1]
    return "bf16" if recipe.precision == "fp16" else recipe.precision


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
