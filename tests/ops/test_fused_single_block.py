"""The single blocks' own operators against diffusers' attention processor."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux2 import (
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
)

from flux2_ds.ops.fused_single_block import (
    FusedSingleBlockProcessor,
    concat_swiglu,
    qkv_norm_rope,
)

HEADS, SIZE = 3, 32


def attention(seed: int = 0) -> Flux2ParallelSelfAttention:
    """A single block's attention with weights that make every part of it matter."""
    torch.manual_seed(seed)
    width = HEADS * SIZE
    attn = Flux2ParallelSelfAttention(
        width, HEADS, SIZE, out_bias=False, eps=1e-6, out_dim=width, mlp_ratio=3.0
    )
    for norm in (attn.norm_q, attn.norm_k):
        norm.weight.data.uniform_(0.5, 2)
    attn.to_qkv_mlp_proj.weight.data *= 4
    return attn


def inputs(batch: int, tokens: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, tokens, HEADS * SIZE, generator=generator)
    # Not in equal pairs as FLUX.2's angles are, so that nothing can be exchanged unseen.
    angles = 7 * torch.rand(tokens, SIZE, generator=generator)
    return x, (angles.cos(), angles.sin())


def run(
    attn: Flux2ParallelSelfAttention, processor: Flux2ParallelSelfAttnProcessor,
    dtype: torch.dtype, batch: int, tokens: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """The output, and the gradients of the input and of all weights."""
    attn = copy.deepcopy(attn).to(dtype)
    attn.set_processor(processor)
    x, rotation = inputs(batch, tokens)
    x = x.to(dtype).requires_grad_()
    with attention_backend("native"):  # diffusers keeps the one that a model was last given
        output = attn(x, image_rotary_emb=rotation)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    wanted = [x, *attn.parameters()]
    return output, [g.double() for g in torch.autograd.grad(output, wanted, direction)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 9), (2, 7)])
def test_the_operators_compute_what_diffusers_does(batch, tokens, dtype):
    """The same output to the last bit, and gradients that are no further from those in fp32. Of a norm's 32 weights the
    distance is by chance: of two CPUs one rounds a little to our disadvantage."""
    attn = attention()
    expected, theirs = run(attn, Flux2ParallelSelfAttnProcessor(), dtype, batch, tokens)
    output, ours = run(attn, FusedSingleBlockProcessor(), dtype, batch, tokens)
    assert output.dtype == dtype and torch.equal(output, expected)
    _, exact = run(attn, Flux2ParallelSelfAttnProcessor(), torch.float32, batch, tokens)
    for found, other, truth in zip(ours, theirs, exact, strict=True):
        slack = 1.1 if truth.ndim > 1 else 1.25
        allowed = (
            2e-6 if dtype == torch.float32 else slack * float((other - truth).norm() / truth.norm())
        )
        assert float((found - truth).norm() / truth.norm()) < allowed


def test_the_gradients_are_those_of_each_output():
    """Of every output by itself, q, k, v and the concatenated row; in fp32, against autograd's own."""
    x, (cos, sin) = inputs(2, 5)
    attn = attention()
    rows = attn.to_qkv_mlp_proj(x).detach()
    norm_q, norm_k = attn.norm_q.weight, attn.norm_k.weight
    attended = torch.randn(2, 5, HEADS, SIZE, generator=torch.Generator().manual_seed(3))

    def outputs(y: torch.Tensor, attended: torch.Tensor) -> list[torch.Tensor]:
        query, key, value, grad_carrier = qkv_norm_rope(y, norm_q, norm_k, cos, sin, 1e-6, HEADS)
        return [query, key, value, concat_swiglu(attended, y, grad_carrier)]

    def rotated(part: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
        pairs = torch.view_as_complex(
            norm(part.unflatten(-1, (HEADS, SIZE))).unflatten(-1, (-1, 2))
        )
        # (a + ib)(c + is) with c and s of each component's own.
        real = pairs.real * cos[:, None, 0::2] - pairs.imag * sin[:, None, 0::2]
        imaginary = pairs.imag * cos[:, None, 1::2] + pairs.real * sin[:, None, 1::2]
        return torch.stack([real, imaginary], -1).flatten(-2)

    def reference(y: torch.Tensor, attended: torch.Tensor) -> list[torch.Tensor]:
        width = HEADS * SIZE
        query, key, value, gate, up = y.split([width] * 3 + [3 * width] * 2, -1)
        joined = torch.cat([attended.flatten(2), gate / (1 + (-gate).exp()) * up], -1)
        return [
            rotated(query, attn.norm_q),
            rotated(key, attn.norm_k),
            value.unflatten(-1, (HEADS, -1)),
            joined,
        ]

    for number in range(4):
        given = [rows.clone().requires_grad_(), attended.clone().requires_grad_()]
        wanted = [*given, norm_q, norm_k]
        found, expected = outputs(*given)[number], reference(*given)[number]
        torch.testing.assert_close(found, expected)
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(number))
        one, other = (
            torch.autograd.grad(x, wanted, weights, allow_unused=True, materialize_grads=True)
            for x in (found, expected)
        )
        assert [bool(g.any()) for g in other] == [True, number == 3, number == 0, number == 1]
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_attention_gets_what_it_would_copy_otherwise():
    """cuDNN's backend makes [B, H, S, D] contiguous; and `grad_carrier` holds one value."""
    x, rotation = inputs(2, 5)
    attn = attention()
    query, key, value, grad_carrier = qkv_norm_rope(
        attn.to_qkv_mlp_proj(x), attn.norm_q.weight, attn.norm_k.weight, *rotation, 1e-6, HEADS
    )
    assert all(part.permute(0, 2, 1, 3).is_contiguous() for part in (query, key, value))
    assert grad_carrier.untyped_storage().nbytes() == x.element_size()


def test_a_compiler_is_told_the_shapes_and_strides_that_come():
    x, rotation = inputs(2, 5)
    attn = attention()
    y = attn.to_qkv_mlp_proj(x).detach().requires_grad_()
    norms = attn.norm_q.weight, attn.norm_k.weight
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (y, *norms, *rotation, 1e-6, HEADS)
    torch.library.opcheck(qkv_norm_rope, arguments, test_utils=checks)
    query, key, value, grad_carrier = qkv_norm_rope(*arguments)
    torch.library.opcheck(concat_swiglu, (query, y, grad_carrier), test_utils=checks)
    gradient = torch.ops.flux2_ds.single_block_grad
    given = (query, key, value, concat_swiglu(query, y, grad_carrier), y, *norms, *rotation, 1e-6)
    torch.library.opcheck(gradient, tuple(map(detached, given)), test_utils=checks)


def detached(value: object) -> object:
    return value.detach() if isinstance(value, torch.Tensor) else value
