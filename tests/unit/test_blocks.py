"""How the blocks run changes what is kept, and never what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from flux2_ds.model import blocks, transformer
from flux2_ds.model.blocks import arrange_blocks
from flux2_ds.model.quantize import BASE_WEIGHTS
from flux2_ds.model.weights import place_weight
from flux2_ds.recipe import Lora
from flux2_ds.spec import Spec

# Double blocks, single blocks, heads of 32, width of the text.
SPEC = Spec("klein", "Flux2KleinPipeline", 2, 2, 2, 32, 64, False)
BLOCKS = SPEC.double_blocks + SPEC.single_blocks


@pytest.fixture(autouse=True)
def _without_a_code_generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced, differentiated and divided into passes as ever, but run by torch's own kernels."""
    traced = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(blocks.torch, "compile", traced)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield


def build(base: str | None = None, dropout: float = 0.0) -> Flux2Transformer2DModel:
    """A small bf16 model with an adapter in the middle of its training."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        num_layers=SPEC.double_blocks,
        num_single_layers=SPEC.single_blocks,
        num_attention_heads=SPEC.heads,
        attention_head_dim=SPEC.head_dim,
        joint_attention_dim=SPEC.text_width,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    ).bfloat16()
    for name, weight in dict(model.named_parameters()).items():
        place_weight(model, name, weight.data, BASE_WEIGHTS[base] if base else None)
    transformer.keep_timestep_exact(model)
    lora = Lora(rank=4, targets="all", dropout=dropout)
    transformer.add_lora(model, transformer.lora_config(SPEC, lora, dora=False), seed=0)
    for name, parameter in transformer.trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model.train()


def predict(model: Flux2Transformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, 32, 128, generator=generator),
        encoder_hidden_states=torch.randn(1, 8, 64, generator=generator).bfloat16(),
        timestep=torch.tensor([0.5]),
        img_ids=torch.cartesian_prod(*map(torch.arange, (1, 4, 8, 1))).float(),
        txt_ids=torch.zeros(8, 4),
    ).sample


def step(model: Flux2Transformer2DModel) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, the gradients, and how many bytes waited for the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    waiting: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            waiting[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(2)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = predict(model).float().square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in transformer.trainable(model).items()}
    return loss.detach(), gradients, sum(waiting.values())


@pytest.mark.parametrize("base", [None, "nf4_fp8"])
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_and_gradients_are_those_of_plain_autograd(base: str | None, compiled: bool) -> None:
    loss, gradients, _ = step(build(base))
    for keep in (0.0, 0.5, 1.0):
        model = build(base)
        arrange_blocks(model, keep=keep, compiled=compiled, attention=None)
        found, ours, _ = step(model)
        assert torch.equal(found, loss), keep
        for name, gradient in gradients.items():
            assert torch.equal(ours[name], gradient), (keep, name)


@pytest.mark.parametrize("base", [None, "nf4_fp8"])
def test_what_waits_for_the_backward_pass(base: str | None) -> None:
    """Compiled: the more blocks keep, the more bytes; with all of them still less than plainly."""
    waiting = []
    for keep in (0.0, 0.5, 1.0, None):
        model = build(base)
        if keep is not None:
            arrange_blocks(model, keep=keep, compiled=True, attention=None)
        waiting.append(step(model)[2])
    assert waiting == sorted(waiting) and len(set(waiting)) == 4, waiting
