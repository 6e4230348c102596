"""Bench: the recipe's own training step, with random weights of the true shapes and synthetic batches.

    flux2-ds bench --config recipes/h100x1.yaml --against diffusers

Nothing is downloaded and no shards are read, so that it tells what a card will do before 64 GB are
fetched. One GPU.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.modeling_utils import no_init_weights
from peft import LoraConfig
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from flux2_ds import optimizers
from flux2_ds.assembly import build_engine, build_objective, check_machine, finish_model
from flux2_ds.data.buckets import Bucket
from flux2_ds.data.loader import MicroBatch
from flux2_ds.engine import divider, start_process, stop_process
from flux2_ds.errors import UserError, run_root
from flux2_ds.memory import GIB
from flux2_ds.model import latents, transformer
from flux2_ds.model.quantize import BASE_WEIGHTS
from flux2_ds.model.weights import place_weight
from flux2_ds.objective import FlowObjective
from flux2_ds.plan import make_plan
from flux2_ds.recipe import Recipe, parse_recipe, recipe_parser
from flux2_ds.spec import TEXT_TOKENS, TOKEN_CHANNELS, Spec, planned_spec
from flux2_ds.targets import target_modules
from flux2_ds.warmup import synthetic

log = logging.getLogger("flux2_ds")

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Timing:
    """Of one kind of step, on one card."""

    first_seconds: float
    seconds: float
    fastest: float
    peak_bytes: int


def main() -> None:
    """Entry point of `flux2-ds bench`."""
    parser = recipe_parser("flux2-ds bench", "Time the recipe's training step.")
    add = parser.add_argument
    add("--width", type=int, default=1024, help="Of the pictures, in px.")
    add("--height", type=int, default=1024, help="Of the pictures, in px.")
    add("--measure", type=int, default=10, help="Steps in a row that are timed, three times.")
    add("--warm-up", type=int, default=3, help="Steps before them.")
    add("--card", type=float, default=None, help="Use no more than so many GiB of the card.")
    add(
        "--against",
        choices=["diffusers", "bare"],
        help="Also time the loop of diffusers' example, or the same step without DeepSpeed.",
    )
    add("--profile", type=str, default=None, help="Write a trace here; list the costliest kernels.")
    add("--json", action="store_true", help="Print one JSON object.")
    recipe, options = parse_recipe(parser)
    logging.basicConfig(format="%(message)s", force=True)
    log.setLevel(logging.WARNING if options.json else logging.INFO)
    if options.width % 16 or options.height % 16 or min(options.width, options.height) < 16:
        raise UserError("--width and --height must be multiples of 16.")
    if options.measure < 1 or options.warm_up < 1:
        raise UserError("--measure and --warm-up must be at least 1.")
    bucket = Bucket(options.height, options.width)
    result = bench(recipe, bucket, options)
    print(json.dumps(result, indent=2) if options.json else "\n".join(lines(result)))


def bench(recipe: Recipe, bucket: Bucket, options: Any) -> dict[str, Any]:
    """Time the recipe's step, and what else the options ask for."""
    process = start_process(recipe.launch.accelerator)
    if process.world > 1:
        raise UserError("bench measures one process. Start it with flux2-ds bench.")
    device, on_card = process.device, process.device.type == "cuda"
    if options.card is not None and on_card:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.card * GIB / total), device)
    plan = make_plan(recipe, process.world)
    spec = planned_spec(recipe.model.path)
    check_machine(plan, device)

    result: dict[str, Any] = {
        "model": f"{recipe.model.path} ({spec})",
        "method": recipe.method,
        "rank": recipe.lora.rank,
        "targets": recipe.lora.targets,
        "base_weights": recipe.base_weights or recipe.precision,
        "activations": recipe.activations,
        "offload_activations": recipe.offload_activations,
        "deepspeed": f"ZeRO {plan.zero_stage}"
        + (" offload" if plan.offloads("offload_optimizer") else ""),
        "picture": str(bucket),
        "batch": f"{plan.accumulation} × {recipe.batch.micro_size}",
        "card": torch.cuda.get_device_name(device) if on_card else "CPU",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    plain = None
    if options.against == "bare" and (plan.zero_stage or recipe.method == "full"):
        raise UserError(
            "--against bare is plain torch, without ZeRO and fp32 masters. Set deepspeed: zero0 and method: lora."
        )
    if options.against == "diffusers":
        # First, because it leaves nothing behind.
        plain = measure(
            diffusers_step(spec, recipe, bucket, device), device, options.warm_up, options.measure
        )
        gc.collect()
    if on_card:
        result["gemm_tflops"] = gemm_speed(device)
        torch.cuda.empty_cache()

    dtype = transformer.compute_dtype(recipe.precision)
    divide = divider(plan.deepspeed) if plan.zero_stage == 3 else None
    model = random_transformer(spec, dtype, recipe.base_weights, device, divide)
    transformer.keep_timestep_exact(model)
    expected = finish_model(model, spec, plan, process, bucket.tokens)
    result["cuda_graphs"] = expected.records
    engine = build_engine(model, plan)
    conditioning = {
        "latent_mean": torch.zeros(TOKEN_CHANNELS),
        "latent_std": torch.ones(TOKEN_CHANNELS),
    }
    objective = build_objective(recipe, spec, conditioning, device)
    batches = [
        synthetic(recipe.batch.micro_size, spec.text_width, bucket, seed=number)
        for number in range(plan.accumulation)
    ]

    def step() -> torch.Tensor:
        for batch in batches:
            loss = objective.loss(engine.forward, batch)
            engine.backward(loss)
            engine.step(recipe.optimizer.learning_rate)
        return loss.detach()

    bare = None
    if options.against == "bare":
        bare = measure(
            bare_step(model, recipe, objective, batches), device, options.warm_up, options.measure
        )
    timing = measure(step, device, options.warm_up, options.measure)
    work = useful_flops(spec, bucket, recipe.method) * recipe.batch.global_size
    result |= {
        "first_step_seconds": (bare or timing).first_seconds,
        "seconds_per_step": timing.seconds,
        "fastest_seconds_per_step": timing.fastest,
        "samples_per_second": recipe.batch.global_size / timing.seconds,
        "tflops": work / timing.seconds / 1e12,
    }
    if on_card:
        result["share_of_gemm"] = result["tflops"] / result["gemm_tflops"]
        # Replaying CUDA graphs allocates nothing; what recorded them, did.
        result["peak_gib"] = max(timing.peak_bytes, bare.peak_bytes if bare else 0) / GIB
        result["predicted_gib"] = expected.on_card / GIB
    if plain is not None:
        result["diffusers_seconds_per_step"] = plain.seconds * plan.accumulation
        result["diffusers_peak_gib"] = plain.peak_bytes / GIB
        result["speedup"] = plain.seconds * plan.accumulation / timing.seconds
    if bare is not None:
        result["bare_seconds_per_step"] = bare.seconds
        result["engine_cost"] = timing.seconds / bare.seconds - 1
    if options.profile is not None:
        result["kernels"] = costliest_kernels(step, Path(options.profile))
    stop_process()
    return result


def random_transformer(
    spec: Spec,
    dtype: torch.dtype,
    base_weights: str | None,
    device: torch.device,
    divide: Callable[[nn.Module], None] | None = None,
) -> Flux2Transformer2DModel:
    """A transformer of the spec's shapes with random weights, quantised and divided one by one."""
    model = empty_transformer(spec)
    for name, parameter in list(model.named_parameters()):
        weight = torch.ones(parameter.shape, device=device, dtype=dtype)
        if weight.ndim > 1:
            weight.normal_(0, 1 / math.sqrt(weight.shape[1]))
        module = place_weight(model, name, weight, BASE_WEIGHTS.get(base_weights or ""))
        if divide is not None:
            divide(module)
    return model


def empty_transformer(spec: Spec) -> Flux2Transformer2DModel:
    """A transformer of the spec's shapes on the meta device."""
    with torch.device("meta"), no_init_weights():
        return transformer.new_transformer(spec)


def measure(step: Step, device: torch.device, warm_up: int, count: int) -> Timing:
    """Time `count` steps in a row, the host waiting at the end only, as in training; three times."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def run(steps: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        wait()
        if not math.isfinite(float(loss)):
            raise UserError(f"the loss of the synthetic steps is {float(loss)}.")
        return (time.perf_counter() - start) / steps

    first = run(1)
    run(warm_up)
    runs = [run(count) for _ in range(3)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Timing(first, statistics.median(runs), min(runs), peak)


def useful_flops(spec: Spec, bucket: Bucket, method: str) -> float:
    """Floating-point operations of one sample's step in the blocks, nothing computed twice.

    The backward pass has as many as the forward pass in the linears, with method full as many again for
    the weights' gradients, and 2.5 times as many in attention. An adapter's own are not counted.
    """
    linear, attention = spec.forward_flops(bucket.tokens)
    return (3 if method == "full" else 2) * linear + 3.5 * attention


def gemm_speed(device: torch.device) -> float:
    """TFLOP/s of a bf16 product of 8192³ on this card."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    timing = measure(lambda: (a @ b)[0, 0], device, 5, 10)
    return 2 * 8192**3 / timing.seconds / 1e12


def costliest_kernels(step: Step, path: Path, count: int = 10) -> list[dict[str, Any]]:
    """Profile one step, write its trace, and name its costliest kernels."""
    on_card = torch.cuda.is_available()
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
    model = random_transformer(spec, torch.bfloat16, None, device)
    model.requires_grad_(False)
    names = target_modules(spec, recipe.lora.targets)
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


def lines(result: dict[str, Any]) -> list[str]:
    """The result, for people."""
    kernels = result.pop("kernels", [])
    found = [
        f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}"
        for name, value in result.items()
    ]
    return found + [
        f"{each['milliseconds']:8.2f} ms {each['calls']:5d} × {each['kernel'][:90]}"
        for each in kernels
    ]


if __name__ == "__main__":
    run_root(main)
