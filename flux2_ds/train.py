"""Train: read the recipe, build the parts in order, run the loop.

    deepspeed --num_gpus 8 --module flux2_ds.train --config recipes/h100x8.yaml

Starting again continues from the newest checkpoint. Exit codes: 0 done, 2 something to correct in
the recipe or the data, 75 stopped by a signal with a checkpoint saved (start again to continue).
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from flux2_ds.config.memory import Memory, out_of_memory
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.plan import captures
from flux2_ds.config.recipe import Recipe, recipe_values
from flux2_ds.data.dataset import recordable
from flux2_ds.distributed import (
    any_rank,
    barrier,
    destroy_process_group,
    init_process_group,
)
from flux2_ds.engine.engine import Engine
from flux2_ds.errors import EXIT_STOPPED, OutageError, run_root
from flux2_ds.run.environment import rank_and_world_size
from flux2_ds.run.logging import set_up_log
from flux2_ds.run.metrics import Metrics
from flux2_ds.run.run_dir import (
    changed_settings,
    check_run_dir,
    lock_run_dir,
    logs_directory,
    stop_file,
    versions,
    write_run_dir,
)
from flux2_ds.run.watchdog import Watchdog
from flux2_ds.training import loop
from flux2_ds.training.build import (
    build_engine,
    build_loader,
    build_model,
    build_objective,
    build_previews,
    build_validation,
    say_memory,
)
from flux2_ds.training.inputs import Inputs, read_inputs, resume, say_plan
from flux2_ds.training.nonfinite import NonFinite
from flux2_ds.training.stop import StopRequest
from flux2_ds.training.warmup import warm_up

log = logging.getLogger("flux2_ds")


def main() -> None:
    """Entry point of `flux2_ds.train`, one call in each process."""
    recipe, _ = parse_recipe(recipe_parser("flux2_ds.train", "Train FLUX.2 on prepared shards."))
    check_run_dir(recipe)
    stop = StopRequest(stop_file(recipe))
    stop.listen()
    rank, world_size = rank_and_world_size(os.environ)
    logs = logs_directory(recipe)
    with (
        # Before this start writes to the logs, which the processes of a running one look into.
        lock_run_dir(recipe) if rank == 0 else nullcontext(),
        Watchdog(logs, rank, world_size, hang_timeout_s=recipe.launch.hang_timeout_s) as watchdog,
    ):
        set_up_log(logs, rank)
        finished = train(recipe, stop, watchdog)
    if not finished:
        sys.exit(EXIT_STOPPED)


def train(recipe: Recipe, stop: StopRequest, watchdog: Watchdog) -> bool:
    """Train as this process's part of the run; False if it was asked to stop."""
    watchdog.heartbeat(0, "meeting the other processes")
    process = init_process_group(recipe.launch.accelerator)
    inputs = read_inputs(recipe, process)
    plan, index = inputs.plan, inputs.index

    barrier()  # every process has passed the checks
    if process.is_rank0:
        say_plan(inputs)

    watchdog.heartbeat(0, "loading the model")
    arranged = recordable(plan, index)
    if captures(plan) and not captures(arranged):
        log.info("no CUDA graphs: the samples' reference images have several sizes")
    model, expected = build_model(
        inputs.directory, inputs.spec, arranged, process, index.largest_tokens
    )
    engine = build_engine(model, plan)
    watchdog.heartbeat(0, "reading the checkpoint")
    first_step = resume(engine, recipe, index, process)
    finished = True
    if first_step < recipe.steps:
        barrier()  # nothing refuses any more: the run directory may say what it holds now
        if process.is_rank0:
            for change in changed_settings(recipe):
                log.warning("accepted: %s", change)
            write_run_dir(plan)
        finished = run(inputs, engine, expected, stop, watchdog, first_step)
    else:
        log.info(
            "nothing to do: the newest checkpoint is of step %d, and steps is %d. To go on, raise steps%s",
            first_step,
            recipe.steps,
            " and set accept_changes: true, because the schedule depends on it"
            if recipe.optimizer.schedule != "constant"
            else "",
        )
    watchdog.heartbeat(0, "ending")
    say_memory(expected, process.device)
    destroy_process_group()  # together: the launcher ends the others as soon as one exits with EXIT_STOPPED
    return finished


def run(
    inputs: Inputs,
    engine: Engine,
    expected: Memory,
    stop: StopRequest,
    watchdog: Watchdog,
    first_step: int,
) -> bool:
    """Run the loop with its data, objective and metrics; False if a signal ended it.

    Raises:
        OutageError: the card's memory was not enough for a step.
    """
    recipe, process, index = inputs.recipe, inputs.process, inputs.index
    run_dir, conditioning = Path(recipe.run_dir), inputs.conditioning
    loader = build_loader(recipe, index, inputs.order, process, conditioning)
    objective = build_objective(recipe, inputs.spec, conditioning, process.device)
    warm_up(
        engine,
        objective,
        index,
        inputs.held_out,
        inputs.plan,
        expected=expected,
        text_dtype=conditioning["empty_text"].dtype,
        first_step=first_step,
        watchdog=watchdog,
        stopping=lambda: any_rank(lambda: stop.seen(process), process.device)(),
    )
    metrics = None
    if process.is_rank0:
        metrics = Metrics(
            run_dir,
            mode=recipe.log.wandb,
            project=recipe.log.project,
            config=recipe_values(recipe),
            resumed_at=first_step,
        )
    try:
        finished = loop.train(
            engine,
            loader,
            objective,
            metrics,
            process,
            recipe,
            stop,
            watchdog,
            NonFinite(
                run_dir / "nonfinite",
                recipe.optimizer.nonfinite,
                engine.skips_overflows,
                loader.describe,
                process.rank,
                skipped=first_step - engine.state.updates(),
            ),
            first_step=first_step,
            steps_per_epoch=inputs.order.steps_per_epoch,
            run_state={
                "recipe": recipe_values(recipe),
                "versions": versions(),
                "index": index.digest,
                "processes": process.world_size,
            },
            validation=build_validation(inputs, engine, objective),
            previews=build_previews(inputs, engine),
        )
    except torch.OutOfMemoryError as error:
        # Of the backward pass at stage 3, which is not warmed up, or of a card that others use as well.
        message = out_of_memory(recipe, "step", "a step", error, expected.spare)
        raise OutageError(message) from error
    if metrics is not None:
        watchdog.heartbeat(0, "closing the metrics")
        metrics.close()
    return finished


if __name__ == "__main__":
    run_root(main)
