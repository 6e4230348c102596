"""What a run reads and checks before it loads the model."""

from __future__ import annotations

import logging
import socket
import statistics
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from flux2_ds.config.adapter import ADAPTER_KINDS
from flux2_ds.config.memory import GIB, Memory, trained_parameters
from flux2_ds.config.model_files import model_directory
from flux2_ds.config.model_spec import Spec, read_spec
from flux2_ds.config.plan import Plan, make_plan
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.dataset import (
    build_order,
    check_run,
    data_warnings,
    length_line,
    mask_and_reference_lines,
    read_data,
    validation_line,
)
from flux2_ds.data.index import Index
from flux2_ds.data.order import Order
from flux2_ds.data.shards import read_conditioning
from flux2_ds.distributed import Process, broadcast_from_rank0
from flux2_ds.errors import UserError, counted
from flux2_ds.run.logging import FILE_ONLY
from flux2_ds.run.metrics import METRICS_NAME, read_metrics
from flux2_ds.training.previews import open_reference

log = logging.getLogger("flux2_ds")


@dataclass(frozen=True)
class Inputs:
    """What a rank has read and checked before it loads the model."""

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
    """The model's directory and the data, as far as they decide whether the run can start. Collective."""
    plan = make_plan(recipe, process.world_size)
    parts = ["transformer"] if recipe.preview.every is None else ["transformer", "vae", "scheduler"]
    directory = model_directory(recipe.model.path, recipe.model.revision, parts)
    spec = read_spec(directory, allow_distilled=recipe.model.allow_distilled)
    index, held_out = read_data(recipe)
    check_same(index, recipe, process)
    check_run(recipe, (index, held_out), spec, directory)
    if recipe.preview.every is not None:
        for path in recipe.preview.references:
            open_reference(path, recipe.preview)
    conditioning = read_conditioning(recipe.data.shards, index)
    order = build_order(recipe, index)
    return Inputs(plan, process, directory, spec, index, held_out, order, conditioning)


def check_same(index: Index, recipe: Recipe, process: Process) -> None:
    """Refuse an index that differs from rank 0's, with which each rank would follow its own
    order. Collective.
    """
    own = int(index.digest, 16) >> 1  # 63 bits
    if broadcast_from_rank0(own, process.device) != own:
        raise UserError(
            f"the index of data.shards {recipe.data.shards} on {socket.gethostname()} is not rank "
            "0's. Wait until prepare and all copies are finished, and start again."
        )


def log_plan(inputs: Inputs) -> None:
    """Log the arithmetic of the run."""
    plan, index, order = inputs.plan, inputs.index, inputs.order
    for line in [f"variant    {inputs.spec}", *plan.lines(inputs.spec)]:
        log.info(line, extra={"console": line.startswith("ignored")})
    log.info(
        "data       %s in %s, %s",
        counted(index.samples, "sample"),
        counted(len(index.shards), "shard"),
        length_line(plan.recipe, order),
        extra=FILE_ONLY,
    )
    for line in mask_and_reference_lines(plan.recipe, index):
        log.info("           %s", line, extra=FILE_ONLY)
    for bucket, count in index.bucket_counts().items():
        repeated = order.repeated(bucket)
        log.info(
            "  %-10s %s, batches an epoch: %s%s",
            bucket,
            counted(count, "sample"),
            round(order.batches[bucket], 2),
            f", {repeated} places repeat a sample" if repeated else "",
            extra=FILE_ONLY,
        )
    for line in data_warnings(plan.recipe, order, inputs.held_out):
        log.warning(line)
    if inputs.held_out.samples:
        log.info("held out   %s", validation_line(plan.recipe, inputs.held_out), extra=FILE_ONLY)


def log_banner(inputs: Inputs, expected: Memory, first_step: int) -> None:
    """Say on the console what is about to be trained, for a reader of five seconds.

    `expected`: the memory that it should take.
    """
    recipe, index, plan = inputs.recipe, inputs.index, inputs.plan
    device, buckets = inputs.process.device, len(index.bucket_counts())
    card, room = f"CPU process{'es' * (plan.processes > 1)}", ""
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        room = f" of {torch.cuda.get_device_properties(device).total_memory / GIB:.0f}"
    method = "full fine-tune"
    if recipe.method != "full":
        method = f"{ADAPTER_KINDS[recipe.method]} rank {recipe.lora.rank}"
    trained = trained_parameters(inputs.spec, recipe)
    of_steps = (recipe.steps - first_step) * recipe.batch.global_size
    epochs = of_steps / recipe.batch.global_size / inputs.order.steps_per_epoch
    facts = {
        "model": f"{recipe.model.path}, {method}, {trained / 1e6:.3g} M parameters, {recipe.precision}"
        + (f" over {recipe.base_weights}" if recipe.base_weights else "")
        + (", multiplied in fp8" if recipe.compute == "fp8" else ""),
        "data": f"{index.samples:,} samples in {counted(buckets, 'bucket')}"
        + (f", {inputs.held_out.samples:,} held out" if inputs.held_out.samples else ""),
        "on": f"{plan.processes} × {card}, ZeRO stage {plan.zero_stage}",
        "batch": f"{recipe.batch.global_size} = {recipe.batch.micro_size} micro × {plan.accumulation} "
        f"accumulation × {plan.processes}",
        "steps": f"{first_step:,} → {recipe.steps:,}, {of_steps:,} samples, {epochs:.3g} epochs",
        "memory": f"{expected.on_card / GIB:.1f}{room} GiB a GPU planned",
        "run": recipe.run_dir,
    }
    if device.type == "cpu":
        del facts["memory"]
    paces = [
        record["perf/seconds_per_step"]
        for record in read_metrics(Path(recipe.run_dir) / METRICS_NAME)
        if record.get("perf/seconds_per_step")
    ]
    facts["time"] = "known after the first steps"
    if paces:  # of an earlier start
        seconds = statistics.median(paces) * (recipe.steps - first_step)
        facts["time"] = f"{timedelta(seconds=round(seconds))} at the pace until now"
    rule = "─" * 72
    rows = [f"  {name:8}{fact}" for name, fact in facts.items()]
    log.info("\n".join(["training", rule, *rows, rule]))
