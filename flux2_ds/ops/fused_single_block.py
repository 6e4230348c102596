"""What lies between the two linears of a single block, as two operators of torch.

A single block's first linear gives each token q, k, v, gate and up in one row; its second one takes the
attention's output and silu(gate)·up in one row. `split_single` makes normalised and rotated q and k, and v;
`join_single` makes the row for the second linear. Their gradient is one operator, too, which writes
the gradient of the wide row once. It goes there by `path`, a tensor without values: `split_single` returns
it, `join_single` takes it in, and its gradient is the gradient of `join_single`'s output.

Values are rounded where diffusers rounds them when it is not compiled; gradients are computed in fp32
and rounded once.
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


class SplitJoinProcessor(Flux2ParallelSelfAttnProcessor):
    """diffusers' attention of the single blocks, with `split_single` and `join_single`."""

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
        query, key, value, path = split_single(
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
        output: torch.Tensor = attn.to_out(join_single(attended, y, path))
        return output


def fuse_single_blocks(model: Flux2Transformer2DModel) -> None:
    """Let the single blocks use the operators."""
    for block in model.single_transformer_blocks:
        block.attn.set_processor(SplitJoinProcessor())


@torch.library.custom_op("flux2_ds::split_single", mutates_args=())
def split_single(
    y: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, k, v, path) of y [B, S, 3d + 2m], differentiable in y and in the norms' weights.

    q, k, v: [B, S, H, D], stored as [B, H, S, D], which is how attention wants them; q and k normalised
    by heads (RMS, weights `norm_q` and `norm_k` [D], `eps`) and rotated by `cos` and `sin` [S, D] fp32 in
    interleaved pairs. path: [B, S, d + m], for `join_single` alone.
    """
    width = heads * norm_q.shape[0]
    path = _path(y, width)
    if y.is_cuda:
        return *single_kernels.split_heads(y, norm_q, norm_k, cos, sin, eps, heads), path
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
    return query, key, value, path


@torch.library.custom_op("flux2_ds::join_single", mutates_args=())
def join_single(attended: torch.Tensor, y: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """[attended, silu(gate)·up] [B, S, d + m], for attended [B, S, H, D] and y as in `split_single`.

    Differentiable in `attended` and, by `path`, in y.
    """
    if y.is_cuda:
        return single_kernels.join(attended, y)
    flat = attended.flatten(2)
    *_, gate, up = _parts(y, flat.shape[-1])
    return torch.cat([flat, functional.silu(gate) * up], dim=-1)


@torch.library.custom_op("flux2_ds::split_single_gradient", mutates_args=())
def _gradient(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    grad_joined: torch.Tensor,
    y: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The gradient of y from those of `split_single`'s and `join_single`'s outputs."""
    if y.is_cuda:
        return single_kernels.gradient(
            grad_query, grad_key, grad_value, grad_joined, y, norm_q, norm_k, cos, sin, eps
        )
    heads = grad_query.shape[2]
    query, key, _, gate, up = (part.float() for part in _parts(y, heads * grad_query.shape[3]))
    wide = [
        _norm_gradient(
            _rotate_back(grad.float(), cos, sin), x.unflatten(-1, (heads, -1)), weight, eps
        )
        for grad, x, weight in ((grad_query, query, norm_q), (grad_key, key, norm_k))
    ]
    wide.append(grad_value.float())
    grad = grad_joined[..., -gate.shape[-1] :].float()
    sigmoid = gate.sigmoid()
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad * functional.silu(gate).to(y.dtype)
    return torch.cat([*(x.flatten(2) for x in wide), grad_gate, grad_up], dim=-1).to(y.dtype)


def _rotate_back(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The gradient of what was rotated, [B, S, H, D]."""
    turned = (grad * sin[:, None]).unflatten(-1, (-1, 2))
    return grad * cos[:, None] + torch.stack([turned[..., 1], -turned[..., 0]], dim=-1).flatten(-2)


def _norm_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The gradient of x from that of w∘x·r, where r = (mean x² + eps)^-½ along the last dimension."""
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    grad = grad * weight
    return scale * grad - scale**3 * x * (x * grad).mean(-1, keepdim=True)


def _weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """The gradient [D] of the norm's weight from that of what was rotated, [B, S, H, D]; x [B, S, d]."""
    normalised = functional.rms_norm(
        x.float().unflatten(-1, grad.shape[2:]), grad.shape[3:], eps=eps
    )
    return (_rotate_back(grad.float(), cos, sin) * normalised).sum((0, 1, 2))


def _parts(y: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, S, d], gate and up [B, S, m]."""
    hidden = (y.shape[-1] - 3 * width) // 2
    return y.split([width, width, width, hidden, hidden], dim=-1)


def _path(y: torch.Tensor, width: int) -> torch.Tensor:
    # Of one element, repeated.
    return y.new_empty(1).expand(*y.shape[:2], (y.shape[-1] - width) // 2)


@split_single.register_fake
def _(
    y: torch.Tensor, norm_q: torch.Tensor, _k: Any, _cos: Any, _sin: Any, _eps: float, heads: int
) -> tuple[torch.Tensor, ...]:
    shape = (y.shape[0], heads, y.shape[1], norm_q.shape[0])
    query, key, value = (y.new_empty(shape).transpose(1, 2) for _ in range(3))
    return query, key, value, _path(y, heads * norm_q.shape[0])


@join_single.register_fake
def _(attended: torch.Tensor, y: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    return y.new_empty(path.shape)


@_gradient.register_fake
def _(_q: Any, _k: Any, _v: Any, _joined: Any, y: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _keep_row(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradient_of_row(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    y, norm_q, norm_k, cos, sin = ctx.saved_tensors
    norms: list[torch.Tensor | None] = [None, None]
    for place, norm in enumerate((norm_q, norm_k)):
        if ctx.needs_input_grad[1 + place]:
            part = _parts(y, grads[place].shape[2:].numel())[place]
            norms[place] = _weight_gradient(grads[place], part, cos, sin, ctx.eps).to(norm.dtype)
    return _gradient(*grads, y, norm_q, norm_k, cos, sin, ctx.eps), *norms, *[None] * 4


def _keep_shape(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.heads = inputs[0].shape[2:]


def _pass_on(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # cuDNN's attention is given a dense gradient.
    return grad[..., : ctx.heads.numel()].contiguous().unflatten(-1, ctx.heads), None, grad


split_single.register_autograd(_gradient_of_row, setup_context=_keep_row)
join_single.register_autograd(_pass_on, setup_context=_keep_shape)


if torch.cuda.is_available():
    from flux2_ds.ops import fused_single_block_kernels as single_kernels
