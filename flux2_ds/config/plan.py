"""From a recipe and a number of processes to everything that is derived."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flux2_ds.config.model_spec import Spec
from flux2_ds.config.parse import shipped_directory
from flux2_ds.config.recipe import Recipe, check_ranges
from flux2_ds.config.validate import ignored_settings
from flux2_ds.errors import UserError

_OFFLOADS = ("offload_optimizer", "offload_param")
_DEEPSPEED_KEYS: dict[str, type | tuple[type, ...]] = {
    "zero_optimization": dict,
    "communication_data_type": str,
    "prescale_gradients": bool,
    "gradient_predivide_factor": (int, float),
    "aio": dict,
    "comms_logger": dict,
    "flops_profiler": dict,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "steps_per_print": int,
}
"""What a config may hold, and of which type each is."""
_OWNED_ELSEWHERE = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "wandb": "log.wandb",
}


@dataclass(frozen=True)
class Plan:
    """What a run will do, with every number that the recipe leaves open."""

    recipe: Recipe
    processes: int
    accumulation: int
    deepspeed: dict[str, Any]

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization`."""
        return dict(self.deepspeed.get("zero_optimization", {}))

    @property
    def zero_stage(self) -> int:
        """0 to 3."""
        return int(self.zero.get("stage", 0))

    def offloads(self, part: Literal["offload_optimizer", "offload_param"]) -> bool:
        """Whether that part lives in host memory."""
        return _device(self.zero, part) != "none"

    def lines(self, spec: Spec | None = None) -> list[str]:
        """The arithmetic, for people. `spec`: of the model, where it is known."""
        recipe, batch, adam = self.recipe, self.recipe.batch, self.recipe.optimizer
        method = "full fine-tune"
        if recipe.method != "full":
            alpha = recipe.lora.rank if recipe.lora.alpha is None else recipe.lora.alpha
            method = (
                f"{recipe.method} rank {recipe.lora.rank}, alpha {alpha:g}, "
                f"targets {recipe.lora.targets}"
            )
        return [
            f"model      {recipe.model.path}, {method}, {recipe.precision}, "
            f"base {recipe.base_weights or recipe.precision}",
            f"batch      {batch.global_size} global = {batch.micro_size} micro × "
            f"{self.accumulation} accumulation × {self.processes} processes",
            f"steps      {recipe.steps} = {recipe.steps * batch.global_size} samples",
            f"optimizer  {adam.name}, lr {adam.learning_rate:g} {adam.schedule}, "
            f"warm-up {adam.warmup_steps}, clipping {adam.max_grad_norm:g}"
            + (f", EMA {adam.ema_decay:g}" if adam.ema_decay is not None else ""),
            f"engine     ZeRO stage {self.zero_stage}"
            + (", optimizer offloaded to the CPU" if self.offloads("offload_optimizer") else "")
            + f", activation checkpointing: {recipe.activation_checkpointing}, attention: {recipe.attention}",
            *(f"ignored    {setting}" for setting in ignored_settings(recipe, spec)),
        ]


def make_plan(recipe: Recipe, processes: int) -> Plan:
    """Check the recipe for `processes` processes and derive the rest.

    Raises:
        UserError: an impossible combination, naming the setting, its value and a value that works.
    """
    check_ranges(recipe)
    if processes < 1:
        raise UserError(f"the number of processes is {processes}; it must be at least 1.")
    accumulation = _accumulation(recipe, processes)
    config = read_deepspeed(recipe.deepspeed)
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    _check_precision(recipe, stage)
    check_base(recipe)
    _check_optimizer(recipe, stage, zero)
    for name, why_not in (
        ("cuda_graphs", why_not_captured),
        ("cache_transposed_base", why_not_transposed),
    ):
        if getattr(recipe, name) and (reason := why_not(recipe, stage)):
            raise UserError(f"{name} is true, and {reason}. Change that, or remove {name}.")
    if stage == 3 and compiles(recipe):
        # DeepSpeed's own linear looks at what it has gathered, which no graph can.
        if zero.get("memory_efficient_linear"):
            raise UserError(
                "the deepspeed config sets memory_efficient_linear, which cannot be compiled, and the blocks "
                "are compiled. Remove it, or set compile: false."
            )
        zero = zero | {"memory_efficient_linear": False}
    if zero:
        config["zero_optimization"] = zero
    config |= {
        "train_batch_size": recipe.batch.global_size,
        "train_micro_batch_size_per_gpu": recipe.batch.micro_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        # DeepSpeed knows few optimizers; which ones may be used here, `_check_optimizer` says.
        "zero_allow_untested_optimizer": True,
        # Our own log line replaces DeepSpeed's.
        "steps_per_print": config.get("steps_per_print", 10**9),
        # They would wait for the device twice in every step.
        "timers": {"throughput": {"enabled": False}},
        **_precision_sections(recipe),
    }
    return Plan(recipe, processes, accumulation, config)


def captures(plan: Plan) -> bool:
    """Whether passes are recorded as CUDA graphs: by default, if possible, in bf16."""
    recipe = plan.recipe
    if recipe.cuda_graphs is None:
        return recipe.precision == "bf16" and why_not_captured(recipe, plan.zero_stage) is None
    return recipe.cuda_graphs


def transposable(plan: Plan) -> bool:
    """Whether the base may be held a second time, transposed."""
    return (
        plan.recipe.cache_transposed_base is not False
        and why_not_transposed(plan.recipe, plan.zero_stage) is None
    )


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0), a pure function of the step.

    Linear warm-up over `warmup_steps`, then constant, or decay to 0 at `steps`: cosine, linear, or REX
    (Chen et al. 2021, arXiv:2107.04197), which with z of the decay left is z / (1/2 + z/2).
    """
    adam = recipe.optimizer
    if step < adam.warmup_steps:
        return adam.learning_rate * (step + 1) / adam.warmup_steps
    done = (step - adam.warmup_steps) / max(1, recipe.steps - adam.warmup_steps)
    factor = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "rex": (1 - done) / (0.5 + 0.5 * (1 - done)),
    }[adam.schedule]
    return adam.learning_rate * factor


def _accumulation(recipe: Recipe, processes: int) -> int:
    batch = recipe.batch
    at_once = batch.micro_size * processes
    if batch.global_size % at_once:
        nearest = max(1, round(batch.global_size / at_once)) * at_once
        raise UserError(
            f"batch.global_size {batch.global_size} is not a multiple of batch.micro_size "
            f"{batch.micro_size} × {processes} processes = {at_once}. "
            f"Set batch.global_size to {nearest}, or change micro_size or the number of processes."
        )
    return batch.global_size // at_once


def _check_precision(recipe: Recipe, stage: int) -> None:
    if recipe.precision == "fp16" and recipe.launch.accelerator == "cpu":
        raise UserError(
            "precision is fp16, which DeepSpeed does not offer on the CPU. Set precision to bf16 "
            "or fp32, or launch.accelerator to cuda."
        )
    check_attention(recipe)
    if stage == 0 and _precision_sections(recipe):
        raise UserError(
            f"precision is {recipe.precision} with method {recipe.method}, whose fp32 masters need "
            "ZeRO, and the deepspeed config has stage 0. Set deepspeed: zero1, which costs nothing "
            "on one process, or precision: fp32."
        )


def check_attention(recipe: Recipe) -> None:
    """Refuse a backend that does not go with the precision.

    Raises:
        UserError: naming both.
    """
    if recipe.precision == "fp32" and recipe.attention in ("cudnn", "flash", "flash_attn"):
        raise UserError(
            f"attention is {recipe.attention}, which has 16 bits only, and precision is fp32. Set attention: "
            "auto, or precision: bf16."
        )


def check_base(recipe: Recipe) -> None:
    """Refuse a `base_weights` that does not go with the other settings.

    Raises:
        UserError: naming it and what to do.
    """
    base = recipe.base_weights
    if base is None:
        return
    if recipe.method == "full":
        raise UserError(
            f"base_weights is {base}, but method full trains the base itself. Remove base_weights, or "
            "set method: lora."
        )
    if base == "bf16" and recipe.precision != "bf16":
        raise UserError(
            f"base_weights is bf16 and precision {recipe.precision}; an unquantised base has the dtype "
            "of precision. Remove base_weights, or set precision: bf16."
        )
    if base != "bf16" and recipe.precision == "fp16":
        raise UserError(
            f"base_weights is {base} with precision fp16, whose engine would round the weights' scales. "
            "Set precision: bf16."
        )


def _check_optimizer(recipe: Recipe, stage: int, zero: dict[str, Any]) -> None:
    """Refuse what DeepSpeed cannot do, with the nearest thing that works."""
    adam = recipe.optimizer
    if adam.name in ("adafactor", "prodigy", "muon") and stage > 0:
        reason = {
            "adafactor": "factors each matrix, and ZeRO flattens the matrices",
            "muon": "orthogonalises each matrix, and ZeRO flattens the matrices",
            "prodigy": "finds one step size from all weights, and ZeRO gives each process a part",
        }[adam.name]
        other = "adamw8bit, which needs as little memory and works at every stage"
        if _device(zero, "offload_optimizer") != "none":
            other = "adamw, which this config keeps in host memory"
        raise UserError(
            f"optimizer.name is {adam.name}, which {reason} (stage {stage}). Set deepspeed: zero0, "
            f"or optimizer.name: {other}."
        )
    if adam.name == "muon" and recipe.method != "lora":
        raise UserError(
            f"optimizer.name is muon, which updates matrices only, and method {recipe.method} trains "
            "vectors, too. Set method: lora, or optimizer.name: adamw."
        )
    if adam.name == "prodigy" and adam.learning_rate < 0.1:
        raise UserError(
            f"optimizer.learning_rate is {adam.learning_rate:g}; Prodigy finds its own step size and "
            "multiplies it by this. Set it to 1."
        )
    for part in _OFFLOADS:
        device = _device(zero, part)
        if device not in ("none", "cpu"):
            raise UserError(
                f"the deepspeed config has {part} on {device!r}, which checkpoints cannot read. "
                'Set "device": "cpu".'
            )
    if _device(zero, "offload_param") != "none" and stage != 3:
        raise UserError(
            f"the deepspeed config has offload_param at stage {stage}; DeepSpeed moves parameters at "
            "stage 3 only. Set deepspeed: zero3_offload, or remove offload_param."
        )
    if _device(zero, "offload_optimizer") != "none" and (adam.name != "adamw" or stage == 0):
        raise UserError(
            f"the deepspeed config offloads the optimizer at stage {stage} and optimizer.name is "
            f"{adam.name}; DeepSpeed offloads its own CPU Adam only, at stages 1 to 3. Set "
            "optimizer.name: adamw with deepspeed: zero2_offload, or keep adamw8bit_paged with "
            "deepspeed: zero2, which moves its state to host memory when the card is full."
        )


def _device(zero: dict[str, Any], part: str) -> str:
    return str((zero.get(part) or {}).get("device", "none"))


def _precision_sections(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's precision sections.

    Adapters in bf16 need none: the frozen base is loaded in bf16, the adapter stays in fp32, and the
    engine leaves dtypes alone. A full fine-tune in bf16, and fp16 always, need the engine's fp32
    masters (fp16 also its loss scaler).
    """
    if recipe.precision == "fp16":
        return {"fp16": {"enabled": True}}
    if recipe.precision == "bf16" and recipe.method == "full":
        # bf16 gradients would lose bits when micro-batches are accumulated.
        # Without the check DeepSpeed would make an update of NaN.
        bf16 = {"enabled": True, "check_grad_overflow": True}
        return {"bf16": bf16, "data_types": {"grad_accum_dtype": "fp32"}}
    return {}


def shipped_configs() -> dict[str, Path]:
    """The DeepSpeed configs that come with the project, by name."""
    return {path.stem: path for path in sorted(shipped_directory("ds_configs").glob("*.json"))}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that comes twice is a mistake, of which json would take the last."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} comes twice")
    return dict(pairs)


def read_deepspeed(choice: str | dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config by shipped name, path or value, checked against what it may hold."""
    if isinstance(choice, str):
        shipped = shipped_configs()
        path = Path(choice) if choice.endswith(".json") else shipped.get(choice)
        if path is None or not path.is_file():
            raise UserError(
                f"deepspeed is {choice!r}: neither a shipped config ({', '.join(shipped)}) nor an existing "
                ".json file."
            )
        try:
            config = json.loads(path.read_text(), object_pairs_hook=_each_once)
        except ValueError as error:
            raise UserError(f"deepspeed config {path} is not valid JSON: {error}.") from error
        source = str(path)
    else:
        source, config = "(in the recipe)", copy.deepcopy(choice)
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if (
        not isinstance(zero, dict)
        or zero.get("stage", 0) not in (0, 1, 2, 3)
        or not all(isinstance(zero.get(part) or {}, dict) for part in _OFFLOADS)
    ):
        raise UserError(
            f"deepspeed config {source} must be a JSON object; its zero_optimization, too, with a "
            f"stage of 0, 1, 2 or 3; and its {' and '.join(_OFFLOADS)}, if any."
        )
    for key, value in config.items():
        if key in _OWNED_ELSEWHERE:
            raise UserError(
                f"deepspeed config {source} sets {key!r}, which belongs to the recipe: set "
                f"{_OWNED_ELSEWHERE[key]} there and remove it from the config."
            )
        if key not in _DEEPSPEED_KEYS:
            # DeepSpeed would ignore it in silence.
            raise UserError(
                f"deepspeed config {source} has the unknown key {key!r}. Known: "
                f"{', '.join(sorted(_DEEPSPEED_KEYS))}."
            )
        if not isinstance(value, _DEEPSPEED_KEYS[key]):
            raise UserError(
                f"deepspeed config {source}: {key} is {value!r}, which is no value for it."
            )
    if '"auto"' in json.dumps(config):
        raise UserError(f'deepspeed config {source} uses "auto"; write the value.')
    return dict(config)


def compiles(recipe: Recipe) -> bool:
    """Whether the blocks are compiled: by default on CUDA."""
    if recipe.compile is not None:
        return recipe.compile
    return recipe.launch.accelerator == "cuda"


def why_not_captured(recipe: Recipe, stage: int) -> str | None:
    """Why passes cannot be recorded as CUDA graphs, which hold work for the card only."""
    if recipe.launch.accelerator != "cuda":
        return f"launch.accelerator is {recipe.launch.accelerator}"
    if stage == 3:
        return "the deepspeed config has stage 3, at which Python gathers the weights"
    if not compiles(recipe):
        return "the blocks are not compiled (compile is false)"
    if recipe.method == "full":
        return "method is full, whose gradients would be held twice"
    if recipe.offload_activations:
        return "offload_activations is true"
    if recipe.lora.dropout:
        return f"lora.dropout is {recipe.lora.dropout:g}, which each step seeds anew"
    return None


def why_not_transposed(recipe: Recipe, stage: int) -> str | None:
    """Why a transposed copy of the base would save nothing, or take what was to be saved."""
    if recipe.base_weights not in ("fp8", "int8"):
        return f"base_weights is {recipe.base_weights or recipe.precision}, not fp8 or int8"
    if stage == 3:
        return "the deepspeed config has stage 3, which divides the base to save memory"
    return None
