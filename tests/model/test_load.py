"""Weights read from files: whole, quantized, or a rank's partition; and files that do not fit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from factories import ONE_OF_EACH, build_transformer, error, gaussian, predict
from safetensors.torch import save_file
from torch import nn

from flux2_ds.errors import UserError
from flux2_ds.model.load import place_weight, read_partitioned, read_weights
from flux2_ds.model.transformer import empty_transformer, keep_timestep_exact
from flux2_ds.ops.quantized_linear import BASE_WEIGHTS, QuantizedLinear, dequantize

CPU = torch.device("cpu")
NAME = "diffusion_pytorch_model.safetensors"
SHAPES = {"norm": (5,), "linear": (3, 4)}


class Partitioner:
    """Leaves of each parameter what ZeRO-3 does in one of `world_size` ranks, with nothing in it yet."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def __call__(self, module: nn.Module) -> None:
        parameter: Any
        for parameter in module.parameters():
            parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
            size = -(-parameter.numel() // self.world_size)
            parameter.ds_tensor = torch.full((size,), 77, dtype=parameter.dtype)
            parameter.data = torch.empty(0, dtype=parameter.dtype)


def empty(shapes: dict[str, tuple[int, ...]] = SHAPES) -> nn.Module:
    """A module for each weight, on the meta device."""
    model = nn.Module()
    for path, shape in shapes.items():
        *parents, name = path.split(".")
        parent = model
        for each in parents:
            if each not in dict(parent.named_children()):
                parent.add_module(each, nn.Module())
            parent = parent.get_submodule(each)
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(shape, device="meta"))
        parent.add_module(name, module)
    return model


def read(model: nn.Module, folder: Path, world_size: int = 2, rank: int = 0) -> nn.Module:
    partition = Partitioner(world_size)
    read_partitioned(model, folder, torch.float32, CPU, partition, rank)
    return model


def joined(models: list[nn.Module], name: str, whole: torch.Tensor) -> torch.Tensor:
    """A parameter from all ranks' partitions of it; what pads it must be zero."""
    parts: list[Any] = [model.get_parameter(name) for model in models]
    flat = torch.cat([part.ds_tensor for part in parts])
    assert not flat[whole.numel() :].any()
    return flat[: whole.numel()].view(parts[0].ds_shape)


def write(folder: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    save_file(tensors, folder / NAME)
    return tensors


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 25])
def test_the_partitions_of_all_ranks_are_the_model(tmp_path, world_size):
    tensors = write(tmp_path, {**SHAPES, "column": (12, 1), "row": (1, 12), "block": (2, 3, 2)})
    shapes = {name.removesuffix(".weight"): tuple(value.shape) for name, value in tensors.items()}
    models = [read(empty(shapes), tmp_path, world_size, rank) for rank in range(world_size)]
    for name, value in tensors.items():
        assert torch.equal(joined(models, name, value), value), name


def saved_model(folder: Path) -> Flux2Transformer2DModel:
    model = build_transformer(ONE_OF_EACH).requires_grad_(False)
    save_file(model.state_dict(), folder / NAME)
    return model


@pytest.mark.parametrize("mode", [None, *BASE_WEIGHTS])
def test_a_model_read_from_its_files(mode: str | None, tmp_path: Path) -> None:
    """Every linear of the blocks is quantized, nothing else, and the model computes with them."""
    original, model = saved_model(tmp_path), empty_transformer(ONE_OF_EACH)
    read_weights(model, tmp_path, torch.float32, CPU, mode)
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    linears = {
        name
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name
    }
    assert found.keys() == (linears if mode else set())
    plain = copy.deepcopy(original)
    for name, module in found.items():
        assert (module.storage, module.compute) == BASE_WEIGHTS[mode]
        stored = dequantize(module.quantized()).bfloat16()
        plain.get_submodule(name).weight.data = stored.float()
    parameters = dict(model.named_parameters())
    for name, weight in original.named_parameters():
        if name.rpartition(".")[0] not in found:
            assert torch.equal(parameters[name], weight), name
    compute = "bf16" if mode is None else BASE_WEIGHTS[mode][1]
    tolerance = {"bf16": 0.002, "int8": 0.02, "fp8": 0.05}[compute]
    assert error(predict(model), predict(plain)) < tolerance


def test_a_models_dtype_is_not_that_of_its_files(tmp_path: Path) -> None:
    saved_model(tmp_path)
    model = empty_transformer(ONE_OF_EACH)
    read_weights(model, tmp_path, torch.bfloat16, CPU, "nf4")
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    expected = {"values": torch.uint8, "block_scale": torch.uint8, "scale": torch.float32}
    assert dtypes == {"weight": torch.bfloat16, **expected}
    keep_timestep_exact(model)
    assert predict(model).dtype == torch.bfloat16


def test_matrices_of_blocks_are_quantized_and_nothing_else() -> None:
    shapes = {"embedder": (8, 64), "transformer_blocks.a": (8, 64), "transformer_blocks.b": (64,)}
    model = empty(shapes)
    for name, parameter in dict(model.named_parameters()).items():
        place_weight(model, name, gaussian(*parameter.shape), "int8")
    assert isinstance(model.transformer_blocks.a, QuantizedLinear)
    assert torch.equal(model.transformer_blocks.b.weight, gaussian(64))
    assert torch.equal(model.embedder.weight, gaussian(8, 64))


@pytest.mark.parametrize(
    ("shapes", "base", "message"),
    [
        ({"norm": (5,)}, None, "1 tensors are in only one of .* the first is linear.weight"),
        ({**SHAPES, "more": (2,)}, None, "the first is more"),
        ({**SHAPES, "norm": (6,)}, None, r"norm.weight has the shape \(5,\), .* asks for \(6,\)"),
        (
            {"transformer_blocks.linear": (4, 96)},
            "nf4",
            r"linear\.weight cannot be .* 64 .*, not 96\. Set base_w",
        ),
    ],
)
def test_files_that_do_not_fit_the_model(tmp_path, shapes, base, message):
    write(tmp_path, shapes if base else SHAPES)
    with pytest.raises(UserError, match=message):
        read_weights(empty(shapes), tmp_path, torch.float32, CPU, base)
    if base is None:
        with pytest.raises(UserError, match=message):
            read(empty(shapes), tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0damaged!"])
def test_files_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"holds no readable .* Download the model again"):
        read(empty(), tmp_path)


def test_an_index_that_names_a_missing_file(tmp_path):
    (tmp_path / f"{NAME}.index.json").write_text(
        '{"weight_map": {"norm.weight": "x", "linear.weight": "x"}}'
    )
    with pytest.raises(UserError, match="x cannot be read"):
        read(empty(), tmp_path)
