"""A base that passes through two buffers computes what a base on the device does, to the last bit."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from factories import SPECS, build_transformer, predict
from safetensors.torch import save_file

from flux2_ds.config.recipe import Lora
from flux2_ds.engine.streamed_base import streamed_base
from flux2_ds.model import transformer
from flux2_ds.model.activation_checkpointing import blocks_of, configure_blocks
from flux2_ds.model.load import read_weights
from flux2_ds.model.lora import add_lora, lora_config
from flux2_ds.ops.quantized_linear import BASE_WEIGHTS

CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda"),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        ],
    ),
]
SPEC = SPECS["klein"]  # 2 double and 3 single blocks
ALL = range(SPEC.blocks)


@pytest.fixture(autouse=True)
def _without_a_code_generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced, differentiated and partitioned into passes as ever, but run by torch's own kernels."""
    traced = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    weights = build_transformer(SPEC).state_dict()
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def build(
    files: Path,
    streamed: Any,
    device: torch.device = CPU,
    *,
    base: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    dora: bool = False,
    dropout: float = 0.0,
    checkpointed: int | None = None,
    compiled: bool = False,
    offload: bool = False,
) -> Flux2Transformer2DModel:
    """With an adapter in the middle of its training. `checkpointed`: None leaves the blocks as diffusers
    made them."""
    model = transformer.empty_transformer(SPEC)
    with streamed_base(model, streamed, device) as blocks:
        read_weights(model, files, dtype, device, base, streamed=blocks)
    transformer.keep_timestep_exact(model)
    settings = Lora(rank=4, targets="diffusers", dropout=dropout)
    add_lora(model, lora_config(SPEC, settings, "dora" if dora else "lora"), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.trainable(model).items():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    if checkpointed is not None:
        configure_blocks(
            model, checkpointed=checkpointed, compiled=compiled, attention=None, offload=offload
        )
    return model.train()


def trained(model: Flux2Transformer2DModel) -> list[torch.Tensor]:
    """Losses, an evaluation and the last gradients of three steps."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)  # of dropout
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found.append(predict(model.eval(), 16))
        loss = predict(model.train(), 16).float().square().mean()
        loss.backward()
        found.append(loss.detach())
        for parameter in transformer.trainable(model).values():
            assert parameter.grad is not None
            found.append(parameter.grad)
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
    return found


HALF = [0, 2, 3]
CASES: list[tuple[Any, dict[str, Any]]] = [
    (ALL, {"dtype": torch.float32}),
    (HALF, {"dtype": torch.float32, "dora": True, "checkpointed": 5}),
    (ALL, {"checkpointed": 3}),
    ([4], {"checkpointed": 0}),
    ([1, 2, 3, 4], {"dora": True, "dropout": 0.3, "checkpointed": 3}),
    (ALL, {"checkpointed": 4, "offload": True}),
    (ALL, {"base": "fp8", "checkpointed": 2, "compiled": True}),  # each kind one graph
    *((ALL, {"base": base, "checkpointed": 2}) for base in BASE_WEIGHTS),
    *((HALF, {"base": base, "dora": True, "checkpointed": 0}) for base in BASE_WEIGHTS),
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("streamed", "case"), CASES, ids=str)
def test_a_streamed_base_computes_the_same_bits(
    files: Path, streamed: Any, case: dict[str, Any], device: torch.device
) -> None:
    """Whether blocks keep or recompute, compiled without another graph, evaluations between the steps."""
    graphs = []
    results = []
    for blocks in ((), streamed):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        results.append(trained(build(files, blocks, device, **case)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(results[0]) == len(results[1])
    assert all(map(torch.equal, *results))
    assert graphs[0] == graphs[1]


def test_only_two_blocks_are_on_the_device(files: Path) -> None:
    model = build(files, [1, 2, 3, 4])
    storages = [
        {p.untyped_storage().data_ptr() for p in block.parameters() if not p.requires_grad}
        for block in blocks_of(model)
    ]
    assert storages[1] == storages[3] != storages[2] == storages[4]
    assert len(storages[1]) == len(storages[2]) == 1
    assert storages[0].isdisjoint(storages[1] | storages[2])
    double, single = (
        sum(p.nbytes for p in blocks_of(build_transformer(SPEC, torch.bfloat16))[n].parameters())
        for n in (1, 2)
    )
    sizes = [next(blocks_of(model)[n].parameters()).untyped_storage().nbytes() for n in (1, 2)]
    for size, needed in zip(sizes, (double, single), strict=True):
        assert needed <= size < needed + 256 * 20
    assert double > 1.9 * single
