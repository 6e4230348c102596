"""How the blocks run changes what is saved, and never what is computed."""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from factories import ONE_OF_EACH, build_adapted, build_transformer, error, predict
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from flux2_ds.config.memory import kept_streams
from flux2_ds.config.recipe import Data, Lora, Model, Recipe
from flux2_ds.model import activation_checkpointing, transformer
from flux2_ds.model.activation_checkpointing import blocks_of, configure_blocks
from flux2_ds.model.lora import add_lora, lora_config
from flux2_ds.ops import fp8_linear, quantized_linear
from flux2_ds.ops.fused_single_block import fuse_single_blocks

CHECKPOINTED = (2, 1, 0)  # of the two blocks of ONE_OF_EACH


class Step(NamedTuple):
    """The loss and the gradients of a step, and how many bytes each block left for its backward pass."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    waiting: list[int]


@pytest.fixture(autouse=True)
def _without_a_code_generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced, differentiated and partitioned into passes as ever, but run by torch's own kernels."""
    traced = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield


def step(model: Flux2Transformer2DModel, *tokens: int) -> Step:
    """One forward and backward pass; counts each storage once, parameters not at all.

    What is saved outside the blocks is the last block's.
    """
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    waiting: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_: waiting.append(0)) for block in blocks_of(model)
    ]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if waiting and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            waiting[-1] += storage.nbytes()
        return tensor

    torch.manual_seed(2)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = predict(model, *tokens).float().square().mean()
    for hook in hooks:  # checkpointed blocks run again
        hook.remove()
    loss.backward()
    gradients = {name: p.grad for name, p in transformer.trainable(model).items()}
    return Step(loss.detach(), gradients, waiting)


def assert_same(found: Step, expected: Step, checkpointed: int) -> None:
    assert torch.equal(found.loss, expected.loss), checkpointed
    assert found.gradients.keys() == expected.gradients.keys()
    for name, grad in expected.gradients.items():
        assert grad.any() and torch.equal(found.gradients[name], grad), (checkpointed, name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", [None, "int8", "nf4_fp8"])
def test_checkpointing_changes_no_result(base: str | None, dropout: float) -> None:
    """Not compiled. With dropout, a block computed again drops the same values again."""
    plain = step(build_adapted(ONE_OF_EACH, base, dropout))
    for checkpointed in CHECKPOINTED:
        model = build_adapted(ONE_OF_EACH, base, dropout)
        configure_blocks(model, checkpointed=checkpointed, compiled=False, attention=None)
        assert_same(step(model), plain, checkpointed)


def test_fp8_products_of_trained_weights_are_the_same_however_the_blocks_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled as one graph a kind, checkpointed or not; a block that keeps computes none of them twice."""
    products, multiply = [], fp8_linear.multiply
    monkeypatch.setattr(
        fp8_linear, "multiply", lambda *a, **k: (products.append(a), multiply(*a, **k))[1]
    )

    def build() -> Flux2Transformer2DModel:
        spec = replace(
            ONE_OF_EACH, double_blocks=2, single_blocks=2
        )  # the first and the last are not in fp8
        model = build_transformer(spec, torch.bfloat16)
        transformer.multiply_in_fp8(model)
        transformer.keep_timestep_exact(model)
        fuse_single_blocks(model)
        return model.train()

    plain = step(build())
    once = len(products)
    assert once == 3 * (12 + 2)
    for compiled, checkpointed, again in ((False, 4, 12 + 2), (True, 2, 12), (True, 0, 0)):
        model = build()
        configure_blocks(model, checkpointed=checkpointed, compiled=compiled, attention=None)
        products.clear()
        found = step(model)
        assert torch.equal(found.loss, plain.loss)
        for name, grad in plain.gradients.items():  # between the products bf16 is rounded elsewhere
            assert error(found.gradients[name], grad) < 0.01, (compiled, checkpointed, name)
        assert len(products) == once + again, (compiled, checkpointed)


@pytest.mark.parametrize("dora", [False, True])
def test_compiled_blocks_save_what_they_are_told_to(
    dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results of plain autograd, and the fewer blocks are checkpointed, the more bytes wait for the
    backward pass; with none, still less than plain autograd holds, and no product is computed twice."""
    products, operand = [], quantized_linear.operand

    def counted(weight: Any, *, transposed: bool = False) -> torch.Tensor:
        if not transposed:  # the forward pass's
            products.append(weight)
        return operand(weight, transposed=transposed)

    monkeypatch.setattr(quantized_linear, "operand", counted)
    plain = step(build_adapted(ONE_OF_EACH, "nf4_fp8", dora=dora))
    once, waiting, computed = len(products), [], []
    for checkpointed in CHECKPOINTED:
        model = build_adapted(ONE_OF_EACH, "nf4_fp8", dora=dora)
        configure_blocks(model, checkpointed=checkpointed, compiled=True, attention=None)
        products.clear()
        found = step(model)
        if not dora:
            assert_same(found, plain, checkpointed)
        # What the compiler takes apart for DoRA some CPUs sum in another order: bf16 is rounded elsewhere.
        assert torch.equal(found.loss, plain.loss)
        for name, grad in plain.gradients.items():
            assert grad.any() and error(found.gradients[name], grad) < 5e-3, (checkpointed, name)
        waiting.append(sum(found.waiting))
        computed.append(len(products))
    full, half, selective = waiting
    assert full < half < selective < 0.7 * sum(plain.waiting), (waiting, plain.waiting)
    assert computed[0] > computed[1] > computed[2] == once > 0, (computed, once)


@pytest.mark.parametrize(
    ("method", "dropout", "base", "compiled"),
    [
        *(("full", 0.0, None, compiled) for compiled in (False, True)),
        *((method, dropout, base, False) for method in ("lora", "dora") for dropout in (0.0, 0.1)
          for base in (None, "fp8")),
        # Compiling takes seconds: each pair of choices once.
        ("lora", 0.0, None, True), ("lora", 0.1, "fp8", True), ("dora", 0.1, None, True),
        ("dora", 0.0, "fp8", True),
        *((method, 0.0, base, compiled) for method in ("lokr", "loha")
          for base, compiled in ((None, False), ("fp8", False), (None, True))),
    ],
)  # fmt: skip
def test_blocks_save_what_the_plan_counts(
    method: Any, dropout: float, base: Any, compiled: bool
) -> None:
    image, text, lora = 1024, 512, Lora(rank=4, dropout=dropout)
    spec = replace(ONE_OF_EACH, double_blocks=2, single_blocks=3, head_dim=64)
    model = build_transformer(spec, torch.bfloat16, base)
    transformer.keep_timestep_exact(model)
    if method != "full":
        add_lora(model, lora_config(spec, lora, method), seed=0)
    for embedder in (model.x_embedder, model.context_embedder):
        embedder.requires_grad_(
            True
        )  # the first block's inputs have gradients, too: one graph a kind
    configure_blocks(model, checkpointed=0, compiled=compiled, attention=None)
    waiting = step(model.train(), image, text).waiting
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
    counted = stream * sum(kept_streams(recipe, spec))
    if (method, dropout, base, compiled) == ("dora", 0.0, "fp8", False):
        counted *= 0.77  # the plan counts what a base that ZeRO-3 partitions needs
    # The second of each kind: the first ones save what all of them read, the last what follows them.
    assert waiting[1] + waiting[3] == pytest.approx(counted, rel=0.04)


def test_partitioned_blocks_are_compiled_both_ways_by_a_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their warm-up has no other; of other blocks the backward pass is compiled at its first use."""
    directions: list[str] = []

    def compiler(direction: str) -> Any:
        def compile_graph(graph: Any, inputs: Any) -> Any:
            directions.append(direction)
            return make_boxed_func(graph.forward)

        return compile_graph

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile.func, backend=backend))
    for partitioned in (True, False):
        model = build_adapted(ONE_OF_EACH)
        configure_blocks(
            model, checkpointed=2, compiled=True, attention=None, partitioned=partitioned
        )
        directions.clear()
        predict(model)
        assert directions.count("forward") == 2
        assert directions.count("backward") == (2 if partitioned else 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_inputs_of_checkpointed_blocks_wait_in_host_memory(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token stream once, and nothing holds the GPU's copy; weights and modulation stay."""
    plain = step(build_adapted(ONE_OF_EACH, "nf4_fp8"))
    to_host = activation_checkpointing._to_host
    moved: list[tuple[tuple[int, ...], weakref.ref[torch.Tensor]]] = []

    def recorded(tensor: torch.Tensor) -> torch.Tensor:
        moved.append((tuple(tensor.shape), weakref.ref(tensor)))
        return to_host(tensor)

    monkeypatch.setattr(activation_checkpointing, "_to_host", recorded)
    image, text, both = (1, 32, 64), (1, 8, 64), (1, 40, 64)
    for checkpointed, expected in (2, [image, text, both]), (1, [image, text]), (0, []):
        moved.clear()
        model = build_adapted(ONE_OF_EACH, "nf4_fp8")
        configure_blocks(
            model, checkpointed=checkpointed, compiled=compiled, attention=None, offload=True
        )
        loss = predict(model).float().square().mean()
        assert sorted(shape for shape, _ in moved) == sorted(expected)
        assert all(tensor() is None for _, tensor in moved)
        loss.backward()
        gradients = {name: p.grad for name, p in transformer.trainable(model).items()}
        assert_same(Step(loss.detach(), gradients, []), plain, checkpointed)


@pytest.mark.parametrize("checkpointed", [0, 3, 5])
def test_the_first_blocks_are_checkpointed(checkpointed: int) -> None:
    """They run twice in a step; the others, not compiled, once."""
    model = build_adapted(replace(ONE_OF_EACH, double_blocks=2, single_blocks=3))
    calls = [0] * 5
    for number, block in enumerate(blocks_of(model)):

        def counted(module: nn.Module, args: object, number: int = number) -> None:
            calls[number] += 1

        # In the block, because `configure_blocks` wraps the block itself.
        first = block.norm1 if number < 2 else block.norm
        first.register_forward_pre_hook(counted)
    configure_blocks(model, checkpointed=checkpointed, compiled=False, attention=None)
    step(model)
    assert calls == [2] * checkpointed + [1] * (5 - checkpointed)


def test_an_attention_backend_is_set_by_its_name() -> None:
    model = build_adapted(ONE_OF_EACH)
    configure_blocks(model, checkpointed=0, compiled=False, attention="_native_math")
    expected = step(build_adapted(ONE_OF_EACH))
    found = step(model)
    backends = {block.attn.processor._attention_backend.value for block in blocks_of(model)}
    assert backends == {"_native_math"}
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.01, atol=0)
