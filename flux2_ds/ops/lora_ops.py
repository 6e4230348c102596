"""A LoRA update beside a frozen linear, as torch operators: y = x Wᵀ + (x Aᵀ) Bᵀ.

A wide output costs what it takes to read and write it, so each is read and written once.

Shapes: x [M, K], W [N, K], A [r, K], B [N, r], x_a = x Aᵀ [M, r], y [M, N].
"""

from __future__ import annotations

from typing import Any

import torch

from flux2_ds.ops.quantized_linear import SCHEMA, QuantizedWeight, linear, linear_grad

_MAX_TILED_RANK = 128
"""A tile's factors of higher ranks do not fit every card's shared memory."""
_WIDE, _LOW_RANK = 8192, 32
"""One kernel for both factors' gradients beats two products above so many columns, up to this rank;
timed on an H100."""


@torch.library.custom_op("flux2_ds::lora_add", mutates_args=())
def lora_add(base: torch.Tensor, x_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    """base [M, N] + x_a Bᵀ, differentiable in all three."""
    return _add(base, x_a, lora_b)


def _add(base: torch.Tensor, x_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    if base.is_cuda and base.dtype == torch.bfloat16 and lora_b.shape[1] <= _MAX_TILED_RANK:
        return kernels.lora_add(base, x_a, lora_b)
    return torch.addmm(base, x_a, lora_b.t())


@torch.library.custom_op("flux2_ds::lora_grads", mutates_args=())
def lora_grads(
    grad: torch.Tensor, x_a: torch.Tensor, lora_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad B [M, r], gradᵀ x_a [N, r]) for grad [M, N]: the gradients of x_a and of B."""
    wide = lora_b.shape[0] > _WIDE and lora_b.shape[1] <= _LOW_RANK
    if wide and grad.is_cuda and grad.dtype == torch.bfloat16:
        return kernels.lora_grads(grad, x_a, lora_b)
    return grad @ lora_b, grad.t() @ x_a


@torch.library.custom_op(
    "flux2_ds::quantized_lora_linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor lora_a, Tensor lora_b, {SCHEMA}) -> (Tensor, Tensor)",
)
def quantized_lora_linear(
    x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, *weight: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, x_a) of the fields of a `QuantizedWeight`.

    y is differentiable in x, A, B and W's row scales, none of which may be zero then; x_a is saved for
    that, and y where the scales have a gradient.
    """
    x_a = x @ lora_a.t()
    return _add(linear(x, QuantizedWeight(*weight)), x_a, lora_b), x_a


@torch.library.custom_op(
    "flux2_ds::quantized_lora_linear_grad",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor grad_x_a, Tensor lora_a, {SCHEMA}) -> Tensor",
)
def _grad_of_x(
    grad: torch.Tensor, grad_x_a: torch.Tensor, lora_a: torch.Tensor, *weight: Any
) -> torch.Tensor:
    """grad W + grad_x_a A [M, K]."""
    return _add(linear_grad(grad, QuantizedWeight(*weight)), grad_x_a, lora_a.t())


@lora_add.register_fake
def _(base: torch.Tensor, x_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    return base.new_empty(base.shape)


@lora_grads.register_fake
def _(
    grad: torch.Tensor, x_a: torch.Tensor, lora_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x_a.new_empty(x_a.shape), lora_b.new_empty(lora_b.shape)


@quantized_lora_linear.register_fake
def _(
    x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], lora_b.shape[0]), x.new_empty(x.shape[0], lora_b.shape[1])


@_grad_of_x.register_fake
def _(grad: torch.Tensor, grad_x_a: torch.Tensor, lora_a: torch.Tensor, *_: Any) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], lora_a.shape[1])


def _save_factors(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _add_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return grad, *lora_grads(grad, *ctx.saved_tensors)


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.storage, ctx.compute, transposed = inputs
    y, x_a = output
    scale = tensors[-1]
    ctx.save_for_backward(*tensors, transposed, x_a, y if scale.requires_grad else None)
    ctx.mark_non_differentiable(x_a)


def _linear_backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, lora_a, lora_b, values, block_scale, scale, transposed, x_a, y = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x_a, grad_b = lora_grads(grad, x_a, lora_b)
    grad_x = grad_scale = None
    if ctx.needs_input_grad[0]:
        weight = values, block_scale, scale, ctx.storage, ctx.compute, transposed
        grad_x = _grad_of_x(grad, grad_x_a, lora_a, *weight)
    if y is not None:  # y = scale ∘ z + u: ∂/∂scale = Σ grad z = (Σ grad y - Σ grad u) / scale
        through_y = (grad * y).sum(0, keepdim=True, dtype=torch.float32).t()
        through_u = (grad_b.float() * lora_b).sum(1, keepdim=True)
        grad_scale = (through_y - through_u) / scale
    return grad_x, grad_x_a.t() @ x, grad_b, None, None, grad_scale, None, None, None


lora_add.register_autograd(_add_backward, setup_context=_save_factors)
quantized_lora_linear.register_autograd(_linear_backward, setup_context=_save_all)


if torch.cuda.is_available():
    from flux2_ds.ops import quant_kernels as kernels
