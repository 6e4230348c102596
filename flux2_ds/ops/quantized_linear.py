"""Frozen linears stored in 8 or 4 bits, and their matrix products.

Storage, always with one fp32 scale for each output row of W:

- `fp8`: e4m3 values, scale = max|W_n| / 448 (OCP 8-bit floating point; FP8 formats, arXiv 2209.05433).
- `int8`: scale = max|W_n| / 127.
- `nf4`: 4-bit NormalFloat codes (QLoRA, arXiv 2305.14314) in blocks of 64 along K; each block has an
  e4m3 scale relative to its row's, two-level scaling like QLoRA's double quantization: 4.125 bits a weight.

Products: `fp8` and `int8` also quantize the other operand by rows and multiply in 8 bits, forward and
backward; `bf16` expands the weight first. W is frozen, so only x has a gradient. In the backward pass
W's row scale is folded into the gradient before that is quantized, so that one copy of the 8-bit weight
serves both directions; a second, transposed copy saves transposing it each time.

Shapes: x [M, K], W [N, K], y = x Wᵀ [M, N].
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

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

MAX = {"fp8": 448.0, "int8": 127.0}
"""Largest magnitude of e4m3, and of int8 as it is used."""
NF4_BLOCK = 64
"""Weights along K that share an nf4 block scale."""
_DTYPE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16}
_QUANTIZED_AT_ONCE = 1 << 21  # elements

# The 16 quantiles of N(0, 1) scaled to [-1, 1], as published with QLoRA.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class QuantizedWeight(NamedTuple):
    """A quantized W [N, K]. Operators of torch take its fields one by one, in this order."""

    values: torch.Tensor
    """[N, K] uint8, the bits of e4m3 or int8; of nf4 [N, K/2], two codes a byte."""
    block_scale: torch.Tensor | None
    """[N, K/64] uint8, the bits of e4m3; nf4 only."""
    scale: torch.Tensor
    """[N, 1] fp32."""
    storage: str
    compute: str
    transposed: torch.Tensor | None = None
    """A second copy of 8-bit values, [K, N], for the backward pass."""


SCHEMA = (
    "Tensor values, Tensor? block_scale, Tensor scale, str storage, str compute, Tensor? transposed"
)
"""A `QuantizedWeight` in the signature of an operator."""


class QuantizedLinear(nn.Module):
    """y = x Wᵀ with a frozen, quantized W; the gradient flows to x alone.

    The values are uint8, because an engine that casts a model's floating-point tensors would cast
    float8 ones too.
    """

    def __init__(self, weight: torch.Tensor, storage: Storage, compute: Compute) -> None:
        """Quantize `weight` [N, K], on its device."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.storage, self.compute = storage, compute
        w = quantize(weight, storage, compute)
        blocks = w.block_scale
        self.values = nn.Parameter(w.values, requires_grad=False)
        self.block_scale = None if blocks is None else nn.Parameter(blocks, requires_grad=False)
        self.scale = nn.Parameter(w.scale, requires_grad=False)
        self.transposed: torch.Tensor | None
        self.register_buffer("transposed", None, persistent=False)

    def cache_transposed(self) -> None:
        """Hold a second, transposed copy of the 8-bit values for the backward pass."""
        assert self.storage != "nf4", "a product expands nf4 in either orientation"
        self.transposed = _transpose(self.values.detach())

    def quantized(self, scale: torch.Tensor | None = None) -> QuantizedWeight:
        """W as stored; with `scale` [N, 1] in place of its row scales."""
        scale = self.scale if scale is None else scale
        return QuantizedWeight(
            self.values, self.block_scale, scale, self.storage, self.compute, self.transposed
        )

    @property
    def weight(self) -> torch.Tensor:
        """Of W's shape [N, K] and device, and NaN: what PEFT asks of a linear when it adds an adapter, where
        expanding W would take five times the memory of W in fp32. `dequantize(self.quantized())` is W."""
        shape = self.out_features, self.in_features
        return torch.full((), torch.nan, dtype=torch.bfloat16, device=self.scale.device).expand(
            shape
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        rows = quantized_linear(x.flatten(0, -2), *self.quantized())
        return rows.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:  # noqa: D102 (nn.Module's)
        return (
            f"{self.in_features}, {self.out_features}, storage={self.storage}, "
            f"compute={self.compute}"
        )


def quantize(weight: torch.Tensor, storage: Storage, compute: Compute) -> QuantizedWeight:
    """Quantize `weight` [N, K], some rows at a time because that takes several times their size.
    Raises ValueError if nf4 cannot hold K.
    """
    rows = weight.split(max(1, _QUANTIZED_AT_ONCE // weight.shape[1]))
    values, block_scale, scale = zip(*(_quantize_part(part, storage) for part in rows), strict=True)
    blocks = torch.cat(block_scale) if storage == "nf4" else None
    return QuantizedWeight(torch.cat(values), blocks, torch.cat(scale), storage, compute)


def _quantize_part(
    weight: torch.Tensor, storage: Storage
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(values, block scales, row scales) of `quantize`, all rows at once."""
    if storage != "nf4":
        values, scale = quantize_rows(weight, None, storage)
        return values.view(torch.uint8), None, scale
    columns = weight.shape[1]
    if columns % NF4_BLOCK:
        raise ValueError(f"nf4 needs a multiple of {NF4_BLOCK} input features, not {columns}")
    blocks = weight.float().unflatten(-1, (-1, NF4_BLOCK))
    largest = blocks.abs().amax(-1)
    scale = largest.amax(-1, keepdim=True).clamp(min=1e-12) / MAX["fp8"]
    block_scale = (largest / scale).to(torch.float8_e4m3fn)
    # Codes are chosen for the rounded block scale, so that its rounding costs next to nothing.
    step = (block_scale.float() * scale).clamp(min=1e-30)[..., None]
    levels = nf4_table(weight.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize((blocks / step).flatten(-2), midpoints).to(torch.uint8)
    return codes[:, 0::2] << 4 | codes[:, 1::2], block_scale.view(torch.uint8), scale


def dequantize(w: QuantizedWeight) -> torch.Tensor:
    """The stored weight, [N, K] fp32."""
    if w.storage == "nf4":
        return _expand_blocks(w) * w.scale
    return w.values.view(_DTYPE[w.storage]).float() * w.scale


def _expand_blocks(w: QuantizedWeight) -> torch.Tensor:
    """An nf4 weight without its row scales: [N, K] fp32 within ±448."""
    assert w.block_scale is not None
    codes = torch.stack((w.values >> 4, w.values & 15), dim=-1).flatten(-2)
    blocks = nf4_table(codes.device)[codes.int()].unflatten(-1, (-1, NF4_BLOCK))
    return (blocks * w.block_scale.view(torch.float8_e4m3fn).float()[..., None]).flatten(-2)


@lru_cache
def nf4_table(device: torch.device) -> torch.Tensor:
    """The sixteen levels, [16] fp32; made once for each device, because the copy there waits."""
    return torch.tensor(_NF4, device=device)


@lru_cache
def ones(device: torch.device, columns: int) -> torch.Tensor:
    """[1, columns] fp32, made once: the scales of an operand whose own were folded into the other."""
    return torch.ones(1, columns, device=device)


def quantize_rows(
    x: torch.Tensor, column_scale: torch.Tensor | None, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """x ∘ column_scale -> (values [M, K] in fp8 or int8, scales [M, 1] fp32), x ≈ values ∘ scales.

    `column_scale`: [1, K] fp32 or None. `kind`: fp8 or int8.
    """
    largest = MAX[kind]
    if x.is_cuda:
        return kernels.quantize_rows(x, column_scale, _DTYPE[kind], largest)
    rows = x.float() if column_scale is None else x.float() * column_scale
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    scaled = rows * (1 / scale)
    scaled = scaled.round() if kind == "int8" else scaled.clamp(-largest, largest)
    return scaled.to(_DTYPE[kind]), scale


def quantize_columns(x: torch.Tensor, row_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x ∘ row_scale -> (values [K, M] in fp8, scales [K, 1] fp32), (x ∘ row_scale)ᵀ ≈ values ∘ scales; M is padded
    with zeros to the multiple of 16 that a product on the card can sum over.

    `row_scale`: [M, 1] fp32.
    """
    if x.is_cuda:
        return kernels.quantize_columns(x, row_scale, _DTYPE["fp8"], MAX["fp8"])
    return quantize_rows(x.t(), row_scale.t(), "fp8")


def turn_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The values that `quantize_rows` makes of x [M, K] in fp8, turned: [K, M]; M is padded as by `quantize_columns`.

    `scale`: [M, 1] fp32, as that returned it.
    """
    largest = MAX["fp8"]
    if x.is_cuda:
        return kernels.turn_rows(x, scale, _DTYPE["fp8"], largest)
    values = (x.float() * (1 / scale)).clamp(-largest, largest)
    return values.to(_DTYPE["fp8"]).t().contiguous()


def operand(w: QuantizedWeight, *, transposed: bool = False) -> torch.Tensor:
    """What a product reads, [N, K] or [K, N]: W in bf16, or 8-bit values in units of `_unit`."""
    dtype = _DTYPE[w.compute]
    if w.storage != "nf4":
        return (_transpose(w.values) if transposed else w.values).view(dtype)
    if w.values.is_cuda:
        assert w.block_scale is not None
        return kernels.expand_nf4(
            w.values, w.block_scale, w.scale, nf4_table(w.values.device), dtype,
            MAX["int8"] / MAX["fp8"], transposed=transposed,
        )  # fmt: skip
    weight = _expand_blocks(w)
    if w.compute == "bf16":
        weight = weight * w.scale
    elif w.compute == "int8":
        weight = (weight * (MAX["int8"] / MAX["fp8"])).round()
    weight = weight.to(dtype)
    return weight.t().contiguous() if transposed else weight


def _unit(w: QuantizedWeight) -> torch.Tensor:
    """The weight that one unit of the 8-bit operand stands for, [1, N] fp32."""
    rescaled = (w.storage, w.compute) == ("nf4", "int8")
    return (w.scale * (MAX["fp8"] / MAX["int8"]) if rescaled else w.scale).t()


def _transpose(values: torch.Tensor) -> torch.Tensor:
    return kernels.transpose(values) if values.is_cuda else values.t().contiguous()


def multiply(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype,
    *, fast: bool = True,
) -> torch.Tensor:  # fmt: skip
    """(a ∘ a_scale)(b ∘ b_scaleᵀ)ᵀ for 8-bit a [M, K], b [N, K], scales [M, 1] and [1, N] in fp32.

    `fast`: a card's fp8 products sum in the tensor cores' own precision, which on Hopper is less than fp32.
    """
    if not a.is_cuda:  # of fp8 the same products, summed in fp32
        product = torch._int_mm(a, b.t()) if a.dtype == torch.int8 else a.float() @ b.float().t()
        return (product * a_scale * b_scale).to(dtype)
    if a.dtype == torch.int8:
        # CUDA multiplies more than 16 rows only.
        padding = max(0, 17 - a.shape[0])
        padded = nn.functional.pad(a, (0, 0, 0, padding)) if padding else a
        product = torch._int_mm(padded, b.t())[: a.shape[0]]
        return kernels.scale_product(product, a_scale, b_scale, dtype)
    y = torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return y.to(dtype)


def linear(x: torch.Tensor, w: QuantizedWeight) -> torch.Tensor:
    """x Wᵀ [M, N] in x's dtype."""
    weight = operand(w)
    if w.compute == "bf16":
        return x @ weight.to(x.dtype).t()
    values, scale = quantize_rows(x, None, w.compute)
    return multiply(values, scale, weight, _unit(w), x.dtype)


def linear_grad(grad: torch.Tensor, w: QuantizedWeight) -> torch.Tensor:
    """grad W [M, K] for grad [M, N]: the gradient of x."""
    if w.compute == "bf16":
        return grad @ operand(w).to(grad.dtype)
    # 8-bit products want both operands contiguous along the summed dimension.
    if w.transposed is None:
        weight = operand(w, transposed=True)
    else:
        weight = w.transposed.view(_DTYPE[w.compute])
    values, scale = quantize_rows(grad, _unit(w), w.compute)
    return multiply(values, scale, weight, ones(grad.device, weight.shape[0]), grad.dtype)


# Operators of torch: a compiler takes each as one node, and a checkpointing policy can name it.


@torch.library.custom_op(
    "flux2_ds::quantized_linear", mutates_args=(), schema=f"(Tensor x, {SCHEMA}) -> Tensor"
)
def quantized_linear(x: torch.Tensor, *weight: Any) -> torch.Tensor:
    """`linear` of the fields of a `QuantizedWeight`, differentiable in x."""
    return linear(x, QuantizedWeight(*weight))


@torch.library.custom_op(
    "flux2_ds::quantized_linear_grad", mutates_args=(), schema=f"(Tensor grad, {SCHEMA}) -> Tensor"
)
def _quantized_linear_grad(grad: torch.Tensor, *weight: Any) -> torch.Tensor:
    return linear_grad(grad, QuantizedWeight(*weight))


@quantized_linear.register_fake
def _(x: torch.Tensor, values: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


@_quantized_linear_grad.register_fake
def _(grad: torch.Tensor, *weight: Any) -> torch.Tensor:
    w = QuantizedWeight(*weight)
    columns = w.values.shape[1] * 2 if w.storage == "nf4" else w.values.shape[1]
    return grad.new_empty((grad.shape[0], columns))


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *tensors, ctx.storage, ctx.compute, transposed = inputs
    ctx.save_for_backward(*tensors, transposed)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, transposed = ctx.saved_tensors
    weight = (*tensors, ctx.storage, ctx.compute, transposed)
    return _quantized_linear_grad(grad.contiguous(), *weight), *[None] * 6


quantized_linear.register_autograd(_backward, setup_context=_save_weight)
