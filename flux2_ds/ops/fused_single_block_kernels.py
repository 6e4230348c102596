"""Triton kernels of what lies between the two linears of a single block, for CUDA cards.

They compute what the torch expressions in `fused_single_block.py` compute, and read and write each value
once. A row of y is q, k, v of d = H·D columns each, then gate and up of m each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HEADS, _HEADS_WARPS = 16, 8
_COLUMNS, _COLUMNS_WARPS = 2048, 4


@triton.jit
def _rotated(part, weight, cos, sin, eps, HEADS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """`part` [HEADS, D], normalised, rounded, and rotated, in fp32."""
    x = part.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    x = (x * scale[:, None] * weight.to(tl.float32)[None, :]).to(part.dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, [HEADS, D // 2, 2]))
    even_cos, odd_cos = tl.split(tl.reshape(cos, [1, D // 2, 2]))
    even_sin, odd_sin = tl.split(tl.reshape(sin, [1, D // 2, 2]))
    return tl.interleave(even * even_cos - odd * even_sin, odd * odd_cos + even * odd_sin)


@triton.jit
def _qkv_norm_rope(
    y, norm_q, norm_k, cos, sin, query, key, value, tokens, heads, width, eps,
    D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Some heads of one token."""
    groups = tl.cdiv(heads, HEADS)
    row = (tl.program_id(0) // groups).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, D)
    inside = (head < heads)[:, None]
    source = y + row * width + head[:, None] * D + column[None, :]
    target = ((batch * heads + head[:, None]) * tokens + token) * D + column[None, :]
    # All loads come before the first store, which none would overtake.
    q = tl.load(source, mask=inside, other=0.0)
    k = tl.load(source + heads * D, mask=inside, other=0.0)
    v = tl.load(source + 2 * heads * D, mask=inside, other=0.0)
    angle = token * D + column
    cosine, sine = tl.load(cos + angle), tl.load(sin + angle)
    weight_q, weight_k = tl.load(norm_q + column), tl.load(norm_k + column)
    rotated = _rotated(q, weight_q, cosine, sine, eps, HEADS, D)
    tl.store(query + target, rotated.to(q.dtype), mask=inside)
    rotated = _rotated(k, weight_k, cosine, sine, eps, HEADS, D)
    tl.store(key + target, rotated.to(k.dtype), mask=inside)
    tl.store(value + target, v, mask=inside)


def qkv_norm_rope(
    y: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `fused_single_block.qkv_norm_rope`; D is a power of two."""
    y, cos, sin = y.contiguous(), cos.contiguous(), sin.contiguous()
    (batch, tokens, width), size = y.shape, norm_q.shape[0]
    query, key, value = (y.new_empty(batch, heads, tokens, size) for _ in range(3))
    _qkv_norm_rope[(batch * tokens * triton.cdiv(heads, _HEADS),)](
        y, norm_q, norm_k, cos, sin, query, key, value, tokens, heads, width, eps,
        D=size, HEADS=_HEADS, num_warps=_HEADS_WARPS,
    )  # fmt: skip
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


@triton.jit
def _concat_swiglu(
    attended, y, concat, tokens, heads, hidden, batch_stride, token_stride, head_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of one row: attention's or the activation's."""
    width = heads * D
    copied = tl.cdiv(width, COLUMNS)
    blocks = copied + tl.cdiv(hidden, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    concat += row * (width + hidden)
    if block < copied:
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        attended += row // tokens * batch_stride + row % tokens * token_stride
        x = tl.load(attended + column // D * head_stride + column % D, mask=inside)
        tl.store(concat + column, x, mask=inside)
    else:
        column = (block - copied) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < hidden
        y += row * (3 * width + 2 * hidden) + 3 * width
        gate = tl.load(y + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(y + hidden + column, mask=inside, other=0.0).to(tl.float32)
        out = concat.dtype.element_ty
        silu = (gate * tl.sigmoid(gate)).to(out).to(tl.float32)
        tl.store(concat + width + column, (silu * up).to(out), mask=inside)


def concat_swiglu(attended: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """See `fused_single_block.concat_swiglu`."""
    y = y.contiguous()
    if attended.stride(-1) != 1:
        attended = attended.contiguous()
    batch, tokens, heads, size = attended.shape
    width = heads * size
    hidden = (y.shape[-1] - 3 * width) // 2
    concat = y.new_empty(batch, tokens, width + hidden)
    blocks = triton.cdiv(width, _COLUMNS) + triton.cdiv(hidden, _COLUMNS)
    _concat_swiglu[(batch * tokens * blocks,)](
        attended, y, concat, tokens, heads, hidden, *attended.stride()[:3],
        D=size, COLUMNS=_COLUMNS, num_warps=_COLUMNS_WARPS,
    )  # fmt: skip
    return concat


@triton.jit
def _rotated_grad(
    grad, part, weight, cos, sin, eps, HEADS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """The gradient of `part` [HEADS, D] from that of its norm's rotation, in fp32."""
    g, x = grad.to(tl.float32), part.to(tl.float32)
    even, odd = tl.split(tl.reshape(g, [HEADS, D // 2, 2]))
    even_cos, odd_cos = tl.split(tl.reshape(cos, [1, D // 2, 2]))
    even_sin, odd_sin = tl.split(tl.reshape(sin, [1, D // 2, 2]))
    g = tl.interleave(even * even_cos + odd * odd_sin, odd * odd_cos - even * even_sin)
    g = g * weight.to(tl.float32)[None, :]
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    shared = scale * scale * scale * tl.sum(x * g, 1) / D
    return scale[:, None] * g - shared[:, None] * x


@triton.jit
def _heads_grad(
    grad_query, grad_key, grad_value, y, norm_q, norm_k, cos, sin, grad_y, tokens, heads, width, eps,
    batch_stride, token_stride, head_stride, D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Some heads of one token."""
    groups = tl.cdiv(heads, HEADS)
    row = (tl.program_id(0) // groups).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, D)
    inside = (head < heads)[:, None]
    source = batch * batch_stride + token * token_stride
    source = source + head[:, None].to(tl.int64) * head_stride + column[None, :]
    place = row * width + head[:, None] * D + column[None, :]
    dq = tl.load(grad_query + source, mask=inside, other=0.0)
    dk = tl.load(grad_key + source, mask=inside, other=0.0)
    dv = tl.load(grad_value + source, mask=inside, other=0.0)
    q = tl.load(y + place, mask=inside, other=0.0)
    k = tl.load(y + place + heads * D, mask=inside, other=0.0)
    angle = token * D + column
    cosine, sine = tl.load(cos + angle), tl.load(sin + angle)
    weight_q, weight_k = tl.load(norm_q + column), tl.load(norm_k + column)
    grad = _rotated_grad(dq, q, weight_q, cosine, sine, eps, HEADS, D)
    tl.store(grad_y + place, grad.to(q.dtype), mask=inside)
    grad = _rotated_grad(dk, k, weight_k, cosine, sine, eps, HEADS, D)
    tl.store(grad_y + place + heads * D, grad.to(k.dtype), mask=inside)
    tl.store(grad_y + place + 2 * heads * D, dv, mask=inside)


@triton.jit
def _swiglu_grad(grad, y, grad_y, width, hidden, COLUMNS: tl.constexpr):  # fmt: skip
    """Some columns of gate and of up in one row."""
    blocks = tl.cdiv(hidden, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    grad += row * (width + hidden) + width
    first = row * (3 * width + 2 * hidden) + 3 * width
    g = tl.load(grad + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(y + first + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(y + first + hidden + column, mask=inside, other=0.0).to(tl.float32)
    out = grad_y.dtype.element_ty
    sigmoid = tl.sigmoid(gate)
    silu = (gate * sigmoid).to(out).to(tl.float32)
    grad_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(grad_y + first + column, grad_gate.to(out), mask=inside)
    tl.store(grad_y + first + hidden + column, (g * silu).to(out), mask=inside)


def single_block_grad(
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
    """See `fused_single_block._grad_of_y`; the gradients of q, k and v may have any strides."""
    y, grad_concat = y.contiguous(), grad_concat.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    grads = [grad_query, grad_key, grad_value]
    if len({grad.stride() for grad in grads}) > 1 or grad_query.stride(-1) != 1:
        grads = [grad.contiguous() for grad in grads]
    batch, tokens, heads, size = grad_query.shape
    width = heads * size
    hidden = (y.shape[-1] - 3 * width) // 2
    grad_y = torch.empty_like(y)
    _heads_grad[(batch * tokens * triton.cdiv(heads, _HEADS),)](
        *grads, y, norm_q, norm_k, cos, sin, grad_y, tokens, heads, y.shape[-1], eps,
        *grads[0].stride()[:3], D=size, HEADS=_HEADS, num_warps=_HEADS_WARPS,
    )  # fmt: skip
    _swiglu_grad[(batch * tokens * triton.cdiv(hidden, _COLUMNS),)](
        grad_concat, y, grad_y, width, hidden, COLUMNS=_COLUMNS, num_warps=_COLUMNS_WARPS
    )
    return grad_y
