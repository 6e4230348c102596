"""Trained linears of which all three products are in fp8: y = x Wᵀ, ∂x = ∂y W, ∂W = ∂yᵀ x.

x and W are quantized to e4m3 once, with one scale for each row: a token of x, an output of W. The backward pass
reads the same 8-bit values the other way around. There the scales of their rows lie along the dimension that is
summed, so they are folded into ∂y before that is quantized, by rows for ∂x and by columns for ∂W. Two full
readings, for the largest values of x's and of W's columns, are saved so. The cost: what is smaller than 1/28,672 of
its token's or its output's largest value has fewer bits in the gradients, too, and not in y alone. torchao's
"rowwise" recipe (`Float8LinearConfig`) quantizes both operands anew for each product, and rounds scales to powers
of two. As there, gradients are e4m3, too, whose range the scales make small enough, and are summed in fp32.

Shapes: x [M, K], W [N, K], y and ∂y [M, N]; scales of x [M, 1] and of W [N, 1], fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flux2_ds.ops.quantized_linear import (
    multiply,
    ones,
    quantize_columns,
    quantize_rows,
    turn_rows,
)


class Fp8Linear(nn.Linear):
    """y = x Wᵀ with trained W; what an `nn.Linear` without bias becomes by `__class__`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        rows, *_ = fp8_linear(x.flatten(0, -2), self.weight)
        return rows.view(*x.shape[:-1], self.out_features)


@torch.library.custom_op("flux2_ds::fp8_linear", mutates_args=())
def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x Wᵀ [M, N] in x's dtype, differentiable in both; scales of x; scales of W)."""
    values, x_scale = quantize_rows(x, None, "fp8")
    weight_values, weight_scale = quantize_rows(weight, None, "fp8")
    y = multiply(values, x_scale, weight_values, weight_scale.t(), x.dtype)
    return y, x_scale, weight_scale


@torch.library.custom_op("flux2_ds::fp8_linear_grad", mutates_args=())
def fp8_linear_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(∂y W [M, K], ∂yᵀ x [N, K])."""
    unscaled = ones(grad.device, x.shape[1])
    values, scale = quantize_rows(grad, weight_scale.t(), "fp8")
    turned = turn_rows(weight, weight_scale)
    grad_x = multiply(values, scale, turned, unscaled, x.dtype, fast=False)
    values, scale = quantize_columns(grad, x_scale)
    turned = turn_rows(x, x_scale)
    return grad_x, multiply(values, scale, turned, unscaled, weight.dtype, fast=False)


@fp8_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    x_scale, weight_scale = (t.new_empty(t.shape[0], 1, dtype=torch.float32) for t in (x, weight))
    return y, x_scale, weight_scale


@fp8_linear_grad.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    # The parameter itself, no view of it: ZeRO-3 may then release what it gathered until the backward pass.
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: torch.Tensor, *_: None) -> tuple[torch.Tensor, torch.Tensor]:
    return fp8_linear_grad(grad.contiguous(), *ctx.saved_tensors)


fp8_linear.register_autograd(_backward, setup_context=_save)
