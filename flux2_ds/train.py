"""Train: read the recipe, build the parts in order, run the loop.

    deepspeed --num_gpus 8 --module flux2_ds.train --config recipes/h100x8.yaml

Starting again continues from the newest checkpoint. Exit codes: 0 done, 2 something to correct in
the recipe or the data, 75 stopped by a signal with a checkpoint saved (start again to continue).
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flux2_ds import checkpoint, loop
from flux2_ds.agreement import any_process, from_first
from flux2_ds.assembly import (
    build_engine,
    build_loader,
    build_model,
    build_objective,
    say_memory,
)
from flux2_ds.data.index import Index
from flux2_ds.data.order import Order
from flux2_ds.data.shards import read_conditioning, read_prompts
from flux2_ds.data.sweep import Sweep
from flux2_ds.engine import Engine
from flux2_ds.errors import EXIT_STOPPED, OutageError, UserError, run_root
from flux2_ds.evaluate import Evaluation
from flux2_ds.logs import set_up_log
from flux2_ds.lookout import Lookout
from flux2_ds.loop import StopRequest
from flux2_ds.memory import Memory, recordable
from flux2_ds.metrics import Metrics, check_wandb
from flux2_ds.model.files import model_directory
from flux2_ds.nonfinite import NonFinite
from flux2_ds.objective import FlowObjective
from flux2_ds.optimizers import compatible
from flux2_ds.parsing import parse_recipe, recipe_parser
from flux2_ds.plan import Plan, captures, make_plan
from flux2_ds.prepared import (
    build_order,
    check_shards,
    companion_lines,
    read_data,
)
from flux2_ds.preview import Previews, check_previews
from flux2_ds.processes import Process, barrier, start_process, stop_process
from flux2_ds.ranks import rank_and_world
from flux2_ds.recipe import Recipe, recipe_values
from flux2_ds.rendering import as_prompt
from flux2_ds.rundir import (
    changed_settings,
    check_run_dir,
    checkpoints_directory,
    lock_run_dir,
    logs_directory,
    stop_file,
    versions,
    write_run_dir,
)
from flux2_ds.spec import Spec, read_spec
from flux2_ds.warmup import too_small, warm_up

log = logging.getLogger("flux2_ds")


def main() -> None:
    """Entry point of `flux2_ds.train`, one call in each process."""
    recipe, _ = parse_recipe(recipe_parser("flux2_ds.train", "Train FLUX.2 on prepared shards."))
    check_run_dir(recipe)
    stop = StopRequest(stop_file(recipe))
    stop.listen()
    rank, world = rank_and_world(os.environ)
    logs = logs_directory(recipe)
    with (
        # Before this start writes to the logs, which the processes of a running one look into.
        lock_run_dir(recipe) if rank == 0 else nullcontext(),
        Lookout(logs, rank, world, hang_after=recipe.launch.hang_after) as lookout,
    ):
        set_up_log(logs, rank)
        finished = train(recipe, stop, lookout)
    if not finished:
        sys.exit(EXIT_STOPPED)


@dataclass(frozen=True)
class Inputs:
    """What a process of a run has read and checked before it loads the model."""

    plan: Plan
    process: Process
    directory: Path
    """Of the model."""
    spec: Spec
    index: Index
    held_out: Index
    order: Order
    conditioning: dict[str, torch.Tensor]

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.plan.recipe


def train(recipe: Recipe, stop: StopRequest, lookout: Lookout) -> bool:
    """Train as this process's part of the run; False if it was asked to stop."""
    lookout.at(0, "meeting the other processes")
    process = start_process(recipe.launch.accelerator)
    inputs = read_inputs(recipe, process)
    plan, index = inputs.plan, inputs.index

    barrier()  # every process has passed the checks
    if process.first:
        say_plan(inputs)

    lookout.at(0, "loading the model")
    arranged = recordable(plan, index)
    if captures(plan) and not captures(arranged):
        log.info("no CUDA graphs: the samples' reference images have several sizes")
    model, expected = build_model(
        inputs.directory, inputs.spec, arranged, process, index.largest_tokens
    )
    engine = build_engine(model, plan)
    lookout.at(0, "reading the checkpoint")
    first_step = resume(engine, recipe, index, process)
    finished = True
    if first_step < recipe.steps:
        barrier()  # nothing refuses any more: the run directory may say what it holds now
        if process.first:
            for change in changed_settings(recipe):
                log.warning("accepted: %s", change)
            write_run_dir(plan)
        finished = run(inputs, engine, expected, stop, lookout, first_step)
    else:
        log.info(
            "nothing to do: the newest checkpoint is of step %d, and steps is %d. To go on, raise steps%s",
            first_step,
            recipe.steps,
            " and set accept_changes: true, because the schedule depends on it"
            if recipe.optimizer.schedule != "constant"
            else "",
        )
    lookout.at(0, "ending")
    say_memory(expected, process.device)
    stop_process()  # together: the launcher ends the others as soon as one exits with EXIT_STOPPED
    return finished


def read_inputs(recipe: Recipe, process: Process) -> Inputs:
    """The model's directory and the data, as far as they decide whether the run can start. Collective.

    Raises:
        UserError: something does not fit the recipe, or cannot be read.
    """
    plan = make_plan(recipe, process.world)
    parts = ["transformer"] if recipe.preview.every is None else ["transformer", "vae", "scheduler"]
    directory = model_directory(recipe.model.path, recipe.model.revision, parts)
    spec = read_spec(directory, allow_distilled=recipe.model.allow_distilled)
    index, held_out = read_data(recipe)
    check_same(index, recipe, process)
    check_shards(index, held_out, spec, directory, recipe)
    if recipe.preview.every is not None:
        check_previews(recipe, directory)
    check_wandb(recipe.log.wandb)
    conditioning = read_conditioning(recipe.data.shards, index)
    order = build_order(recipe, index)
    return Inputs(plan, process, directory, spec, index, held_out, order, conditioning)


def check_same(index: Index, recipe: Recipe, process: Process) -> None:
    """Refuse an index that is not the first process's, with which each would follow its own order.
    Collective.

    Raises:
        UserError: it is another one.
    """
    own = int(index.digest, 16) >> 1  # 63 bits
    if from_first(own, process.device) != own:
        raise UserError(
            f"the index of data.shards {recipe.data.shards} on {socket.gethostname()} is not the first "
            "process's. Wait until prepare and all copies are finished, and start again."
        )


def say_plan(inputs: Inputs) -> None:
    """Log the arithmetic of the run."""
    plan, index, order = inputs.plan, inputs.index, inputs.order
    for line in [f"variant    {inputs.spec}", *plan.lines(inputs.spec)]:
        log.info(line)
    log.info(
        "data       %d samples in %d shards, %d steps an epoch",
        index.samples,
        len(index.shards),
        order.steps_per_epoch,
    )
    for line in companion_lines(plan.recipe, index):
        log.info("           %s", line)
    for bucket, count in index.bucket_counts().items():
        repeated = order.repeated(bucket)
        log.info(
            "  %-10s %d samples, %d batches an epoch%s",
            bucket,
            count,
            order.batches[bucket],
            f", {repeated} places repeat a sample" if repeated else "",
        )
    if inputs.held_out.samples:
        log.info("held out   %d samples", inputs.held_out.samples)


def resume(engine: Engine, recipe: Recipe, index: Index, process: Process) -> int:
    """Load the newest intact checkpoint, if there is one; returns the step to start from.

    The first process chooses, so that all of them load the same one.

    Raises:
        UserError: it does not fit the recipe or the shards, or this process cannot see it.
    """
    root = checkpoints_directory(recipe)
    step = 0
    if process.first:
        found, damaged = checkpoint.newest(root)
        for path, damage in damaged.items():
            log.warning("%s is damaged: %s", path, damage)
            log.warning("going on from the one before; moved it to %s", checkpoint.set_aside(path))
        step = found.step if found else 0
    step = from_first(step, process.device)
    if step == 0:
        return 0
    chosen = checkpoint.Checkpoint(checkpoint.checkpoint_path(root, step), step)
    if not chosen.path.is_dir():
        raise UserError(
            f"process {process.rank} does not see {chosen.path}, which the first process does. "
            "run_dir must be on a file system that all hosts share."
        )
    state = chosen.state()
    before = state["recipe"]["optimizer"]["name"]
    if not compatible(before, recipe.optimizer.name):
        raise UserError(
            f"{chosen.path} was written with other optimizer settings: optimizer.name was {before}, is "
            f"{recipe.optimizer.name}, which cannot use its state. Go on with {before}, or give a new run_dir."
        )
    if state["index"] != index.digest:
        what = f"(index {index.digest}, was {state['index']})"
        if not recipe.accept_changes:
            raise UserError(
                f"data.shards {recipe.data.shards} are not the shards that {chosen.path} was trained on "
                f"{what}. Restore them, give a new run_dir, or set accept_changes: true."
            )
        log.warning("accepted: other shards in data.shards %s %s", recipe.data.shards, what)
    engine.state.load(chosen)
    log.info("continuing after step %d from %s", step, chosen.path)
    return step


def build_evaluation(inputs: Inputs, engine: Engine, objective: FlowObjective) -> Evaluation | None:
    """The loss on what is held out, with every caption; None if nothing is."""
    recipe, held_out, process = inputs.recipe, inputs.held_out, inputs.process
    if not held_out.samples:
        return None
    wide = replace(recipe.batch, global_size=process.world * recipe.batch.micro_size)
    sweep = Sweep(held_out, recipe.evaluation.samples, wide.global_size)
    captioned = replace(recipe.objective, caption_dropout=0.0)
    recipe = replace(recipe, batch=wide, objective=captioned)
    loader = build_loader(recipe, held_out, sweep, process, inputs.conditioning)
    # Strata are those of a whole global batch, which the held-out samples are not.
    objective = replace(objective, settings=replace(objective.settings, stratified=False))
    return Evaluation(engine, loader, objective, sweep, recipe.evaluation.every)


def build_previews(inputs: Inputs, engine: Engine) -> Previews | None:
    """Pictures of the preview prompts; None if none are wanted."""
    recipe, spec, preview = inputs.recipe, inputs.spec, inputs.recipe.preview
    if preview.every is None:
        return None
    empty = inputs.conditioning["empty_text"][None]
    texts = read_prompts(recipe.data.shards, preview.prompts)
    prompts = [as_prompt(spec, text[None], empty) for text in texts]
    folder = Path(recipe.run_dir) / "previews"
    return Previews(
        engine, preview, spec, inputs.directory, folder, inputs.process, prompts, preview.every
    )


def run(
    inputs: Inputs,
    engine: Engine,
    expected: Memory,
    stop: StopRequest,
    lookout: Lookout,
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
        lookout=lookout,
        stopping=lambda: any_process(lambda: stop.seen(process), process.device)(),
    )
    metrics = None
    if process.first:
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
            lookout,
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
                "processes": process.world,
            },
            evaluation=build_evaluation(inputs, engine, objective),
            previews=build_previews(inputs, engine),
        )
    except torch.OutOfMemoryError as error:
        # Of the backward pass at stage 3, which is not warmed up, or of a card that others use as well.
        raise OutageError(too_small(recipe, "a step", error, expected.spare)) from error
    if metrics is not None:
        lookout.at(0, "closing the metrics")
        metrics.close()
    return finished


if __name__ == "__main__":
    run_root(main)
