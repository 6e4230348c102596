"""What lies between the two linears of a single block, fused into two torch operators.

A single block's first linear gives each token one row y = (q, k, v, gate, up); its second one takes the
row (attention's output, silu(gate)·up). `qkv_norm_rope` makes normalized and rotated q and k, and v, from
y; `concat_swiglu` makes the second row. One backward operator writes the gradient of y once, for both. It
gets the gradient of the second row by `grad_carrier`, a tensor without values: `qkv_norm_rope` returns it,
`concat_swiglu` takes it, and its gradient is that of `concat_swiglu`'s output.

Values are rounded where diffusers rounds them when it is not compiled; gradients are computed in fp32
and rounded once.

Shapes: B batch, S tokens, H heads, D head size, d = H·D, m the width of gate and of up; y [B, S, 3d + 2m],
q, k, v and attention's output [B, S, H, D], cos and sin [S, D] fp32, norm weights [D].
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import (
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
)
from torch.nn import functional


class FusedSingleBlockProcessor(Flux2ParallelSelfAttnProcessor):
    """diffusers' attention of the single blocks, with the fused operators."""

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[B, S, d] -> [B, S, d]."""
        assert image_rotary_emb is not None
        y = attn.to_qkv_mlp_proj(hidden_states)
        norm_q, norm_k = attn.norm_q, attn.norm_k
        query, key, value, grad_carrier = qkv_norm_rope(
            y, norm_q.weight, norm_k.weight, *image_rotary_emb, norm_q.eps, attn.heads
        )
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        output: torch.Tensor = attn.to_out(concat_swiglu(attended, y, grad_carrier))
        return output


def fuse_single_blocks(model: Flux2Transformer2DModel) -> None:
    """Let the single blocks use the fused operators."""
    for block in model.single_transformer_blocks:
        block.attn.set_processor(FusedSingleBlockProcessor())


@torch.library.custom_op("flux2_ds::qkv_norm_rope", mutates_args=())
def qkv_norm_rope(
    y: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, k, v, grad_carrier) of y, differentiable in y and in the norms' weights.

    q and k have RMS norm by heads and rotation in interleaved pairs. q, k and v are stored as
    [B, H, S, D], which is how attention wants them. grad_carrier: [B, S, d + m].
    """
    width = heads * norm_q.shape[0]
    grad_carrier = _grad_carrier(y, width)
    if y.is_cuda:
        return *kernels.qkv_norm_rope(y, norm_q, norm_k, cos, sin, eps, heads), grad_carrier
    query, key, value = (part.unflatten(-1, (heads, -1)) for part in _parts(y, width)[:3])
    query, key = (
        apply_rotary_emb(
            functional.rms_norm(x, weight.shape, weight, eps), (cos, sin), sequence_dim=1
        )
        for x, weight in ((query, norm_q), (key, norm_k))
    )
    query, key, value = (
        x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        for x in (query, key, value)
    )
    return query, key, value, grad_carrier


@torch.library.custom_op("flux2_ds::concat_swiglu", mutates_args=())
def concat_swiglu(
    attended: torch.Tensor, y: torch.Tensor, grad_carrier: torch.Tensor
) -> torch.Tensor:
    """[attended, silu(gate)·up] [B, S, d + m]; differentiable in `attended` and, by the carrier, in y."""
    if y.is_cuda:
        return kernels.concat_swiglu(attended, y)
    flat = attended.flatten(2)
    *_, gate, up = _parts(y, flat.shape[-1])
    return torch.cat([flat, functional.silu(gate) * up], dim=-1)


@torch.library.custom_op("flux2_ds::single_block_grad", mutates_args=())
def _grad_of_y(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    grad_concat: torch.Tensor,
    y: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The gradient of y from those of both operators' outputs."""
    if y.is_cuda:
        return kernels.single_block_grad(
            grad_query, grad_key, grad_value, grad_concat, y, norm_q, norm_k, cos, sin, eps
        )
    heads = grad_query.shape[2]
    query, key, _, gate, up = (part.float() for part in _parts(y, heads * grad_query.shape[3]))
    grads = [
        _norm_grad(
            _unrotate_grad(grad.float(), cos, sin), x.unflatten(-1, (heads, -1)), weight, eps
        )
        for grad, x, weight in ((grad_query, query, norm_q), (grad_key, key, norm_k))
    ]
    grads.append(grad_value.float())
    grad = grad_concat[..., -gate.shape[-1] :].float()
    sigmoid = gate.sigmoid()
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad * functional.silu(gate).to(y.dtype)
    return torch.cat([*(x.flatten(2) for x in grads), grad_gate, grad_up], dim=-1).to(y.dtype)


def _unrotate_grad(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The gradient of the rotation's input, [B, S, H, D]."""
    turned = (grad * sin[:, None]).unflatten(-1, (-1, 2))
    return grad * cos[:, None] + torch.stack([turned[..., 1], -turned[..., 0]], dim=-1).flatten(-2)


def _norm_grad(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The gradient of x from that of w∘x·r, where r = (mean x² + eps)^-½ along the last dimension."""
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    grad = grad * weight
    return scale * grad - scale**3 * x * (x * grad).mean(-1, keepdim=True)


def _norm_weight_grad(
    grad: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """The gradient [D] of a norm's weight from that of q or k; x: that part of y, [B, S, d]."""
    normalized = functional.rms_norm(
        x.float().unflatten(-1, grad.shape[2:]), grad.shape[3:], eps=eps
    )
    return (_unrotate_grad(grad.float(), cos, sin) * normalized).sum((0, 1, 2))


def _parts(y: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, S, d], gate and up [B, S, m]."""
    hidden = (y.shape[-1] - 3 * width) // 2
    return y.split([width, width, width, hidden, hidden], dim=-1)


def _grad_carrier(y: torch.Tensor, width: int) -> torch.Tensor:
    # One element, repeated.
    return y.new_empty(1).expand(*y.shape[:2], (y.shape[-1] - width) // 2)


@qkv_norm_rope.register_fake
def _(
    y: torch.Tensor, norm_q: torch.Tensor, _k: Any, _cos: Any, _sin: Any, _eps: float, heads: int
) -> tuple[torch.Tensor, ...]:
    shape = (y.shape[0], heads, y.shape[1], norm_q.shape[0])
    query, key, value = (y.new_empty(shape).transpose(1, 2) for _ in range(3))
    return query, key, value, _grad_carrier(y, heads * norm_q.shape[0])


@concat_swiglu.register_fake
def _(attended: torch.Tensor, y: torch.Tensor, grad_carrier: torch.Tensor) -> torch.Tensor:
    return y.new_empty(grad_carrier.shape)


@_grad_of_y.register_fake
def _(_q: Any, _k: Any, _v: Any, _concat: Any, y: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _save_row(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _qkv_backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    y, norm_q, norm_k, cos, sin = ctx.saved_tensors
    norms: list[torch.Tensor | None] = [None, None]
    for place, norm in enumerate((norm_q, norm_k)):
        if ctx.needs_input_grad[1 + place]:
            part = _parts(y, grads[place].shape[2:].numel())[place]
            norms[place] = _norm_weight_grad(grads[place], part, cos, sin, ctx.eps).to(norm.dtype)
    return _grad_of_y(*grads, y, norm_q, norm_k, cos, sin, ctx.eps), *norms, *[None] * 4


def _save_heads(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.heads = inputs[0].shape[2:]


def _concat_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # cuDNN's attention is given a dense gradient.
    return grad[..., : ctx.heads.numel()].contiguous().unflatten(-1, ctx.heads), None, grad


qkv_norm_rope.register_autograd(_qkv_backward, setup_context=_save_row)
concat_swiglu.register_autograd(_concat_backward, setup_context=_save_heads)


if torch.cuda.is_available():
    from flux2_ds.ops import fused_single_block_kernels as kernels
