"""The single blocks' kernels against the torch expressions of the CPU, and blocks that use them."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from factories import error, gaussian

from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Lora
from flux2_ds.model import transformer
from flux2_ds.model.activation_checkpointing import configure_blocks
from flux2_ds.model.lora import add_lora, lora_config
from flux2_ds.ops.fused_single_block import concat_swiglu, qkv_norm_rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def run(
    device: str, y: torch.Tensor, attended: torch.Tensor, heads: int, by_heads: bool
) -> list[torch.Tensor]:
    """q, k, v and the concatenated row, and the gradients of y and `attended` [B, S, H, D].

    `by_heads`: the gradients come as [B, H, S, D] is stored, as attention's do.
    """
    size, tokens = attended.shape[-1], y.shape[1]
    norms = [(gaussian(size, seed=n).abs() + 0.5).to(device, y.dtype) for n in (1, 2)]
    angles = 3 * gaussian(tokens, size, seed=3)
    rotation = [angles.cos().to(device), angles.sin().to(device)]
    y, attended = (x.to(device).requires_grad_() for x in (y, attended))
    query, key, value, grad_carrier = qkv_norm_rope(y, *norms, *rotation, 1e-6, heads)
    outputs = [query, key, value, concat_swiglu(attended, y, grad_carrier)]
    directions = []
    for seed, output in enumerate(outputs):
        direction = gaussian(*output.shape, seed=seed).to(device, y.dtype)
        if by_heads and output.ndim == 4:
            direction = direction.transpose(1, 2).contiguous().transpose(1, 2)
        directions.append(direction)
    return [*outputs, *torch.autograd.grad(outputs, [y, attended], directions)]


@pytest.mark.parametrize("by_heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "size", "hidden"),
    # Heads and columns that do not fill the kernels' 16 and 2048, and those of klein 4B and dev.
    [(1, 1, 1, 32, 96), (2, 7, 3, 32, 104), (2, 33, 24, 128, 9216), (1, 65, 48, 128, 18432)],
)
def test_the_kernels_compute_what_the_cpu_does(batch, tokens, heads, size, hidden, dtype, by_heads):
    y = gaussian(batch, tokens, 3 * heads * size + 2 * hidden, seed=4).mul_(2).to(dtype)
    attended = gaussian(batch, heads, tokens, size, seed=5).to(dtype).transpose(1, 2)
    if not by_heads:
        attended = attended.contiguous()
    expected = run("cpu", y, attended, heads, by_heads)
    found = run("cuda", y, attended, heads, by_heads)
    closeness = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    for on_card, on_cpu in zip(found, expected, strict=True):
        assert on_card.is_cuda and on_card.dtype == dtype
        assert on_card.stride() == on_cpu.stride()
        # What is rounded twice may be a step of the larger of a rotated pair apart.
        torch.testing.assert_close(on_card.cpu(), on_cpu, rtol=closeness, atol=16 * closeness)
        assert error(on_card, on_cpu) < closeness / 8
    assert torch.equal(found[2].cpu(), expected[2])  # v is a copy


def test_large_micro_batches():
    """More than 2³¹ elements in y: 65,700 tokens, as many as fourteen samples of 1024² have."""
    y = torch.randn(2, 32850, 3 * 3072 + 2 * 12288, device="cuda", dtype=torch.bfloat16)
    assert y.numel() > 2**31
    norm = torch.ones(128, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(32850, 128, device="cuda")
    y.requires_grad_()
    query, key, value, grad_carrier = qkv_norm_rope(
        y, norm, norm, angles.cos(), angles.sin(), 1e-6, 24
    )
    concat = concat_swiglu(value, y, grad_carrier)
    (grad,) = torch.autograd.grad((query, key, value, concat), y, (query, key, value, concat))
    with torch.no_grad():
        last = y[1:, -3:].detach().cpu()
        _, _, expected, grad_carrier = qkv_norm_rope(
            last,
            norm.cpu(),
            norm.cpu(),
            *(f(angles[-3:].cpu()) for f in (torch.cos, torch.sin)),
            1e-6,
            24,
        )
        assert torch.equal(value[1:, -3:].cpu(), expected)
        torch.testing.assert_close(
            concat[1:, -3:].cpu(), concat_swiglu(expected, last, grad_carrier)
        )
    assert grad[1, -1].any() and grad.isfinite().all()


@pytest.mark.parametrize("attention", ["_native_cudnn", "_native_flash"])
@pytest.mark.parametrize(("checkpointed", "compiled"), [(2, True), (0, True), (2, False)])
def test_blocks_follow_diffusers(checkpointed, compiled, attention):
    """A model in bf16 on the card, against diffusers' own processors with torch's choice of attention."""
    spec = Spec("klein", "Flux2KleinPipeline", 1, 1, 3, 128, 64, False)
    torch.manual_seed(0)
    plain = transformer.new_transformer(spec).cuda().bfloat16()
    transformer.keep_timestep_exact(plain)
    add_lora(plain, lora_config(spec, Lora(rank=4)), seed=0)
    for name, parameter in transformer.trainable(plain).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    configured = copy.deepcopy(plain)
    configure_blocks(configured, checkpointed=checkpointed, compiled=compiled, attention=attention)
    results = []
    for model in (plain, configured):
        # diffusers' own processors would use the backend that was last set for any model.
        with attention_backend("native"):
            prediction = model(
                hidden_states=gaussian(2, 64, 128).cuda(),
                encoder_hidden_states=gaussian(2, 32, 64, seed=1).cuda().bfloat16(),
                timestep=torch.tensor([0.2, 0.7], device="cuda"),
                img_ids=torch.cartesian_prod(*map(torch.arange, (1, 8, 8, 1))).float().cuda(),
                txt_ids=torch.zeros(32, 4, device="cuda"),
            ).sample
        prediction.float().square().mean().backward()
        results.append((prediction, transformer.trainable(model)))
    (expected, theirs), (found, ours) = results
    assert error(found, expected) < 0.02
    for name, parameter in theirs.items():
        assert error(ours[name].grad, parameter.grad) < 0.05, name
