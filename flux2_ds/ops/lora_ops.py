"""A low-rank update beside a frozen product, as operators of torch: y = x Wᵀ + (x Aᵀ)Bᵀ.

On wide outputs its cost is that of reading and writing them, so each is read and written once.
"""

from __future__ import annotations

from typing import Any

import torch

from flux2_ds.ops.quantized_linear import product, product_gradient

_TILED = 128
"""Ranks up to which a tile's factors fit into every card's shared memory."""
_WIDE, _NARROW = 8192, 32
"""One kernel makes both gradients of the factors sooner than two products where more columns than the first
and ranks up to the second are read; timed on an H100."""


@torch.library.custom_op("flux2_ds::add_low_rank", mutates_args=())
def add_low_rank(base: torch.Tensor, narrow: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """base [M, N] + narrow [M, r] · up [N, r]ᵀ, with gradients to all three."""
    return _add(base, narrow, up)


def _add(base: torch.Tensor, narrow: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if base.is_cuda and base.dtype == torch.bfloat16 and up.shape[1] <= _TILED:
        return kernels.add_low_rank(base, narrow, up)
    return torch.addmm(base, narrow, up.t())


@add_low_rank.register_fake
def _(base: torch.Tensor, narrow: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return base.new_empty(base.shape)


def _keep_factors(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


@torch.library.custom_op("flux2_ds::low_rank_gradients", mutates_args=())
def low_rank_gradients(
    grad: torch.Tensor, narrow: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad · up [M, r], gradᵀ · narrow [N, r]) for grad [M, N]: of the two factors of a low-rank product."""
    wide = up.shape[0] > _WIDE and up.shape[1] <= _NARROW
    if wide and grad.is_cuda and grad.dtype == torch.bfloat16:
        return kernels.low_rank_gradients(grad, narrow, up)
    return grad @ up, grad.t() @ narrow


@low_rank_gradients.register_fake
def _(
    grad: torch.Tensor, narrow: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return narrow.new_empty(narrow.shape), up.new_empty(up.shape)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return grad, *low_rank_gradients(grad, *ctx.saved_tensors)


add_low_rank.register_autograd(_gradients, setup_context=_keep_factors)


@torch.library.custom_op("flux2_ds::adapted_product", mutates_args=())
def adapted_product(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    values: torch.Tensor,
    block_scale: torch.Tensor | None,
    scale: torch.Tensor,
    storage: str,
    compute: str,
    transposed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x Wᵀ + narrow · upᵀ [M, N], narrow = x · downᵀ [M, r]) for x [M, K] and a quantised W [N, K].

    The first is differentiable in x, down [r, K], up [N, r] and scale [N, 1], if no scale is zero; the second is
    kept for that, and where scale has a gradient the first. `transposed`: as for `frozen_product`.
    """
    narrow = x @ down.t()
    return _add(product(x, values, block_scale, scale, storage, compute), narrow, up), narrow


@adapted_product.register_fake
def _(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], up.shape[0]), x.new_empty(x.shape[0], up.shape[1])


@torch.library.custom_op("flux2_ds::adapted_product_gradient", mutates_args=())
def _adapted_gradient(
    grad: torch.Tensor,
    grad_narrow: torch.Tensor,
    down: torch.Tensor,
    values: torch.Tensor,
    block_scale: torch.Tensor | None,
    scale: torch.Tensor,
    storage: str,
    compute: str,
    transposed: torch.Tensor | None,
) -> torch.Tensor:
    """grad W + grad_narrow · down [M, K]."""
    through_base = product_gradient(grad, values, block_scale, scale, storage, compute, transposed)
    return _add(through_base, grad_narrow, down.t())


@_adapted_gradient.register_fake
def _(grad: torch.Tensor, grad_narrow: torch.Tensor, down: torch.Tensor, *_: Any) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], down.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.storage, ctx.compute, transposed = inputs
    result, narrow = output
    scale = tensors[-1]
    ctx.save_for_backward(*tensors, transposed, narrow, result if scale.requires_grad else None)
    ctx.mark_non_differentiable(narrow)


def _adapted_gradients(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, down, up, values, block_scale, scale, transposed, narrow, result = ctx.saved_tensors
    grad = grad.contiguous()
    grad_narrow, grad_up = low_rank_gradients(grad, narrow, up)
    grad_x = grad_scale = None
    if ctx.needs_input_grad[0]:
        base = values, block_scale, scale, ctx.storage, ctx.compute, transposed
        grad_x = _adapted_gradient(grad, grad_narrow, down, *base)
    if result is not None:  # y = scale ∘ z + u: ∂/∂scale = Σ grad z = (Σ grad y - Σ grad u) / scale
        through_both = (grad * result).sum(0, keepdim=True, dtype=torch.float32).t()
        through_update = (grad_up.float() * up).sum(1, keepdim=True)
        grad_scale = (through_both - through_update) / scale
    return grad_x, grad_narrow.t() @ x, grad_up, None, None, grad_scale, None, None, None


adapted_product.register_autograd(_adapted_gradients, setup_context=_keep)


if torch.cuda.is_available():
    from flux2_ds.ops import quant_kernels as kernels
