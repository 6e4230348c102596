"""What settings refuse of each other, and which have no effect with the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Evaluation, Lora, Recipe, is_url
from flux2_ds.errors import UserError

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
    if recipe.offload_activations and recipe.activations in ("keep", 1.0):
        yield "offload_activations", f"activations is {recipe.activations}"
    if recipe.evaluation != Evaluation() and not data.held_out and not data.more_shards:
        yield "evaluation", "data.held_out is 0"
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


_BUFFERS = 12
"""Weights that are in host memory at once: the linears of a double block."""


def swaps(zero: dict[str, Any]) -> bool:
    """Whether `zero_optimization` keeps parameters on NVMe."""
    return bool((zero.get("offload_param") or {}).get("device") == "nvme")


def swapping(zero: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """`zero_optimization` with what DeepSpeed 0.19.8 needs so that its buffers suffice, and a place of the run's own.

    A gathered weight holds its buffer. Weights that are soon used again, or small enough to stay gathered, would be
    kept until no buffer is left, and one that is needed twice would be read ahead into two. Every start empties
    its place.
    """
    offload = zero["offload_param"]
    place = Path(offload["nvme_path"], "_".join(Path(run_dir).resolve().parts[1:]))
    return zero | {
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
        "offload_param": offload | {"nvme_path": str(place), "buffer_count": _BUFFERS},
    }


def check_swapped(recipe: Recipe, zero: dict[str, Any], processes: int, *, compiled: bool) -> None:
    """Refuse weights on NVMe that are trained, have no place or are given buffers, or that DeepSpeed would
    hold too many of, or overwrite.

    Raises:
        UserError: naming the key of offload_param.
    """
    if not swaps(zero):
        return
    offload = zero["offload_param"]
    if recipe.method == "full":
        raise UserError(
            "the deepspeed config has offload_param on 'nvme' and method is full, whose checkpoints cannot read "
            'weights there. Set "device": "cpu", or method: lora.'
        )
    if not offload.get("nvme_path"):
        raise UserError(
            "the deepspeed config has offload_param on 'nvme' without a place. Set \"nvme_path\" to a directory "
            "on such a disk of each machine."
        )
    if not compiled:
        # In DeepSpeed 0.19.8 blocks that recompute release their weights, and DoRA its own, after the whole
        # backward pass only.
        raise UserError(
            "the deepspeed config has offload_param on 'nvme' and the blocks are not compiled, which would hold "
            'buffers for all of them at once. Set compile: true, or "device": "cpu".'
        )
    if processes == 1 and recipe.launch.accelerator == "cpu":
        # Losses of DoRA were wrong there, without a word: by its code DeepSpeed then computes with the buffer
        # itself, not with a copy, and reads the next weight into it while autograd may still refer to it.
        raise UserError(
            "the deepspeed config has offload_param on 'nvme' and one process runs on the CPU, where DeepSpeed "
            'overwrites weights that are still in use. Start 2 processes, or set "device": "cpu".'
        )
    given = [key for key in ("buffer_count", "buffer_size", "max_in_cpu") if key in offload]
    if given:
        raise UserError(
            f"the deepspeed config sets {given[0]} of offload_param to {offload[given[0]]}, which follows from "
            "the model. Remove it."
        )
