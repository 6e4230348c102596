"""The attention backend of a recipe on a device, in training and in sampling alike."""

from __future__ import annotations

import torch
from diffusers.models import attention_dispatch

from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import UserError


def attention_backend(recipe: Recipe, device: torch.device) -> str | None:
    """diffusers' name for the backend, or None for torch's own choice.

    `auto` is cuDNN on Hopper, where it is nearly twice as fast as flash attention.
    """
    if recipe.attention == "auto":
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        return "_native_cudnn" if hopper and recipe.precision != "fp32" else None
    return {
        "native": None,
        "cudnn": "_native_cudnn",
        "flash": "_native_flash",
        "efficient": "_native_efficient",
        "math": "_native_math",
        "flash_attn": "flash",
        "xformers": "xformers",
    }[recipe.attention]


def check_backend(recipe: Recipe, device: torch.device) -> None:
    """Refuse a backend whose package is not installed."""
    try:
        with attention_dispatch.attention_backend(attention_backend(recipe, device) or "native"):
            pass  # it has looked for the package
    except RuntimeError as error:
        raise UserError(
            f"attention is {recipe.attention}: {error} Or set attention: auto."
        ) from error
