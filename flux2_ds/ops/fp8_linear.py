"""Trained linears of which all three products are in fp8: y = x Wᵀ, ∂x = ∂y W, ∂W = ∂yᵀ x.

Both operands of a product are quantized to e4m3 just before it, with one scale for each row along the
dimension that is summed: features forward, outputs for ∂x, tokens for ∂W. So x, W and ∂y are quantized twice
each, along either dimension, and W, which is trained, stays in bf16. This is torchao's "rowwise" recipe
(`Float8LinearConfig`): e4m3 for gradients, too, whose range the scales of rows make small enough, and gradients
summed in fp32 on the card; but for its scales, which it rounds to powers of two.

Shapes: x [M, K], W [N, K], y and ∂y [M, N].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flux2_ds.ops.quantized_linear import multiply, quantize_columns, quantize_rows

Quantized = tuple[torch.Tensor, torch.Tensor]
"""Values in e4m3 and one scale for each row of them, [rows, 1] fp32."""


class Fp8Linear(nn.Linear):
    """y = x Wᵀ with trained W; what an `nn.Linear` without bias becomes by `__class__`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        rows = fp8_linear(x.flatten(0, -2), self.weight)
        return rows.view(*x.shape[:-1], self.out_features)


def _product(a: Quantized, b: Quantized, like: torch.Tensor, *, fast: bool) -> torch.Tensor:
    """a bᵀ in the dtype of `like`."""
    return multiply(*a, b[0], b[1].t(), like.dtype, fast=fast)


@torch.library.custom_op("flux2_ds::fp8_linear", mutates_args=())
def fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ [M, N] in x's dtype, differentiable in both."""
    return _product(quantize_rows(x, None, "fp8"), quantize_rows(weight, None, "fp8"), x, fast=True)


@torch.library.custom_op("flux2_ds::fp8_linear_grad", mutates_args=())
def _grads(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(∂y W [M, K], ∂yᵀ x [N, K])."""
    grad_x = _product(quantize_rows(grad, None, "fp8"), quantize_columns(weight), x, fast=False)
    grad_weight = _product(quantize_columns(grad), quantize_columns(x), weight, fast=False)
    return grad_x, grad_weight


@fp8_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_grads.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    # The parameter itself, no view of it: ZeRO-3 may then release what it gathered until the backward pass.
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _grads(grad.contiguous(), *ctx.saved_tensors)


fp8_linear.register_autograd(_backward, setup_context=_save)
