"""A process's slices of a model's files, and files that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flux2_ds.errors import UserError
from flux2_ds.model.load import read_partitioned, read_weights
from flux2_ds.ops.quantized_linear import BASE_WEIGHTS

NAME = "diffusion_pytorch_model.safetensors"
SHAPES = {"norm": (5,), "linear": (3, 4)}


class Divider:
    """Leaves of each parameter what ZeRO-3 does in one of `world_size` processes, with nothing in it yet."""

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


def read(
    model: nn.Module,
    folder: Path,
    world_size: int = 2,
    rank: int = 0,
    base_weights: str | None = None,
) -> nn.Module:
    cpu = torch.device("cpu")
    read_partitioned(model, folder, torch.float32, cpu, Divider(world_size), rank, base_weights)
    return model


def joined(models: list[nn.Module], name: str, whole: torch.Tensor) -> torch.Tensor:
    """A parameter from all processes' parts of it; what pads it must be zero."""
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
def test_the_parts_of_all_processes_are_the_model(tmp_path, world_size):
    tensors = write(tmp_path, {**SHAPES, "column": (12, 1), "row": (1, 12), "block": (2, 3, 2)})
    shapes = {name.removesuffix(".weight"): tuple(value.shape) for name, value in tensors.items()}
    models = [read(empty(shapes), tmp_path, world_size, rank) for rank in range(world_size)]
    for name, value in tensors.items():
        assert torch.equal(joined(models, name, value), value), name


@pytest.mark.parametrize("base", sorted(BASE_WEIGHTS))
@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_the_parts_of_a_quantised_model_are_those_of_a_whole_one(tmp_path, world_size, base):
    """Bit for bit, whichever rows a process has read; also where its values and its scales are of
    different rows."""
    shapes = {"norm": (5,), "transformer_blocks.linear": (7, 128), "transformer_blocks.norm": (6,)}
    write(tmp_path, shapes)
    whole = empty(shapes)
    read_weights(whole, tmp_path, torch.float32, torch.device("cpu"), base)
    models = [read(empty(shapes), tmp_path, world_size, r, base) for r in range(world_size)]
    expected = dict(whole.named_parameters())
    assert "transformer_blocks.linear.scale" in expected
    for name, value in expected.items():
        assert dict(models[0].named_parameters())[name].dtype == value.dtype
        assert torch.equal(joined(models, name, value), value), name


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"norm": (5,)}, "1 tensors are in only one of .* the first is linear.weight"),
        ({**SHAPES, "more": (2,)}, "the first is more"),
        (
            {**SHAPES, "norm": (6,)},
            r"norm.weight has the shape \(5,\), config.json asks for \(6,\)",
        ),
    ],
)
def test_files_that_do_not_fit_the_model(tmp_path, shapes, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        read(empty(shapes), tmp_path)


@pytest.mark.parametrize("parts", [False, True])
def test_a_width_that_nf4_cannot_hold(tmp_path, parts):
    shapes = {"transformer_blocks.linear": (4, 96)}
    write(tmp_path, shapes)
    given = (tmp_path, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"linear\.weight cannot be .* 64 .*, not 96\. Set base_w"):
        if parts:
            read(empty(shapes), tmp_path, base_weights="nf4")
        else:
            read_weights(empty(shapes), *given, "nf4")


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


def test_whole_weights_are_divided_after_they_are_read(tmp_path):
    tensors = write(tmp_path)
    model, seen = empty(), []

    def partition(module: nn.Module) -> None:
        seen.append(next(module.parameters()).detach().clone())

    read_weights(model, tmp_path, torch.float32, torch.device("cpu"), partition=partition)
    for found, expected in zip(seen, tensors.values(), strict=True):
        assert torch.equal(found, expected)
