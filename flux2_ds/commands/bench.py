"""Time the recipe's own training step, on random weights of the true shapes.

    flux2-ds bench --config RECIPE [--width 768 --height 1344] [--against diffusers] [--json] [--result FILE]

The image is the recipe's largest unless `--width` and `--height` say otherwise.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from flux2_ds.config.adapter import adapted_linears
from flux2_ds.config.bench_options import add_options, bench_bucket, check_options
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import GIB, Memory, out_of_memory
from flux2_ds.config.model_spec import (
    TEXT_TOKENS,
    TOKEN_CHANNELS,
    Spec,
    planned_spec,
)
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.plan import Plan, make_plan, streamed_blocks
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.loader import MicroBatch
from flux2_ds.distributed import (
    Process,
    all_gather_object,
    barrier,
    destroy_process_group,
    init_process_group,
)
from flux2_ds.engine import optimizers
from flux2_ds.engine.streamed_base import streamed_base
from flux2_ds.engine.zero3 import make_partitioner
from flux2_ds.errors import UserError, run_root
from flux2_ds.model import latents, transformer
from flux2_ds.model.load import fill_randomly
from flux2_ds.run.atomic import atomic_write_text, make_private
from flux2_ds.run.environment import rank_and_world_size
from flux2_ds.run.logging import set_up_console, set_up_log, stdout_to_stderr
from flux2_ds.run.run_dir import with_adapter_file
from flux2_ds.run.watchdog import Watchdog
from flux2_ds.training.build import (
    build_engine,
    build_objective,
    check_machine,
    finish_model,
    placed,
)
from flux2_ds.training.loss import FlowObjective
from flux2_ds.training.step import train_step
from flux2_ds.training.warmup import synthetic

log = logging.getLogger("flux2_ds")

Step = Callable[[], torch.Tensor]
"""One step; returns its loss."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one kind of step on the slowest rank; `peak_bytes` of the rank that takes most."""

    first_seconds: float
    seconds: float
    fastest: float
    peak_bytes: int


@dataclass(frozen=True)
class Built:
    """What is timed, and the memory that one process should take."""

    model: nn.Module
    objective: FlowObjective
    batches: list[MicroBatch]
    expected: Memory
    step: Step


def main() -> None:
    """Entry point of `flux2_ds.commands.bench`, one call in each process."""
    parser = recipe_parser("flux2-ds bench", "Time the recipe's training step.")
    add_options(parser)
    recipe, options = parse_recipe(parser)
    recipe = with_adapter_file(recipe)
    rank, world_size = rank_and_world_size(os.environ)
    with watched(rank, world_size):
        if options.json:
            log.setLevel(logging.WARNING)
        with stdout_to_stderr():
            result = bench(recipe, options)
        if rank == 0:
            text = json.dumps(result, indent=2)
            print(text if options.json else "\n".join(lines(result)), flush=True)
            if options.result is not None:  # last: the launcher takes it for the end
                path = Path(options.result)
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_text(path, text + "\n")


@contextmanager
def watched(rank: int, world_size: int) -> Iterator[None]:
    """Log, and end all processes when one of them fails, as training does.

    The logs are in a temporary directory, which stays if a process fails.
    """
    if world_size == 1:
        set_up_console()
        yield
        return
    # The launcher is the parent of all processes.
    logs = Path(tempfile.gettempdir()) / f"flux2-ds-bench-{os.getuid()}-{os.getppid()}"
    make_private(logs)
    with Watchdog(logs, rank, world_size, hang_timeout_s=0):
        set_up_log(logs, rank)
        yield
    for path in logs.glob(f"rank_{rank}.*"):
        path.unlink()
    with suppress(OSError):  # another rank's files are still in it
        logs.rmdir()


def bench(recipe: Recipe, options: Any) -> dict[str, Any]:
    """Time the recipe's step, and what else the options ask for. Collective."""
    process = init_process_group(recipe.launch.accelerator)
    plan = make_plan(recipe, process.world_size)
    check_options(options, plan)
    bucket = bench_bucket(options, recipe)
    device, on_card = process.device, process.device.type == "cuda"
    if options.card is not None and on_card:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.card * GIB / total), device)
    spec = planned_spec(recipe.model.path, recipe.model.revision)
    check_machine(plan, device)
    plan = placed(plan, spec, process, bucket.tokens)
    recipe = plan.recipe
    result = setup(plan, spec, bucket, process)
    log.info(
        "bench      %s, %s, %s in micro-batches of %d, on %s",
        *(spec, recipe.method, bucket, recipe.batch.micro_size, result["card"]),
    )

    def timed(what: str, step: Step) -> Timing:
        return measure(step, process, options.warm_up, options.measure, what)

    theirs = bare = None
    if options.against == "diffusers":
        # First, because it leaves nothing behind.
        theirs = timed("diffusers' loop", diffusers_step(spec, recipe, bucket, device))
        gc.collect()
    if on_card:
        result["gemm_tflops"] = gemm_speed(process)
        torch.cuda.empty_cache()
    this, built = psutil.Process(), None
    resident = this.memory_info().rss
    try:
        built = build(plan, spec, bucket, process)
        if options.against == "bare":
            plain = bare_step(built.model, recipe, built.objective, built.batches)
            bare = timed("bare step", plain)
        timing = timed("step", built.step)
    except torch.OutOfMemoryError as error:
        spare = built.expected.spare if built else []
        message = out_of_memory(recipe, "step", str(bucket), error, spare)
        raise UserError(message) from error
    grown = this.memory_info().rss - resident

    work = spec.step_flops(bucket.tokens, recipe.method) * recipe.batch.global_size
    result |= {
        "cuda_graphs": built.expected.records,
        "cache_transposed_base": built.expected.transposes,
        "first_step_seconds": (bare or timing).first_seconds,
        "seconds_per_step": timing.seconds,
        "fastest_seconds_per_step": timing.fastest,
        "samples_per_second": recipe.batch.global_size / timing.seconds,
        "tflops_per_process": work / process.world_size / timing.seconds / 1e12,
    }
    if on_card:
        result["share_of_gemm"] = result["tflops_per_process"] / result["gemm_tflops"]
        # Replaying CUDA graphs allocates nothing; what recorded them, did.
        result["peak_gib"] = max(timing.peak_bytes, bare.peak_bytes if bare else 0) / GIB
        result["predicted_gib"] = built.expected.on_card / GIB
        if built.expected.needed_on_host:
            result["host_gib"] = max(all_gather_object(grown)) / GIB
            result["predicted_host_gib"] = built.expected.needed_on_host / GIB
    if theirs is not None:
        seconds = theirs.seconds * plan.accumulation
        result["diffusers_seconds_per_step"] = seconds
        result["diffusers_peak_gib"] = theirs.peak_bytes / GIB
        result["speedup"] = seconds / timing.seconds
    if bare is not None:
        result["bare_seconds_per_step"] = bare.seconds
        result["engine_cost"] = timing.seconds / bare.seconds - 1
    if options.profile is not None:
        result["kernels"] = costliest_kernels(built.step, Path(options.profile), process)
    destroy_process_group()
    return result


def setup(plan: Plan, spec: Spec, bucket: Bucket, process: Process) -> dict[str, Any]:
    """What is timed, on what."""
    recipe, on_card = plan.recipe, process.device.type == "cuda"
    offload = " offload" * plan.offloads("offload_optimizer")
    settings = (
        *("base_placement", "base_resident"),
        *("activation_checkpointing", "offload_activations"),
    )
    return {
        "model": f"{recipe.model.path} ({spec})",
        "method": recipe.method,
        "rank": recipe.lora.rank,
        "targets": recipe.lora.targets,
        "base_weights": recipe.base_weights or recipe.precision,
        "compute": recipe.compute,
        **{name: getattr(recipe, name) for name in settings},
        "deepspeed": f"ZeRO {plan.zero_stage}{offload}",
        "image": str(bucket),
        "processes": process.world_size,
        "global_batch": recipe.batch.global_size,
        "micro_batch": recipe.batch.micro_size,
        "card": torch.cuda.get_device_name(process.device) if on_card else "CPU",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def build(plan: Plan, spec: Spec, bucket: Bucket, process: Process) -> Built:
    """The recipe's step on this rank's share of a global batch of noise. Collective."""
    recipe, device = plan.recipe, process.device
    dtype = transformer.compute_dtype(recipe.precision)
    model = transformer.empty_transformer(spec)
    partition = make_partitioner(plan.deepspeed) if plan.zero_stage == 3 else None
    streamed = streamed_blocks(recipe, spec.blocks)
    with streamed_base(model, streamed, device, plan.shard_group) as base:
        fill_randomly(model, dtype, recipe.base_weights, device, partition, base)
    transformer.keep_timestep_exact(model)
    expected = finish_model(model, spec, plan, process, bucket.tokens)
    engine = build_engine(model, plan)
    conditioning = {
        "latent_mean": torch.zeros(TOKEN_CHANNELS),
        "latent_std": torch.ones(TOKEN_CHANNELS),
    }
    objective = build_objective(recipe, spec, conditioning, device)
    first = process.rank * plan.accumulation
    batches = [
        synthetic(recipe.batch.micro_size, spec.text_width, bucket, seed=number)
        for number in range(first, first + plan.accumulation)
    ]

    def step() -> torch.Tensor:
        return train_step(engine, objective, batches, recipe.optimizer.learning_rate)[-1]

    return Built(model, objective, batches, expected, step)


def bare_step(
    model: nn.Module, recipe: Recipe, objective: FlowObjective, batches: list[MicroBatch]
) -> Step:
    """The recipe's step in plain torch, on the same model."""
    trained = list(transformer.trainable(model).values())
    forward = transformer.predictor(model)
    adam = optimizers.build(recipe.optimizer, trained, fused=objective.device.type == "cuda")

    def step() -> torch.Tensor:
        for batch in batches:
            loss = objective.loss(forward, batch)
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.optimizer.max_grad_norm or math.inf)
        adam.step()
        adam.zero_grad()
        return loss.detach()

    return step


def diffusers_step(spec: Spec, recipe: Recipe, bucket: Bucket, device: torch.device) -> Step:
    """The step of diffusers' LoRA example for FLUX.2, one micro-batch: bf16 base, PEFT, gradient
    checkpointing, autocast, fused AdamW."""
    model = transformer.empty_transformer(spec)
    fill_randomly(model, torch.bfloat16, None, device)
    model.requires_grad_(False)
    names = list(adapted_linears(spec, recipe.lora))
    rank = recipe.lora.rank
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    model.enable_gradient_checkpointing()
    model.train()
    on_card = device.type == "cuda"
    adam = torch.optim.AdamW(trained, lr=recipe.optimizer.learning_rate, fused=on_card)
    size = recipe.batch.micro_size
    tokens = torch.randn(size, bucket.tokens, TOKEN_CHANNELS, device=device)
    text = torch.randn(size, TEXT_TOKENS, spec.text_width, device=device, dtype=torch.bfloat16)
    guidance = torch.ones(size, device=device) if spec.guidance else None

    def step() -> torch.Tensor:
        noise = torch.randn_like(tokens)
        t = torch.rand(size, device=device)
        mixed = torch.lerp(tokens, noise, t[:, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            prediction = model(
                hidden_states=mixed.bfloat16(),
                encoder_hidden_states=text,
                timestep=t,
                img_ids=latents.image_ids(bucket.height, bucket.width, device),
                txt_ids=latents.text_ids(TEXT_TOKENS, device),
                guidance=guidance,
                return_dict=False,
            )[0]
        loss = functional.mse_loss(prediction.float(), noise - tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()
        return loss.detach()

    return step


def measure(step: Step, process: Process, warm_up: int, count: int, what: str = "") -> Timing:
    """Time `count` steps in a row, three times. Collective.

    As in training, the host waits for the device at the end only; the ranks begin together. `what`
    names the step in the progress lines.
    """
    device, alone = process.device, process.world_size == 1
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def run(steps: int, purpose: str) -> float:
        wait()
        if not alone:
            barrier()
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        wait()
        seconds = (time.perf_counter() - start) / steps
        if not math.isfinite(float(loss)):
            raise UserError(f"the loss of the synthetic steps is {float(loss)}.")
        seconds = seconds if alone else max(all_gather_object(seconds))
        if what:
            log.info("%s, %s: %d × %.3f s", what, purpose, steps, seconds)
        return seconds

    first = run(1, "first step")
    run(warm_up, "warm-up")
    runs = [run(count, f"run {number} of 3") for number in (1, 2, 3)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    if not alone:
        peak = max(all_gather_object(peak))
    return Timing(first, statistics.median(runs), min(runs), peak)


def gemm_speed(process: Process) -> float:
    """TFLOP/s of a bf16 product of 8192³ on the slowest card, all of them at work. Collective."""
    a, b = (torch.randn(8192, 8192, device=process.device, dtype=torch.bfloat16) for _ in range(2))
    timing = measure(lambda: (a @ b)[0, 0], process, 5, 10)
    return 2 * 8192**3 / timing.seconds / 1e12


def costliest_kernels(
    step: Step, path: Path, process: Process, count: int = 10
) -> list[dict[str, Any]]:
    """Profile one step, write rank 0's trace, and name its costliest kernels. Collective."""
    if not process.is_rank0:
        step()
        return []
    on_card = process.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        if on_card:
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))

    def cost(event: Any) -> float:
        return float(event.self_device_time_total if on_card else event.self_cpu_time_total)

    events = sorted(profiler.key_averages(), key=cost, reverse=True)[:count]
    return [
        {"kernel": event.key, "calls": event.count, "milliseconds": cost(event) / 1e3}
        for event in events
    ]


def lines(result: dict[str, Any]) -> list[str]:
    """The result, for people."""
    kernels = result.pop("kernels", [])
    return [
        f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}"
        for name, value in result.items()
    ] + [f"{k['milliseconds']:8.2f} ms {k['calls']:5d} × {k['kernel'][:90]}" for k in kernels]


if __name__ == "__main__":
    run_root(main)
