"""Train: build the parts, then run the loop.

    deepspeed --num_gpus 8 -m flux2_ds.train --config recipes/h100x8.yaml

Starting again continues from the newest checkpoint. Exit codes: 0 done, 2 something to correct in
the recipe or the data, 75 stopped by a signal with a checkpoint saved (start again to continue).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import nullcontext

from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.plan import learning_rate
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.dataset import in_steps
from flux2_ds.distributed import barrier, destroy_process_group, init_process_group
from flux2_ds.errors import EXIT_STOPPED, run_root
from flux2_ds.run.environment import rank_and_world_size
from flux2_ds.run.logging import set_up_log
from flux2_ds.run.run_dir import (
    check_run_dir,
    lock_run_dir,
    logs_directory,
    newest_step,
    stop_file,
    with_adapter_file,
)
from flux2_ds.run.watchdog import Watchdog
from flux2_ds.training.build import Run, build_engine, build_model, build_run
from flux2_ds.training.checkpoints import resume
from flux2_ds.training.inputs import log_banner, log_plan, read_inputs
from flux2_ds.training.lifecycle import end, failures_told, settle
from flux2_ds.training.step import StepTrace, seed_dropout, train_step
from flux2_ds.training.stop import StopRequest
from flux2_ds.training.validation import LOSS
from flux2_ds.training.warmup import warm_up

log = logging.getLogger("flux2_ds")


def main() -> None:
    """Entry point of `flux2_ds.train`, one call in each process."""
    recipe, _ = parse_recipe(recipe_parser("flux2_ds.train", "Train FLUX.2 on prepared shards."))
    recipe = with_adapter_file(recipe)
    recipe = in_steps(recipe)
    check_run_dir(recipe)
    stop = StopRequest(stop_file(recipe))
    stop.listen()
    rank, world_size = rank_and_world_size(os.environ)
    logs, timeout = logs_directory(recipe), recipe.launch.hang_timeout_s
    with (
        # Before this start writes to the logs, which the processes of a running one look into.
        lock_run_dir(recipe) if rank == 0 else nullcontext(),
        Watchdog(logs, rank, world_size, hang_timeout_s=timeout) as watchdog,
    ):
        set_up_log(logs, rank)
        finished = train(recipe, stop, watchdog)
    if not finished:
        sys.exit(EXIT_STOPPED)


def train(recipe: Recipe, stop: StopRequest, watchdog: Watchdog) -> bool:
    """Build the parts of the run in order, then train; False if it was asked to stop."""
    started = time.perf_counter()
    watchdog.heartbeat(0, "meeting the other processes")
    process = init_process_group(recipe.launch.accelerator)
    inputs = read_inputs(recipe, process)
    barrier()  # every rank has passed the checks
    if process.is_rank0:
        log_plan(inputs)

    watchdog.heartbeat(0, "loading the model")
    log.info("loading    %s", recipe.model.path)
    model, memory = build_model(
        inputs.directory,
        inputs.spec,
        inputs.plan,
        process,
        inputs.index.largest_tokens,
        resumed=newest_step(recipe) > 0,
    )
    engine = build_engine(model, inputs.plan)

    watchdog.heartbeat(0, "reading the checkpoint")
    first_step = resume(engine, recipe, inputs.index, process, inputs.directory)
    barrier()  # nothing refuses any more: the run directory may say what it holds now
    inputs = settle(inputs, first_step)

    run = build_run(inputs, engine, memory, first_step, stop, watchdog)
    with failures_told(run, memory):
        if not run.done:
            warm_up(run, inputs, memory)
            if process.is_rank0:
                log_banner(inputs, memory, first_step)
        finished = run_steps(run)

    watchdog.heartbeat(0, "ending")
    end(run, memory, seconds=time.perf_counter() - started, finished=finished)
    # Together: the launcher ends the others as soon as one exits with EXIT_STOPPED.
    destroy_process_group()
    return finished


def run_steps(run: Run) -> bool:
    """Train from `run.first_step` to the last step; False if the run was asked to stop before it."""
    recipe, first = run.recipe, run.first_step
    if not run.done and run.stop.any_rank(run.process)():
        log.info("stopped by %s before step %d", run.stop.reason or "another rank", first + 1)
        return False
    # A start that was killed after a checkpoint may have left its previews unmade.
    if run.previews and run.cadence.due(first).preview and not run.previews.made(first):
        run.previews.render(first)
    if run.validation and recipe.validation.at_start and first == 0:
        values = run.validation.losses(0)
        log.info("step 0 | held-out loss %.4f", values[LOSS])
        if run.metrics is not None:
            run.metrics.write(0, values)

    run.progress.start()
    for step, micro_batches in run.steps():
        run.watchdog.heartbeat(step + 1, "computing")
        stop_requested = run.stop.any_rank(run.process)  # asks now; the answer is read below
        seed_dropout(recipe.seed, step, run.process.rank)
        rate = learning_rate(recipe, step)
        trace = StepTrace(run.process.device)
        losses = train_step(run.engine, run.objective, micro_batches, rate, trace, run.parts)

        done = step + 1
        run.progress.push(done, micro_batches, losses, trace)  # checks the step before
        run.watchdog.heartbeat(done, "agreeing")
        stopping = stop_requested()
        due = run.cadence.due(done, stopping)
        if due.log or due.checkpoint:
            values = run.progress.summary(rate)  # raises on a loss that is not finite
        if due.validation and run.validation:
            values |= run.validation.losses(done)
            if run.validation.stale():
                log.info("the held-out loss has no new lowest value: the run ends at step %d", done)
                due = run.cadence.due(done, stopping, ended=True)
        if due.log:
            values |= run.parts.means() if run.parts else {}
            run.progress.log(done, values)
        if due.checkpoint:
            history = run.validation.history if run.validation else []
            with run.progress.paused():
                waited = run.checkpoints.save(done, last=due.last, validation=history)
            run.progress.waited("checkpoint", waited)
        if due.preview and run.previews:
            with run.progress.paused():
                run.previews.render(done)
        if stopping and done < recipe.steps:
            log.info("stopped by %s after step %d", run.stop.reason or "another rank", done)
            return False
        if due.last:
            return True
    return True


if __name__ == "__main__":
    run_root(main)
