"""From a recipe and a number of processes to everything that is derived."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from flux2_ds.config.adapter import adapter_line, merges, targets_line
from flux2_ds.config.deepspeed_config import offload_device, read_deepspeed
from flux2_ds.config.model_spec import Spec, is_distilled
from flux2_ds.config.recipe import Recipe
from flux2_ds.config.validate import (
    check_recipe,
    check_training,
    compiles,
    doubtful_settings,
    ignored_settings,
    shard_group,
    why_no_cuda_graphs,
    why_not_transposed,
)
from flux2_ds.errors import counted


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

    @property
    def shard_group(self) -> int | None:
        """How many ranks share one copy of a frozen base, where it is sharded."""
        if self.recipe.base_placement != "sharded":
            return None
        return shard_group(self.recipe, self.processes)

    @property
    def per_host(self) -> int:
        """Processes of a host, as far as the recipe tells."""
        return min(self.processes, self.recipe.launch.processes or 8)

    @property
    def passes_together(self) -> bool:
        """Whether all ranks take part in each forward pass, because each has but a part of the weights."""
        shards = self.processes > 1 and self.recipe.base_placement in ("sharded", "auto")
        return self.zero_stage == 3 or shards

    def offloads(self, part: Literal["offload_optimizer", "offload_param"]) -> bool:
        """Whether that part lives in host memory."""
        return offload_device(self.zero, part) != "none"

    def lines(self, spec: Spec | None = None) -> list[str]:
        """The arithmetic, for people. `spec`: of the model, where it is known."""
        recipe, batch, adam = self.recipe, self.recipe.batch, self.recipe.optimizer
        method = "full fine-tune"
        if recipe.method != "full":
            alpha = recipe.lora.rank if recipe.lora.alpha is None else recipe.lora.alpha
            method = (
                f"{recipe.method} rank {recipe.lora.rank}, alpha {alpha:g}"
                f"{' / √rank' * recipe.lora.rslora}, "
                f"targets {targets_line(recipe.lora.targets)}"
            )
        return [
            f"model      {recipe.model.path}, {method}, {recipe.precision}, "
            f"base {recipe.base_weights or recipe.precision}"
            + (", multiplied in fp8" if recipe.compute == "fp8" else _placement(self)),
            *self._adapter_lines(spec),
            f"batch      {batch.global_size} global = {batch.micro_size} micro × "
            f"{self.accumulation} accumulation × {counted(self.processes, 'process')}",
            f"steps      {recipe.steps} = {counted(recipe.steps * batch.global_size, 'sample')}"
            if recipe.epochs is None
            else f"steps      of {recipe.epochs:g} epochs, once the data is prepared",
            f"optimizer  {adam.name}, lr {adam.learning_rate:g} {adam.schedule}, "
            f"warm-up {adam.warmup_steps}, clipping {adam.max_grad_norm:g}"
            + (f", EMA {adam.ema_decay:g}" if adam.ema_decay is not None else ""),
            f"engine     ZeRO stage {self.zero_stage}"
            + (", optimizer offloaded to the CPU" if self.offloads("offload_optimizer") else "")
            + f", activation checkpointing: {recipe.activation_checkpointing}, attention: {recipe.attention}",
            *_objective_lines(recipe, self.passes_together),
            *(f"ignored    {setting}" for setting in ignored_settings(recipe, spec)),
            *(f"warning    {setting}" for setting in doubtful_settings(recipe)),
        ]

    def _adapter_lines(self, spec: Spec | None) -> list[str]:
        recipe = self.recipe
        if recipe.method == "full":
            return []
        lines = [] if spec is None else [f"adapter    {adapter_line(spec, recipe)}"]
        if recipe.lora.init_from is not None:
            lines.append(f"begins as  {recipe.lora.init_from}")
        lines += [f"merged     {path} × {strength:g}" for path, strength in merges(recipe.lora)]
        if (
            recipe.model.allow_distilled
            and not recipe.lora.merge_first
            and is_distilled(recipe.model.path, recipe.model.revision)
        ):
            lines.append(
                "warning    the model is step-distilled, and an adapter trained over it undoes that. Give an "
                "assistant adapter in lora.merge_first."
            )
        return lines


def _objective_lines(recipe: Recipe, together: bool) -> list[str]:
    """What differs from plain flow matching, and what it costs."""
    objective, kept = recipe.objective, recipe.preservation
    parts = [f"loss {objective.loss}"] if objective.loss != "mse" else []
    parts += [f"weighting {objective.weighting}"] if objective.weighting != "none" else []
    parts += [f"shift {s:g} for {name}" for name, s in objective.source_shift.items()]
    if objective.reference_dropout:
        parts.append(f"no references in {objective.reference_dropout:.0%} of the steps")
    lines = [f"objective  {', '.join(parts)}"] if parts else []
    if not kept.sources and not kept.prompts:
        return lines
    what = []
    if kept.sources:
        target = "their images" if kept.target == "image" else "the plain model"
        what.append(f"{', '.join(kept.sources)} towards {target}")
    if kept.prompts:
        of = f" of one in {kept.every} steps" * (kept.every > 1)
        what.append(
            f"{counted(len(kept.prompts), 'prompt')} in {kept.share:.0%} of the other samples{of}"
        )
    cost = "no pass more"
    if kept.uses_base:
        which = f"{1 - (1 - kept.share) ** recipe.batch.micro_size:.0%} of the micro-batches"
        if together:
            which = "every micro-batch"
        if kept.sources_to_base and not together:
            which = "each micro-batch with such a sample"
        elif kept.every > 1 and not kept.sources_to_base:
            which += f" of one in {kept.every} steps"
        cost = f"a forward pass more for {which}"
    return [*lines, f"preserving {'; '.join(what)}; weight {kept.weight:g}; {cost}"]


def _placement(plan: Plan) -> str:
    recipe = plan.recipe
    if recipe.base_placement == "gpu":
        return ""
    if recipe.base_placement == "auto":
        return ", placed where it fits"
    where = (
        "in host memory" if plan.shard_group is None else f"sharded over {plan.shard_group} GPUs"
    )
    return f", {1 - recipe.base_resident:.0%} of its blocks {where}"


def make_plan(recipe: Recipe, processes: int) -> Plan:
    """Check the recipe for `processes` processes and derive the rest."""
    check_recipe(recipe)
    config = read_deepspeed(recipe.deepspeed)
    zero = config.get("zero_optimization", {})
    check_training(recipe, processes, zero)
    if zero.get("stage", 0) == 3 and compiles(recipe):
        # DeepSpeed's own linear looks at what it has gathered, which no graph can.
        zero = zero | {"memory_efficient_linear": False}
    if zero:
        config["zero_optimization"] = zero
    accumulation = recipe.batch.global_size // (recipe.batch.micro_size * processes)
    config |= {
        "train_batch_size": recipe.batch.global_size,
        "train_micro_batch_size_per_gpu": recipe.batch.micro_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        # DeepSpeed knows few optimizers; validate.py says which ones may be used.
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
        return recipe.precision == "bf16" and why_no_cuda_graphs(recipe, plan.zero_stage) is None
    return recipe.cuda_graphs


def streamed_blocks(recipe: Recipe, blocks: int) -> list[int]:
    """Which of so many blocks pass through the card: spread evenly, the first among them."""
    if recipe.base_placement not in ("host", "sharded"):
        return []
    count = blocks - round(recipe.base_resident * blocks)
    return [number * blocks // count for number in range(count)]


def transposable(plan: Plan) -> bool:
    """Whether the base may be held a second time, transposed."""
    recipe = plan.recipe
    return recipe.cache_transposed_base is not False and why_not_transposed(recipe) is None


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
