"""What a run reads and checks before it loads the model."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.config.model_files import model_directory
from flux2_ds.config.model_spec import Spec, read_spec
from flux2_ds.config.plan import Plan, make_plan
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.dataset import build_order, check_run, mask_and_reference_lines, read_data
from flux2_ds.data.index import Index
from flux2_ds.data.order import Order
from flux2_ds.data.shards import read_conditioning
from flux2_ds.distributed import (
    Process,
    broadcast_from_rank0,
)
from flux2_ds.engine.engine import Engine
from flux2_ds.engine.optimizers import compatible
from flux2_ds.errors import UserError
from flux2_ds.run.run_dir import (
    checkpoints_directory,
)
from flux2_ds.training.previews import open_reference

log = logging.getLogger("flux2_ds")


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


def read_inputs(recipe: Recipe, process: Process) -> Inputs:
    """The model's directory and the data, as far as they decide whether the run can start. Collective.

    Raises:
        UserError: something does not fit the recipe, or cannot be read.
    """
    plan = make_plan(recipe, process.world_size)
    parts = ["transformer"] if recipe.preview.every is None else ["transformer", "vae", "scheduler"]
    directory = model_directory(recipe.model.path, recipe.model.revision, parts)
    spec = read_spec(directory, allow_distilled=recipe.model.allow_distilled)
    index, held_out = read_data(recipe)
    check_same(index, recipe, process)
    check_run(recipe, (index, held_out), spec, directory)
    if recipe.preview.every is not None:
        for path in recipe.preview.references:
            open_reference(path)
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
    if broadcast_from_rank0(own, process.device) != own:
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
    for line in mask_and_reference_lines(plan.recipe, index):
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
    if process.is_rank0:
        found, damaged = checkpoint.newest(root)
        for path, damage in damaged.items():
            log.warning("%s is damaged: %s", path, damage)
            log.warning("going on from the one before; moved it to %s", checkpoint.set_aside(path))
        step = found.step if found else 0
    step = broadcast_from_rank0(step, process.device)
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
