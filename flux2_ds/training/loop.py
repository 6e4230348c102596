"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.checkpoint import manager as saving
from flux2_ds.checkpoint.manager import SaveError
from flux2_ds.checkpoint.tensor_store import TensorShard
from flux2_ds.config.plan import learning_rate
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.loader import Loader, MicroBatch
from flux2_ds.distributed import AsyncScalar, Process, all_reduce_mean, any_rank, barrier
from flux2_ds.engine.engine import Engine
from flux2_ds.errors import UserError
from flux2_ds.run.metrics import Metrics
from flux2_ds.run.run_dir import checkpoints_directory
from flux2_ds.run.watchdog import Watchdog
from flux2_ds.training.loss import FlowObjective
from flux2_ds.training.nonfinite import NonFinite
from flux2_ds.training.previews import Previews
from flux2_ds.training.step import update
from flux2_ds.training.stop import StopRequest
from flux2_ds.training.validation import ValidationLoss
from flux2_ds.training.warmup import Recompilations

log = logging.getLogger("flux2_ds")

_STREAM = 3  # keeps this random stream apart from those of data/order.py and data/loader.py


@dataclass
class Meter:
    """Sums between two log lines; the loss stays on the device until then."""

    loss: torch.Tensor
    steps: int = 0
    updates: int = 0
    samples: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, loss: torch.Tensor, samples: int, updated: bool) -> None:
        """Count one step with its mean loss in this process; losses of skipped steps do not count."""
        self.steps += 1
        self.samples += samples
        if updated:
            self.updates += 1
            self.loss += loss


@dataclass(frozen=True)
class Queued:
    """A step that the device may still be working on."""

    number: int
    micro_batches: list[MicroBatch]
    losses: list[torch.Tensor]
    gradient_norm: AsyncScalar


def train(
    engine: Engine,
    loader: Loader,
    objective: FlowObjective,
    metrics: Metrics | None,
    process: Process,
    recipe: Recipe,
    stop: StopRequest,
    watchdog: Watchdog,
    nonfinite: NonFinite,
    *,
    first_step: int,
    steps_per_epoch: int,
    run_state: dict[str, object],
    validation: ValidationLoss | None = None,
    previews: Previews | None = None,
) -> bool:
    """Run steps [first_step, recipe.steps). Returns False if a signal ended it early.

    `metrics` is None in all processes but the first, `validation` if nothing is held out, `previews` if none
    are wanted.
    """
    if previews is not None and first_step == 0:
        show(previews, metrics, 0, watchdog)
    steps, global_batch = recipe.steps, recipe.batch.global_size
    meter = Meter(torch.zeros((), device=process.device))
    queued: deque[Queued] = deque()
    recompilations = Recompilations()
    watchdog.heartbeat(first_step + 1, "waiting for data")
    for step, micro_batches in enumerate(loader.steps(first_step, steps), start=first_step):
        watchdog.heartbeat(step + 1, "computing")
        asked_to_stop = any_rank(partial(stop.seen, process), process.device)
        seed_dropout(recipe.seed, step, process.rank)
        rate = learning_rate(recipe, step)
        losses = update(engine, objective, micro_batches, rate)

        done = step + 1
        recompilations.check(done, micro_batches[0].bucket)
        queued.append(Queued(done, micro_batches, losses, AsyncScalar(engine.gradient_norm())))
        watchdog.heartbeat(done, "agreeing")
        # The device works on this step while the host prepares the next: only the one before is
        # looked at, unless the numbers are needed now.
        while len(queued) > 1:
            settle(queued.popleft(), nonfinite, meter, global_batch)
        stopping = asked_to_stop()
        ending = stopping or done == steps
        evaluating = (
            validation is not None and not stopping and (ending or every(validation.every, done))
        )
        previewing = (
            previews is not None and not stopping and (ending or every(previews.every, done))
        )
        logging_due = ending or evaluating or previewing or every(recipe.log.every, done)
        saving_due = ending or every(recipe.checkpoint.every, done)
        if logging_due or saving_due:
            settle(queued.popleft(), nonfinite, meter, global_batch)
            values = summarise(meter, engine, done, rate, steps_per_epoch)
            values["bucket"] = str(micro_batches[0].bucket)
            values["skipped_steps"] = nonfinite.skipped
        if validation is not None and evaluating:
            values["validation_loss"] = validation.loss(
                partial(watchdog.heartbeat, done, "evaluating")
            )
        if logging_due:
            report(values, metrics, done, steps)
        if saving_due:
            heartbeat = partial(watchdog.heartbeat, done, "saving")
            save(engine, recipe, done, run_state, process, heartbeat, ending=ending)
        if previews is not None and previewing:
            show(previews, metrics, done, watchdog)
        if logging_due:
            meter = Meter(torch.zeros((), device=process.device))
        if stopping and done < steps:
            log.info("stopped by %s after step %d", stop.reason or "another process", done)
            return False
        watchdog.heartbeat(done + 1, "waiting for data")
    return True


def settle(step: Queued, nonfinite: NonFinite, meter: Meter, samples: int) -> None:
    """Wait for a step, check it and count it.

    Raises:
        UserError: its gradients were not finite, and the run is to stop.
    """
    norm = float(step.gradient_norm)
    updated = nonfinite.check(norm, step.number, step.micro_batches, step.losses)
    meter.add(torch.stack(step.losses).mean(), samples, updated)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make torch's global generator a function of (seed, step, rank).

    Only the adapter's dropout draws from it; a resumed run then drops what it would have dropped.
    """
    words = np.random.SeedSequence((_STREAM, seed, step, rank)).generate_state(1)
    torch.manual_seed(int(words[0]))


def every(period: int, step: int) -> bool:
    """Whether something with this period is due after `step` steps."""
    return step % period == 0


def summarise(
    meter: Meter, engine: Engine, step: int, learning_rate: float, steps_per_epoch: int
) -> dict[str, float | str | None]:
    """The numbers of a log line, averaged over all processes.

    Raises:
        UserError: the loss is not finite. Raised before a checkpoint is written.
    """
    loss = float(all_reduce_mean(meter.loss / meter.updates)) if meter.updates else None
    if loss is not None and not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step}, of which no checkpoint was written. Lower "
            "optimizer.learning_rate, or use precision: bf16 instead of fp16."
        )
    seconds = time.perf_counter() - meter.since
    return {
        "loss": loss,
        "gradient_norm": float(engine.gradient_norm()),
        "learning_rate": learning_rate,
        "seconds_per_step": seconds / meter.steps,
        "samples_per_second": meter.samples / seconds,
        "epoch": step / steps_per_epoch,
    }


def report(
    values: dict[str, float | str | None], metrics: Metrics | None, step: int, steps: int
) -> None:
    """One line on the console, one record in the metrics."""
    if metrics is None:
        return
    metrics.write(step, values)
    loss = values["loss"]
    log.info(
        "step %*d/%d | loss %s | grad %.3f | lr %.2e | %.3f s/step | %.2f samples/s | %s | epoch %.2f",
        len(str(steps)),
        step,
        steps,
        "of no step" if loss is None else f"{loss:.4f}",
        values["gradient_norm"],
        values["learning_rate"],
        values["seconds_per_step"],
        values["samples_per_second"],
        values["bucket"],
        values["epoch"],
    )
    if "validation_loss" in values:
        log.info(
            "step %d/%d | loss on held-out samples %.4f", step, steps, values["validation_loss"]
        )


def show(previews: Previews, metrics: Metrics | None, step: int, watchdog: Watchdog) -> None:
    """Render the preview prompts."""
    pictures = previews.render(step, partial(watchdog.heartbeat, step, "rendering"))
    if metrics is not None and pictures:
        metrics.show(step, pictures)
        log.info("step %d: previews in %s", step, pictures[0][1].parent)


def save(
    engine: Engine,
    recipe: Recipe,
    step: int,
    run_state: dict[str, object],
    process: Process,
    heartbeat: Callable[[], None],
    *,
    ending: bool,
) -> None:
    """Write a checkpoint; all processes go on together once it is complete. `heartbeat` is called at each
    tensor.

    A run that goes on survives one that cannot be written: stopping would lose what it has trained.

    Raises:
        SaveError: it was the last chance.
    """

    def followed(piece: TensorShard) -> TensorShard:
        heartbeat()
        return piece

    heartbeat()
    checkpoints, kept = checkpoints_directory(recipe), recipe.checkpoint
    state = {**run_state, **engine.state.counters()}
    try:
        path = saving.save(
            checkpoints,
            step,
            lambda: map(followed, engine.state.tensor_shards()),
            state,
            process,
            sharded=engine.state.sharded,
        )
    except SaveError as error:
        if ending:
            raise
        log.error("%s Training goes on, with the next attempt at the next checkpoint.", error)
        return
    if process.is_rank0:
        log.info("saved %s", path)
        try:
            checkpoint.remove_old(checkpoints, kept.keep_last, kept.keep_every)
        except OSError as error:
            log.warning("old checkpoints cannot be removed (%s); training goes on", error)
    barrier()
