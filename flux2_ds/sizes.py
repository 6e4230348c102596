"""Sizes of models, adapters, optimizers and checkpoints, from dimensions alone. Pure, no torch."""

from __future__ import annotations

from flux2_ds.recipe import Recipe
from flux2_ds.spec import TEXT_TOKENS, TOKEN_CHANNELS, Spec
from flux2_ds.targets import DOUBLE_LINEARS, SINGLE_LINEARS, target_modules

NF4_SCALES, _ROW_SCALE = 1 / 64, 4  # bytes a weight, and a row
_NF4_BITS = 0.5 + NF4_SCALES
_TIMESTEP_FREQUENCIES = 256
_RENDERING = 21  # without a backward pass
_STATE = {"adamw8bit": 2, "adamw8bit_paged": 2, "adafactor": 0.1, "prodigy": 16, "muon": 4}
_MOMENTS = 8  # two in fp32


def block_matrices(spec: Spec) -> list[int]:
    """Elements of each of the blocks' linears."""
    double, single = DOUBLE_LINEARS.values(), SINGLE_LINEARS.values()
    widths = [*double] * spec.double_blocks + [*single] * spec.single_blocks
    return [spec.width**2 * inputs * outputs for inputs, outputs in widths]


def other_matrices(spec: Spec) -> list[int]:
    """Elements of each of the other linears: embedders, modulation and output layers."""
    width = spec.width
    embedders = [width * TOKEN_CHANNELS, width * spec.text_width]
    time = [width * _TIMESTEP_FREQUENCIES, width**2] * (1 + spec.guidance)
    modulation = [6 * width**2, 6 * width**2, 3 * width**2]
    return [*embedders, *time, *modulation, 2 * width**2, width * TOKEN_CHANNELS]


def adapter_tensors(spec: Spec, recipe: Recipe) -> list[int]:
    """Elements of each of the adapter's tensors."""
    sizes = []
    for name in target_modules(spec, recipe.lora.targets):
        group, _, linear = name.split(".", 2)
        shapes = DOUBLE_LINEARS if group == "transformer_blocks" else SINGLE_LINEARS
        inputs, outputs = (features * spec.width for features in shapes[linear])
        sizes += [recipe.lora.rank * inputs, recipe.lora.rank * outputs]
        sizes += [outputs] if recipe.method == "dora" else []
    return sizes


def adapter_parameters(spec: Spec, recipe: Recipe) -> int:
    """Elements of the adapter."""
    return sum(adapter_tensors(spec, recipe))


def trained_parameters(spec: Spec, recipe: Recipe) -> int:
    """Elements of what is trained: the model, or the adapter."""
    if recipe.method == "full":
        return sum(block_matrices(spec) + other_matrices(spec))
    return adapter_parameters(spec, recipe)


def optimizer_bytes(name: str) -> float:
    """Bytes of an optimizer's state for each trained element."""
    return _STATE.get(name, _MOMENTS)


def checkpoint_bytes(spec: Spec, recipe: Recipe) -> float:
    """Bytes of a checkpoint on disk: fp32 weights, the optimizer's state, the average."""
    name = recipe.optimizer.name
    # With each element of an 8-bit optimizer's two moments its scale is stored.
    scales = 8 if "8bit" in name else 0
    average = 0 if recipe.optimizer.ema_decay is None else 4
    each = 4 + optimizer_bytes(name) + scales + average
    return each * trained_parameters(spec, recipe)


def base_bytes(spec: Spec, base_weights: str | None, element: int) -> float:
    """Bytes of the model's weights. `element`: bytes of one that is not quantised."""
    per_weight: float = element
    if base_weights in ("fp8", "int8"):
        per_weight = 1 + _ROW_SCALE / spec.width
    elif base_weights is not None and base_weights.startswith("nf4"):
        per_weight = _NF4_BITS + _ROW_SCALE / spec.width
    return per_weight * sum(block_matrices(spec)) + element * sum(other_matrices(spec))


def rendering_bytes(
    spec: Spec,
    base_weights: str | None,
    element: int,
    image_tokens: int,
    pixels: int,
    channels: int,
) -> float:
    """Least bytes beside the weights while a picture is denoised and decoded; kernels' workspaces come on top.

    `image_tokens`: references included. `channels`: of the VAE's decoder at the picture's full size. Both
    parts were counted in tensors that exist at once, on the CPU.
    """
    stream = (image_tokens + TEXT_TOKENS) * spec.width * element
    # Rotations are in fp32. The decoder's last stage takes in twice its channels, three times at once.
    return max(
        _RENDERING * stream + expanded_bytes(spec, base_weights), 6.0 * channels * pixels * element
    )


def expanded_bytes(spec: Spec, base_weights: str | None) -> int:
    """Bytes of the widest weight as the product reads it."""
    product = {"fp8": 2, "int8": 2, "nf4": 2, "nf4_fp8": 1, "nf4_int8": 1}
    return 9 * spec.width**2 * product.get(base_weights or "", 0)
