"""How the blocks run changes what is kept, and never what is computed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from flux2_ds.config.memory import kept_streams
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Data, Lora, Model, Recipe
from flux2_ds.model import activation_checkpointing as blocks
from flux2_ds.model import transformer
from flux2_ds.model.activation_checkpointing import arrange_blocks
from flux2_ds.model.load import place_weight
from flux2_ds.ops import quantized_linear as quantize
from flux2_ds.ops.fused_single_block import fuse_single_blocks
from flux2_ds.ops.quantized_linear import expand_nf4

BOTH_KINDS = Spec("klein", "Flux2KleinPipeline", 1, 1, 2, 32, 64, False)


class Step(NamedTuple):
    """The loss and the gradients of a step, and how many bytes waited for its backward pass."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    waiting: int


@pytest.fixture(autouse=True)
def _without_a_code_generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced, differentiated and divided into passes as ever, but run by torch's own kernels."""
    traced = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(blocks.torch, "compile", traced)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield


def build(
    spec: Spec, base: str | None = None, dropout: float = 0.0, dora: bool = False
) -> Flux2Transformer2DModel:
    """A small bf16 model with an adapter in the middle of its training, and the operators of `single.py`."""
    torch.manual_seed(0)
    model = transformer.new_transformer(spec).bfloat16()
    for name, weight in dict(model.named_parameters()).items():
        place_weight(model, name, weight.data, base)
    transformer.keep_timestep_exact(model)
    lora = Lora(rank=4, targets="diffusers", dropout=dropout)
    transformer.add_lora(model, transformer.lora_config(spec, lora, dora=dora), seed=0)
    for name, parameter in transformer.trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    fuse_single_blocks(model)
    return model.train()


def predict(model: Flux2Transformer2DModel, image: int = 32, text: int = 8) -> torch.Tensor:
    """The model's output for so many tokens."""
    generator = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, image, 128, generator=generator),
        encoder_hidden_states=torch.randn(1, text, 64, generator=generator).bfloat16(),
        timestep=torch.tensor([0.5]),
        img_ids=torch.cartesian_prod(*map(torch.arange, (1, image // 8, 8, 1))).float(),
        txt_ids=torch.zeros(text, 4),
        return_dict=False,
    )[0]


def step(model: Flux2Transformer2DModel, *tokens: int) -> Step:
    """One forward and backward pass; counts each storage once, parameters not at all."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    waiting: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            waiting[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(2)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = predict(model, *tokens).float().square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in transformer.trainable(model).items()}
    return Step(loss.detach(), gradients, sum(waiting.values()))


KEPT = (0, 1, 2)


def assert_same(found: Step, expected: Step, kept: int) -> None:
    assert torch.equal(found.loss, expected.loss), kept
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.any() and torch.equal(found.gradients[name], gradient), (kept, name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", [None, "int8", "nf4_fp8"])
def test_what_is_kept_changes_no_result(base: str | None, dropout: float) -> None:
    """Not compiled. With dropout, a block computed again drops the same values again."""
    plain = step(build(BOTH_KINDS, base, dropout))
    for kept in KEPT:
        model = build(BOTH_KINDS, base, dropout)
        arrange_blocks(model, kept=kept, compiled=False, attention=None)
        assert_same(step(model), plain, kept)


@pytest.mark.parametrize("dora", [False, True])
def test_compiled_blocks_keep_what_they_are_told_to(
    dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results of plain autograd, and the more blocks keep, the more bytes wait for the backward
    pass; with all of them, still less than plain autograd holds, and no product is computed twice."""
    products = []

    def counted(*args: Any, transposed: bool = False) -> torch.Tensor:
        if not transposed:  # the forward pass's
            products.append(args)
        return expand_nf4(*args, transposed=transposed)

    monkeypatch.setattr(quantize, "expand_nf4", counted)
    plain = step(build(BOTH_KINDS, "nf4_fp8", dora=dora))
    once, waiting, computed = len(products), [], []
    for kept in KEPT:
        model = build(BOTH_KINDS, "nf4_fp8", dora=dora)
        arrange_blocks(model, kept=kept, compiled=True, attention=None)
        products.clear()
        found = step(model)
        assert_same(found, plain, kept)
        waiting.append(found.waiting)
        computed.append(len(products))
    recomputing, half, keeping = waiting
    assert recomputing < half < keeping < 0.7 * plain.waiting, (waiting, plain.waiting)
    assert computed[0] > computed[1] > computed[2] == once > 0, (computed, once)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("method", "dropout", "base"),
    [("lora", 0.0, None), ("lora", 0.1, None), ("dora", 0.0, None), ("dora", 0.1, None), ("full", 0.0, None),
     ("lora", 0.0, "fp8"), ("lora", 0.1, "fp8"), ("dora", 0.0, "fp8"), ("dora", 0.1, "fp8")],
)  # fmt: skip
def test_blocks_keep_what_the_plan_counts(
    method: Any, dropout: float, base: Any, compiled: bool
) -> None:
    """Of two more blocks of each kind."""
    waiting, image, text = [], 1024, 512
    for blocks_of_a_kind in (1, 3):
        spec = replace(
            BOTH_KINDS, double_blocks=blocks_of_a_kind, single_blocks=blocks_of_a_kind, head_dim=64
        )
        model = transformer.new_transformer(spec).bfloat16()
        for name, weight in dict(model.named_parameters()).items():
            place_weight(model, name, weight.data, base)
        transformer.keep_timestep_exact(model)
        lora = Lora(rank=4, dropout=dropout)
        if method != "full":
            config = transformer.lora_config(spec, lora, dora=method == "dora")
            transformer.add_lora(model, config, seed=0)
        arrange_blocks(model, kept=spec.blocks, compiled=compiled, attention=None)
        waiting.append(step(model.train(), image, text).waiting)
    recipe = Recipe(
        run_dir="r",
        model=Model(path="m"),
        data=Data(images="i", shards="s"),
        method=method,
        base_weights=base,
        lora=lora,
        compile=compiled,
    )
    stream = (image + text) * spec.width * 2
    counted = 2 * stream * sum(kept_streams(recipe))
    if (method, dropout, base, compiled) == ("dora", 0.0, "fp8", False):
        counted *= 0.77  # the plan counts what a base that ZeRO-3 divides needs
    assert waiting[1] - waiting[0] == pytest.approx(counted, rel=0.04)


def test_divided_blocks_are_compiled_both_ways_by_a_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their warm-up has no other; of blocks that are not divided the backward pass waits for its use."""
    directions: list[str] = []

    def compiler(direction: str) -> Any:
        def compile_graph(graph: Any, inputs: Any) -> Any:
            directions.append(direction)
            return make_boxed_func(graph.forward)

        return compile_graph

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    monkeypatch.setattr(
        blocks.torch, "compile", partial(blocks.torch.compile.func, backend=backend)
    )
    for partitioned in (True, False):
        model = build(BOTH_KINDS)
        arrange_blocks(model, kept=0, compiled=True, attention=None, partitioned=partitioned)
        directions.clear()
        predict(model)
        assert directions.count("forward") == 2
        assert directions.count("backward") == (2 if partitioned else 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_inputs_of_blocks_that_recompute_wait_in_host_memory(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token stream once, and nothing holds the card's copy; weights and modulation stay."""
    plain, to_host = step(build(BOTH_KINDS, "nf4_fp8")), blocks._to_host
    moved: list[tuple[tuple[int, ...], weakref.ref[torch.Tensor]]] = []

    def recorded(tensor: torch.Tensor) -> torch.Tensor:
        moved.append((tuple(tensor.shape), weakref.ref(tensor)))
        return to_host(tensor)

    monkeypatch.setattr(blocks, "_to_host", recorded)
    image, text, both = (1, 32, 64), (1, 8, 64), (1, 40, 64)
    for kept, expected in (0, [image, text, both]), (1, [image, text]), (2, []):
        moved.clear()
        model = build(BOTH_KINDS, "nf4_fp8")
        arrange_blocks(model, kept=kept, compiled=compiled, attention=None, offload=True)
        loss = predict(model).float().square().mean()
        assert sorted(shape for shape, _ in moved) == sorted(expected)
        assert all(tensor() is None for _, tensor in moved)
        loss.backward()
        gradients = {name: p.grad for name, p in transformer.trainable(model).items()}
        assert_same(Step(loss.detach(), gradients, 0), plain, kept)


@pytest.mark.parametrize("kept", [0, 2, 5])
def test_the_last_blocks_keep(kept: int) -> None:
    """A block that recomputes runs twice in a step; one that keeps, not compiled, once."""
    spec = replace(BOTH_KINDS, double_blocks=2, single_blocks=3)
    model = build(spec)
    calls = [0] * 5
    for number, block in enumerate([*model.transformer_blocks, *model.single_transformer_blocks]):

        def counted(module: nn.Module, args: object, number: int = number) -> None:
            calls[number] += 1

        # In the block, because `arrange_blocks` wraps the block itself.
        first = block.norm1 if number < 2 else block.norm
        first.register_forward_pre_hook(counted)
    arrange_blocks(model, kept=kept, compiled=False, attention=None)
    step(model)
    assert calls == [2] * (5 - kept) + [1] * kept


def test_an_attention_backend_is_set_by_its_name() -> None:
    model = build(BOTH_KINDS)
    arrange_blocks(model, kept=2, compiled=False, attention="_native_math")
    expected = step(build(BOTH_KINDS))
    found = step(model)
    assert {
        module._attention_backend.value
        for module in (
            model.transformer_blocks[0].attn.processor,
            model.single_transformer_blocks[0].attn.processor,
        )
    } == {"_native_math"}
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.01, atol=0)
