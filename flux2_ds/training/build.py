"""From a plan to the model that is trained, and from its shards to what it is trained on."""

from __future__ import annotations

import json
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel

from flux2_ds.config.autofit import CHOSEN, Room, choices, place_base
from flux2_ds.config.memory import GIB, Memory, estimate, kept_blocks, trained_parameters
from flux2_ds.config.model_files import base_digest
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.plan import Plan, compiles, streamed_blocks
from flux2_ds.config.recipe import Preservation, Recipe, recipe_values
from flux2_ds.data.cache import Cache
from flux2_ds.data.index import Index
from flux2_ds.data.loader import Loader, MicroBatch, Share
from flux2_ds.data.order import Order, ValidationOrder
from flux2_ds.data.shards import read_prompts
from flux2_ds.data.storage import Blob
from flux2_ds.distributed import (
    Process,
    all_gather_object,
    barrier,
)
from flux2_ds.engine.engine import Engine
from flux2_ds.engine.streamed_base import streamed_base
from flux2_ds.engine.zero3 import check_zero, gathering, make_partitioner
from flux2_ds.errors import UserError
from flux2_ds.model import transformer
from flux2_ds.model.activation_checkpointing import blocks_of, configure_blocks
from flux2_ds.model.adapter_layouts import diffusers_tensors
from flux2_ds.model.adapter_programs import read_file, read_merges
from flux2_ds.model.attention import attention_backend, check_backend
from flux2_ds.model.cuda_graphs import use_cuda_graphs
from flux2_ds.model.load import (
    Edit,
    as_stored,
    card_of,
    check_card,
    read_partitioned,
    read_weights,
)
from flux2_ds.model.lora import set_adapter
from flux2_ds.model.merge import BaseWeights, Merges, initial_adapter, merge_into
from flux2_ds.model.safetensors_file import write_adapter
from flux2_ds.ops.quantized_linear import QuantizedLinear
from flux2_ds.run.atomic import atomic_path
from flux2_ds.run.environment import free_host_memory
from flux2_ds.run.logging import FILE_ONLY
from flux2_ds.run.metrics import Metrics
from flux2_ds.run.run_dir import INITIAL_ADAPTER, merged_files, validation_history, versions
from flux2_ds.run.watchdog import Watchdog
from flux2_ds.training.cadence import Cadence
from flux2_ds.training.checkpoints import Checkpoints, note_base_files
from flux2_ds.training.inputs import Inputs
from flux2_ds.training.loss import FlowObjective, LossParts
from flux2_ds.training.nonfinite import NonFinite
from flux2_ds.training.previews import Previews, as_prompt
from flux2_ds.training.progress import Facts, Progress
from flux2_ds.training.stop import StopRequest
from flux2_ds.training.validation import ValidationLoss

log = logging.getLogger("flux2_ds")


def build_model(
    directory: Path,
    spec: Spec,
    plan: Plan,
    process: Process,
    image_tokens: int,
    *,
    resumed: bool = False,
) -> tuple[Flux2Transformer2DModel, Memory]:
    """The transformer in `directory` with what the recipe trains, and the memory this should take.

    `image_tokens`: of the longest sample, reference images included. `resumed`: what is trained comes from
    a checkpoint, not from `lora.init_from`.
    """
    check_machine(plan, process.device)
    plan = placed(plan, spec, process, image_tokens)
    recipe, adapter = plan.recipe, None
    # Before the base, which takes minutes.
    merges = read_merges(recipe.lora, spec)
    if recipe.lora.init != "gaussian":
        initial = Path(recipe.run_dir) / INITIAL_ADAPTER
        if process.is_rank0 and not resumed:
            write_initial_adapter(initial, directory, spec, plan, process, merges)
        barrier()
        adapter = read_file("lora.init", str(initial), spec)
        merges = [*merges, (adapter, -1.0)]
    if recipe.lora.init_from is not None and not resumed:
        adapter = read_file("lora.init_from", recipe.lora.init_from, spec)
    dtype = transformer.compute_dtype(recipe.precision)
    edit = merge_into(merges)
    model = load_as(
        plan.deepspeed,
        directory,
        dtype,
        recipe.base_weights,
        process,
        edit,
        streamed_blocks(recipe, spec.blocks),
        plan.shard_group,
    )
    memory = finish_model(model, spec, plan, process, image_tokens)
    if adapter is not None:
        set_adapter(model, adapter)
    return model, memory


def write_initial_adapter(
    path: Path, directory: Path, spec: Spec, plan: Plan, process: Process, merges: Merges
) -> None:
    """Write what `lora.init` lets the adapter begin as; a run that continues needs it, because it is not in the base."""
    settings = plan.recipe.lora
    base = BaseWeights(directory / "transformer", merges)
    with torch.random.fork_rng(devices=[process.device] if process.device.type == "cuda" else []):
        torch.manual_seed(plan.recipe.seed)  # of the iteration's start
        tensors = diffusers_tensors(initial_adapter(base, spec, settings, process.device))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as unfinished:
        write_adapter(unfinished, tensors, {"flux2_ds.lora": json.dumps(asdict(settings))})


def placed(plan: Plan, spec: Spec, process: Process, image_tokens: int) -> Plan:
    """The plan with `base_placement: auto` decided; refuses a base that is not there to be placed. Collective."""
    recipe = plan.recipe
    if recipe.base_placement == "gpu":
        return plan
    hosts = all_gather_object(socket.gethostname())
    if recipe.launch.processes is None and len(found := {hosts.count(each) for each in hosts}) == 1:
        recipe = replace(recipe, launch=replace(recipe.launch, processes=found.pop()))
        plan = replace(plan, recipe=recipe)
    host = free_host_memory() / hosts.count(socket.gethostname())
    free = all_gather_object((free_memory(process.device), host))
    card, host = (min(each) for each in zip(*free, strict=True))
    room = Room(plan.processes, image_tokens, card, host, card_of(process.device))
    if recipe.base_placement == "auto":
        plan = replace(plan, recipe=(recipe := place_base(recipe, spec, room)))
        log.info(
            "placement  %s, %.0f %% of the blocks resident",
            recipe.base_placement,
            100 * (recipe.base_resident if recipe.base_placement != "gpu" else 1),
        )
    memory = estimate(spec, plan, image_tokens, 0, 0)
    parts = ("base weights", "streaming buffers", "adapter")
    needed = sum(memory.card.get(part, 0.0) for part in parts)
    if needed > card or memory.needed_on_host > host:
        fits = "Nothing fits: use a larger card or host, or a smaller model."
        if fitting := choices(recipe, spec, room):
            settings = (f"{name}: {getattr(fitting[0].recipe, name)}" for name in CHOSEN)
            fits = f"This fits: {', '.join(settings)}."
        raise UserError(
            f"base_placement is {recipe.base_placement}, and the weights take {needed / GIB:.1f} GiB of a card and "
            f"{memory.needed_on_host / GIB:.1f} GiB of host memory for each process; free are {card / GIB:.1f} and "
            f"{host / GIB:.1f} GiB. {fits}"
        )
    return plan


def load_as(
    config: dict[str, Any],
    directory: Path,
    dtype: torch.dtype,
    base_weights: str | None,
    process: Process,
    edit: Edit = as_stored,
    streamed: Sequence[int] = (),
    shard_group: int | None = None,
) -> Flux2Transformer2DModel:
    """The transformer in `directory`, partitioned where `config` has ZeRO-3. `streamed`, `shard_group`: see
    `StreamedBase`."""
    with torch.device("meta"):
        model = transformer.build_transformer(directory)
    files, device = directory / "transformer", process.device
    if config.get("zero_optimization", {}).get("stage") == 3:
        partition = make_partitioner(config)
        read_partitioned(model, files, dtype, device, partition, process.rank, edit)
    else:
        with streamed_base(model, streamed, device, shard_group) as base:
            read_weights(model, files, dtype, device, base_weights, edit, base)
    return model


def finish_model(
    model: Flux2Transformer2DModel, spec: Spec, plan: Plan, process: Process, image_tokens: int
) -> Memory:
    """Add what the recipe trains and set how the blocks run; returns the memory this should take.

    `image_tokens`: of the longest sample, reference images included.
    """
    recipe = plan.recipe
    with gathering(plan.deepspeed if plan.zero_stage == 3 else {}):
        transformer.make_trainable(model, spec, recipe)
    model.train()
    sizes = {n: getattr(p, "ds_numel", p.numel()) for n, p in model.named_parameters()}
    trained = sum(sizes[name] for name in transformer.trainable(model))
    log.info("parameters %s trained", f"{trained:,}", extra=FILE_ONLY)  # the banner has it
    # The same number in all ranks: at stage 3 a block that recomputes has collectives of its own.
    free = free_memory(process.device)
    if process.world_size > 1:
        free = min(all_gather_object(free))
    kept = kept_blocks(spec, plan, image_tokens, free)
    attention = attention_backend(recipe, process.device)
    compiled = compiles(recipe)
    configure_blocks(
        model,
        checkpointed=spec.blocks - kept,
        compiled=compiled,
        attention=attention,
        offload=recipe.offload_activations,
        partitioned=plan.zero_stage == 3,
    )
    expected = estimate(spec, plan, image_tokens, kept, free)
    if expected.transposes:
        try:
            for module in model.modules():
                if isinstance(module, QuantizedLinear):
                    module.cache_transposed()
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the card's memory is not enough to hold the base a second time, transposed "
                f"({str(error).splitlines()[0]}). Remove cache_transposed_base."
            ) from error
    if expected.records:
        use_cuda_graphs(model)
    log.info(
        "blocks     %d of %d checkpoint their activations, %s%s%s%s, attention %s",
        spec.blocks - kept,
        spec.blocks,
        "whose inputs wait in host memory, " if recipe.offload_activations else "",
        "compiled" if compiled else "not compiled",
        ", replayed as CUDA graphs" if expected.records else "",
        ", weights held transposed as well" if expected.transposes else "",
        attention or "by torch",
    )
    return expected


def build_engine(model: Flux2Transformer2DModel, plan: Plan) -> Engine:
    """The model under DeepSpeed."""
    return Engine(
        model,
        plan.deepspeed,
        plan.recipe.optimizer,
        offload_optimizer=plan.offloads("offload_optimizer"),
        sharded=plan.recipe.method == "full",
        compiled=blocks_of(model) if compiles(plan.recipe) else (),
    )


def build_loader(
    recipe: Recipe,
    index: Index,
    order: Order | ValidationOrder,
    process: Process,
    conditioning: dict[str, torch.Tensor],
) -> Loader:
    """This rank's share of the data."""
    data, kept = recipe.data, recipe.preservation
    prompts = read_prompts(data.shards, kept.prompts, index.text_width) if kept.prompts else {}
    return Loader(
        data.shards,
        index,
        order,
        Share(process.rank, process.world_size, recipe.batch.global_size, recipe.batch.micro_size),
        seed=recipe.seed,
        caption_dropout=recipe.objective.caption_dropout,
        empty_text=conditioning["empty_text"],
        reference_dropout=recipe.objective.reference_dropout,
        masked=recipe.objective.masked_loss,
        preservation=kept,
        prompts=list(prompts.values()),
        num_workers=data.num_workers,
        pinned=process.device.type == "cuda",
        fetch=Cache(Path(data.cache), int(data.cache_gb * 1e9)).view if data.cache else Blob.view,
    )


def build_objective(
    recipe: Recipe, spec: Spec, conditioning: dict[str, torch.Tensor], device: torch.device
) -> FlowObjective:
    """Flow matching with the shards' latent statistics."""
    return FlowObjective(
        settings=recipe.objective,
        mean=conditioning["latent_mean"].to(device),
        std=conditioning["latent_std"].to(device),
        guidance=spec.guidance,
        global_batch=recipe.batch.global_size,
        device=device,
        preservation=recipe.preservation,
    )


def free_memory(device: torch.device) -> float:
    """Bytes of the card that this process may still take, with what it holds in reserve; no end on a
    CPU."""
    if device.type != "cuda":
        return math.inf
    total = torch.cuda.get_device_properties(device).total_memory
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return min(free, torch.cuda.get_per_process_memory_fraction(device) * total)


def check_machine(plan: Plan, device: torch.device) -> None:
    """Refuse, before a model is loaded, what this card or the installed packages cannot do."""
    recipe = plan.recipe
    check_zero(plan.deepspeed)
    check_backend(recipe, device)
    check_card(recipe, device)


def build_validation(
    inputs: Inputs,
    engine: Engine,
    objective: FlowObjective,
    first_step: int,
    heartbeat: Callable[[int, str], None],
) -> ValidationLoss | None:
    """The loss on what is held out, with every caption; None if nothing is."""
    recipe, held_out, process = inputs.recipe, inputs.held_out, inputs.process
    if not held_out.samples:
        return None
    wide = replace(recipe.batch, global_size=process.world_size * recipe.batch.micro_size)
    order = ValidationOrder(held_out, recipe.validation.samples, wide.global_size)
    captioned = replace(recipe.objective, caption_dropout=0.0, reference_dropout=0.0)
    kept = Preservation()
    recipe = replace(recipe, batch=wide, objective=captioned, preservation=kept)
    loader = build_loader(recipe, held_out, order, process, inputs.conditioning)
    # Strata are those of a full global batch, which the held-out samples are not.
    objective = replace(
        objective,
        settings=replace(objective.settings, stratified=False),
        preservation=kept,
        forward_base=None,
    )
    return ValidationLoss(
        engine,
        loader,
        objective,
        order,
        [shard.source for shard in held_out.shards],
        against_base=recipe.validation.against_base,
        patience=recipe.validation.patience,
        history=validation_history(recipe, first_step),
        heartbeat=heartbeat,
    )


def build_previews(
    inputs: Inputs,
    engine: Engine,
    metrics: Metrics | None,
    heartbeat: Callable[[int, str], None],
) -> Previews | None:
    """Images of the preview prompts; None if none are wanted."""
    recipe, spec, preview = inputs.recipe, inputs.spec, inputs.recipe.preview
    if preview.every is None:
        return None
    empty = inputs.conditioning["empty_text"][None]
    texts = read_prompts(recipe.data.shards, preview.prompts, spec.text_width)
    prompts = [as_prompt(spec, texts[prompt][None], empty) for prompt in preview.prompts]
    folder = Path(recipe.run_dir) / "previews"
    return Previews(
        engine, preview, spec, inputs.directory, folder, inputs.process, prompts, metrics, heartbeat
    )


@dataclass(frozen=True)
class Run:
    """The parts of a training run. `metrics` is None in all ranks but 0, and where no step is left."""

    recipe: Recipe
    process: Process
    engine: Engine
    objective: FlowObjective
    parts: LossParts | None
    """Of the loss, where it has several."""
    loader: Loader
    first_step: int
    cadence: Cadence
    progress: Progress
    checkpoints: Checkpoints
    validation: ValidationLoss | None
    previews: Previews | None
    metrics: Metrics | None
    stop: StopRequest
    watchdog: Watchdog

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.first_step >= self.recipe.steps

    def steps(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Each step's number, from 0, and this rank's micro-batches, which are read ahead."""
        first, last = self.first_step, self.recipe.steps
        self.watchdog.heartbeat(first + 1, "waiting for data")
        since = time.perf_counter()
        for step, micro_batches in enumerate(self.loader.steps(first, last), start=first):
            self.progress.waited("data", time.perf_counter() - since)
            yield step, micro_batches
            self.watchdog.heartbeat(step + 2, "waiting for data")
            since = time.perf_counter()


def build_metrics(inputs: Inputs, expected: Memory, first_step: int, watchdog: Watchdog) -> Metrics:
    """Rank 0's, with what W&B's table of runs should have beside the recipe."""
    plan, recipe, device = inputs.plan, inputs.recipe, inputs.process.device
    on_card = device.type == "cuda"
    derived = {
        "variant": str(inputs.spec),
        "trained_parameters": trained_parameters(inputs.spec, recipe),
        "world_size": plan.processes,
        "card": torch.cuda.get_device_name(device) if on_card else "CPU",
        "zero_stage": plan.zero_stage,
        "accumulation": plan.accumulation,
        "samples": inputs.index.samples,
        "held_out": inputs.held_out.samples,
        "buckets": {str(bucket): count for bucket, count in inputs.index.bucket_counts().items()},
        "steps_per_epoch": inputs.order.steps_per_epoch,
        "planned_card_gib": expected.on_card / GIB,
        "planned_host_gib": expected.on_host / GIB,
        "versions": versions(),
    }
    return Metrics(
        Path(recipe.run_dir),
        recipe.log,
        config=recipe_values(recipe) | {"derived": derived},
        resumed_at=first_step,
        stall=watchdog.stall,
        patience=recipe.launch.hang_timeout_s / 2,
    )


def run_state(inputs: Inputs, first_step: int) -> dict[str, Any]:
    """What a checkpoint says of its run; digests of the base's files come into it while the training begins."""
    recipe, process = inputs.recipe, inputs.process
    state = {
        "recipe": recipe_values(recipe),
        "versions": versions(),
        "index": inputs.index.digest,
        "base": base_digest(inputs.directory, merged_files(recipe)) if process.is_rank0 else None,
        "processes": process.world_size,
    }
    if process.is_rank0 and first_step < recipe.steps:
        note_base_files(state, recipe, first_step, inputs.directory)
    return state


def build_run(
    inputs: Inputs,
    engine: Engine,
    expected: Memory,
    first_step: int,
    stop: StopRequest,
    watchdog: Watchdog,
) -> Run:
    """Everything that the loop needs, for the steps from `first_step` on. Collective.

    `expected`: the memory that this should take.
    """
    recipe, process, conditioning = inputs.recipe, inputs.process, inputs.conditioning
    loader = build_loader(recipe, inputs.index, inputs.order, process, conditioning)
    objective = build_objective(recipe, inputs.spec, conditioning, process.device)
    if recipe.preservation.uses_base:
        together = inputs.plan.passes_together
        objective = replace(objective, forward_base=engine.forward_base, always_base=together)
    metrics = None
    if process.is_rank0 and first_step < recipe.steps:
        metrics = build_metrics(inputs, expected, first_step, watchdog)
    nonfinite = NonFinite(
        Path(recipe.run_dir) / "nonfinite",
        recipe.optimizer.nonfinite,
        engine.skips_overflows,
        loader.describe,
        process.rank,
        skipped=first_step - engine.state.updates(),
    )
    validation = build_validation(inputs, engine, objective, first_step, watchdog.heartbeat)
    hosts = all_gather_object(socket.gethostname())
    return Run(
        recipe=recipe,
        process=process,
        engine=engine,
        objective=objective,
        parts=LossParts(process.device) if recipe.preservation != Preservation() else None,
        loader=loader,
        first_step=first_step,
        cadence=Cadence(
            steps=recipe.steps,
            log=recipe.log.every,
            checkpoint=recipe.checkpoint.every,
            validation=recipe.validation.every if validation else None,
            preview=recipe.preview.every,
        ),
        progress=Progress(
            engine,
            recipe,
            process,
            metrics,
            nonfinite,
            first_step=first_step,
            facts=Facts(
                spec=inputs.spec,
                samples=inputs.index.samples,
                steps_per_epoch=inputs.order.steps_per_epoch,
                expected=expected,
                hosts=hosts,
            ),
        ),
        checkpoints=Checkpoints(
            engine,
            recipe,
            process,
            run_state(inputs, first_step),
            metrics,
            watchdog.heartbeat,
            local_ranks=hosts.count(socket.gethostname()),
        ),
        validation=validation,
        previews=build_previews(inputs, engine, metrics, watchdog.heartbeat),
        metrics=metrics,
        stop=stop,
        watchdog=watchdog,
    )
