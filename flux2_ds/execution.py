"""How the blocks run: compiled, recorded as CUDA graphs, over a base that is held transposed as well. Pure, no torch."""

from __future__ import annotations

from flux2_ds.recipe import Recipe


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
