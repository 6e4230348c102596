"""Frozen linears held in 8 or 4 bits, and their matrix products.

Storage, always with one fp32 scale for each output row n of a weight W [N, K]:

- `fp8`: e4m3 values, scale = max|W_n| / 448 (OCP 8-bit floating point; FP8 formats, arXiv 2209.05433).
- `int8`: scale = max|W_n| / 127.
- `nf4`: 4-bit NormalFloat codes (QLoRA, arXiv 2305.14314) in blocks of 64 along K; each block has an
  e4m3 scale relative to its row's, two-level scaling like QLoRA's double quantisation: 4.125 bits a weight.

Products: `fp8` and `int8` quantise the other operand by rows as well and multiply in 8 bits, forward
and backward; `bf16` expands the weight first. Only x's gradient exists, since W is frozen. In the
backward pass W's row scale is folded into the gradient before that is quantised, so that one copy of
the 8-bit weight serves both directions; a second, transposed one saves turning it around each time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from flux2_ds.ops.formats import FP8_MAX, INT8_MAX, NF4_BLOCK

if torch.cuda.is_available():
    from flux2_ds.ops import quant_kernels as kernels

Storage = Literal["fp8", "int8", "nf4"]
Compute = Literal["bf16", "fp8", "int8"]

BASE_WEIGHTS: dict[str, tuple[Storage, Compute]] = {
    "fp8": ("fp8", "fp8"),
    "int8": ("int8", "int8"),
    "nf4": ("nf4", "bf16"),
    "nf4_fp8": ("nf4", "fp8"),
    "nf4_int8": ("nf4", "int8"),
}
"""A recipe's `base_weights` -> how the weights are stored and what they are multiplied in."""

_AT_ONCE = 1 << 21  # elements

# The 16 quantiles of N(0, 1) scaled to [-1, 1], as published with QLoRA.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class QuantizedLinear(nn.Module):
    """y = x Wᵀ with a frozen, quantised W; the gradient flows to x alone.

    The values are held as uint8, because an engine that casts a model's floating-point tensors would
    cast float8 ones too.
    """

    def __init__(self, weight: torch.Tensor, storage: Storage, compute: Compute) -> None:
        """Quantise `weight` [N, K], on the device where it is."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.storage, self.compute = storage, compute
        values, block_scale, scale = quantize(weight, storage)
        self.values = nn.Parameter(values, requires_grad=False)
        self.block_scale = (
            None if block_scale is None else nn.Parameter(block_scale, requires_grad=False)
        )
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.transposed: torch.Tensor | None
        self.register_buffer("transposed", None, persistent=False)

    def hold_transposed(self) -> None:
        """Hold the 8-bit values a second time, as [K, N], which is how the backward pass reads them."""
        assert self.storage != "nf4", "a product expands nf4 in either orientation"
        self.transposed = _transpose(self.values.detach())

    @property
    def weight(self) -> torch.Tensor:
        """W as stored, [N, K] in bf16. Expanded anew at each access."""
        return dequantize(self.values, self.block_scale, self.scale, self.storage).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        rows = frozen_product(
            x.flatten(0, -2),
            self.values,
            self.block_scale,
            self.scale,
            self.storage,
            self.compute,
            self.transposed,
        )
        return rows.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:  # noqa: D102 (nn.Module's)
        return (
            f"{self.in_features}, {self.out_features}, storage={self.storage}, "
            f"compute={self.compute}"
        )


def quantize(
    weight: torch.Tensor, storage: Storage
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(values uint8, block scales uint8 or None, row scales fp32 [N, 1]) of `weight` [N, K].

    Some rows at a time, because the work takes several times their size.

    Raises:
        ValueError: K is not a multiple of what the format needs.
    """
    at_once = max(1, _AT_ONCE // weight.shape[1])
    values, block_scale, scale = zip(
        *(_quantize_together(rows, storage) for rows in weight.split(at_once)), strict=True
    )
    whole = None if storage != "nf4" else torch.cat(block_scale)
    return torch.cat(values), whole, torch.cat(scale)


def _quantize_together(
    weight: torch.Tensor, storage: Storage
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """`quantize`, all rows at once."""
    if storage != "nf4":
        values, scale = quantize_rows(weight, None, storage)
        return values.view(torch.uint8), None, scale
    rows, columns = weight.shape
    if columns % NF4_BLOCK:
        raise ValueError(f"nf4 needs a multiple of {NF4_BLOCK} input features, not {columns}")
    blocks = weight.float().view(rows, columns // NF4_BLOCK, NF4_BLOCK)
    largest = blocks.abs().amax(-1)
    scale = largest.amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    block_scale = (largest / scale).to(torch.float8_e4m3fn)
    # Codes are chosen for the rounded block scale, so that its rounding costs next to nothing.
    step = (block_scale.float() * scale).clamp(min=1e-30)[..., None]
    levels = nf4_table(weight.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize((blocks / step).view(rows, columns), midpoints).to(torch.uint8)
    return codes[:, 0::2] << 4 | codes[:, 1::2], block_scale.view(torch.uint8), scale


def dequantize(
    values: torch.Tensor, block_scale: torch.Tensor | None, scale: torch.Tensor, storage: Storage
) -> torch.Tensor:
    """The fp32 weight [N, K] that `quantize` stored."""
    if storage == "fp8":
        return values.view(torch.float8_e4m3fn).float() * scale
    if storage == "int8":
        return values.view(torch.int8).float() * scale
    assert block_scale is not None
    return dequantize_nf4(values, block_scale) * scale


def dequantize_nf4(values: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """Codes [N, K/2] and block scales [N, K/64] -> fp32 [N, K] within ±448, without the row scale."""
    codes = torch.stack((values >> 4, values & 15), dim=-1).flatten(-2)
    blocks = nf4_table(values.device)[codes.int()].unflatten(-1, (-1, NF4_BLOCK))
    return (blocks * block_scale.view(torch.float8_e4m3fn).float()[..., None]).flatten(-2)


@lru_cache
def nf4_table(device: torch.device) -> torch.Tensor:
    """The sixteen levels, [16] fp32; made once for each device, because copying them there waits."""
    return torch.tensor(_NF4, device=device)


@lru_cache
def _ones(device: torch.device, columns: int) -> torch.Tensor:
    """[1, columns] fp32, for products whose scales were folded into an operand; made once."""
    return torch.ones(1, columns, device=device)


def quantize_rows(
    x: torch.Tensor, column_scale: torch.Tensor | None, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """x ∘ column_scale, [M, K] -> (8-bit values [M, K], scales [M, 1] fp32), x ≈ values * scales.

    `column_scale`: [1, K] fp32 or None. `kind`: fp8 or int8.
    """
    if x.is_cuda:
        return kernels.quantize_rows(x, column_scale, kind)
    rows = x.float() if column_scale is None else x.float() * column_scale
    largest = FP8_MAX if kind == "fp8" else INT8_MAX
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    scaled = rows * (1 / scale)
    if kind == "fp8":
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn), scale
    return scaled.round().to(torch.int8), scale


def expand_nf4(
    values: torch.Tensor,
    block_scale: torch.Tensor,
    scale: torch.Tensor,
    kind: str,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """Codes [N, K/2], block scales [N, K/64], row scales [N, 1] -> W [N, K] or [K, N].

    `kind`: bf16, or fp8 and int8 in units of `_step`.
    """
    if values.is_cuda:
        table = nf4_table(values.device)
        return kernels.expand_nf4(values, block_scale, scale, table, kind, transposed=transposed)
    weight = dequantize_nf4(values, block_scale)
    if kind == "bf16":
        weight = (weight * scale).bfloat16()
    elif kind == "fp8":
        weight = weight.to(torch.float8_e4m3fn)
    else:
        weight = (weight * (INT8_MAX / FP8_MAX)).round().to(torch.int8)
    return weight.t().contiguous() if transposed else weight


def _operand(
    values: torch.Tensor,
    block_scale: torch.Tensor | None,
    scale: torch.Tensor,
    storage: str,
    compute: str,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """What the product reads, [N, K] or [K, N]: W in bf16, or 8-bit values in units of `_step`."""
    if storage == "nf4":
        assert block_scale is not None
        return expand_nf4(values, block_scale, scale, compute, transposed=transposed)
    return _eight_bits(_transpose(values) if transposed else values, storage)


def _transpose(values: torch.Tensor) -> torch.Tensor:
    return kernels.transpose(values) if values.is_cuda else values.t().contiguous()


def _eight_bits(values: torch.Tensor, storage: str) -> torch.Tensor:
    return values.view(torch.float8_e4m3fn if storage == "fp8" else torch.int8)


def _step(scale: torch.Tensor, storage: str, compute: str) -> torch.Tensor:
    """The weight that one unit of the 8-bit operand stands for, [1, N] fp32."""
    step = scale * (FP8_MAX / INT8_MAX) if (storage, compute) == ("nf4", "int8") else scale
    return step.t()


def _multiply(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(a ∘ a_scale)(b ∘ b_scaleᵀ)ᵀ for 8-bit a [M, K], b [N, K], scales [M, 1] and [1, N] in fp32."""
    if a.dtype == torch.int8:
        # CUDA multiplies more than 16 rows only.
        padding = max(0, 17 - a.shape[0]) if a.is_cuda else 0
        padded = nn.functional.pad(a, (0, 0, 0, padding)) if padding else a
        product = torch._int_mm(padded, b.t())[: a.shape[0]]
        if a.is_cuda:
            return kernels.scale_product(product, a_scale, b_scale, dtype)
        return (product * a_scale * b_scale).to(dtype)
    if a.is_cuda:
        y = torch._scaled_mm(
            a,
            b.t(),
            scale_a=a_scale,
            scale_b=b_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.to(dtype)
    # Without fp8 hardware: the same products, summed in fp32.
    return ((a.float() @ b.float().t()) * a_scale * b_scale).to(dtype)


def product(
    x: torch.Tensor,
    values: torch.Tensor,
    block_scale: torch.Tensor | None,
    scale: torch.Tensor,
    storage: str,
    compute: str,
    transposed: torch.Tensor | None = None,
) -> torch.Tensor:
    """x Wᵀ [M, N] in x's dtype, for x [M, K] and a quantised W [N, K].

    `transposed`: of 8-bit values, [K, N], for the gradient.
    """
    weight = _operand(values, block_scale, scale, storage, compute)
    if compute == "bf16":
        return x @ weight.to(x.dtype).t()
    quantized, row_scale = quantize_rows(x, None, compute)
    return _multiply(quantized, row_scale, weight, _step(scale, storage, compute), x.dtype)


def product_gradient(
    grad: torch.Tensor,
    values: torch.Tensor,
    block_scale: torch.Tensor | None,
    scale: torch.Tensor,
    storage: str,
    compute: str,
    transposed: torch.Tensor | None = None,
) -> torch.Tensor:
    """grad W [M, K] for grad [M, N]. `transposed`: of 8-bit values, [K, N], if they are held so as well."""
    if compute == "bf16":
        return grad @ _operand(values, block_scale, scale, storage, compute).to(grad.dtype)
    # 8-bit products want both operands contiguous along the summed dimension.
    if transposed is None:
        weight = _operand(values, block_scale, scale, storage, compute, transposed=True)
    else:
        weight = _eight_bits(transposed, storage)
    quantized, row_scale = quantize_rows(grad, _step(scale, storage, compute), compute)
    ones = _ones(grad.device, weight.shape[0])
    return _multiply(quantized, row_scale, weight, ones, grad.dtype)


# What follows are operators of torch: a compiler takes each as a whole, and a policy for activations
# can name it.

frozen_product = torch.library.custom_op("flux2_ds::frozen_product", product, mutates_args=())
"""`product`, differentiable in x."""
_gradient = torch.library.custom_op(
    "flux2_ds::frozen_product_gradient", product_gradient, mutates_args=()
)


@frozen_product.register_fake
def _(x: torch.Tensor, values: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


@_gradient.register_fake
def _(
    grad: torch.Tensor, values: torch.Tensor, block_scale: Any, scale: Any, storage: str, *_: Any
) -> torch.Tensor:
    columns = values.shape[1] * 2 if storage == "nf4" else values.shape[1]
    return grad.new_empty((grad.shape[0], columns))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, values, block_scale, scale, ctx.storage, ctx.compute, transposed = inputs
    ctx.save_for_backward(values, block_scale, scale, transposed)


def _gradient_of_x(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *base, transposed = ctx.saved_tensors
    dx = _gradient(grad.contiguous(), *base, ctx.storage, ctx.compute, transposed)
    return dx, *[None] * 6


frozen_product.register_autograd(_gradient_of_x, setup_context=_keep_weight)
