"""What settings refuse of each other, and which have no effect with the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Lora, Recipe, Validation, is_url

_TIMESTEPS = {
    "shift": ("shift",),
    "max_shift_tokens": ("flux",),
    "mean": ("flux", "shift", "logit_normal"),
    "std": ("flux", "shift", "logit_normal"),
    "mode_scale": ("mode",),
}
"""Setting of `objective` -> the `objective.timesteps` that it has a part in."""


def ignored_settings(recipe: Recipe, spec: Spec | None = None) -> list[str]:
    """The settings and why. `spec`: of the model, where it is known."""
    return [f"{setting} ({reason})" for setting, reason in _ignored(recipe, spec)]


def _ignored(recipe: Recipe, spec: Spec | None) -> Iterator[tuple[str, str]]:
    objective, adam, data = recipe.objective, recipe.optimizer, recipe.data
    if recipe.method == "full" and recipe.lora != Lora():
        yield "lora", "method is full"
    for name, used_by in _TIMESTEPS.items():
        if _given(objective, name) and objective.timesteps not in used_by:
            yield f"objective.{name}", f"timesteps is {objective.timesteps}"
    if _given(objective, "guidance") and spec is not None and not spec.guidance:
        yield "objective.guidance", f"{spec.variant} has no guidance input"
    for name in ("betas", "eps"):
        if _given(adam, name) and adam.name in ("adafactor", "muon"):
            yield f"optimizer.{name}", f"optimizer.name is {adam.name}"
    if _given(adam, "schedule") and adam.warmup_steps >= recipe.steps:
        yield "optimizer.schedule", f"all {recipe.steps} steps are warm-up"
    if recipe.offload_activations and recipe.activation_checkpointing in ("none", 0.0):
        yield (
            "offload_activations",
            f"activation_checkpointing is {recipe.activation_checkpointing}",
        )
    if recipe.validation != Validation() and not data.validation_fraction and not data.more_shards:
        yield "validation", "data.validation_fraction is 0"
    if data.cache and not any(map(is_url, (data.shards, *data.more_shards.values()))):
        yield "data.cache", f"data.shards {data.shards} is on disk"
    if _given(data, "cache_gb") and not data.cache:
        yield "data.cache_gb", "there is no data.cache"
    if data.fixed_caption and data.missing_caption != "fixed":
        yield "data.fixed_caption", f"missing_caption is {data.missing_caption}"
    if recipe.model.revision and Path(recipe.model.path).is_dir():
        yield "model.revision", f"model.path {recipe.model.path} is a directory"
    if _given(recipe.log, "project") and recipe.log.wandb == "disabled":
        yield "log.project", "log.wandb is disabled"
    if _given(recipe.launch, "over") and not recipe.launch.hostfile:
        yield "launch.over", "there is no launch.hostfile"


def _given(section: Any, name: str) -> bool:
    """Whether the setting is not its default."""
    return bool(getattr(section, name) != getattr(type(section), name))
