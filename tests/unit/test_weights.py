"""A process's slices of a model's files, and files that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from flux2_ds.errors import UserError
from flux2_ds.model.weights import flat_range, read_parts

NAME = "diffusion_pytorch_model.safetensors"
SHAPES = {"norm": (5,), "linear": (3, 4)}


def divided(world: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> nn.Module:
    """Parameters as ZeRO-3 leaves them: a part each, padded to equal length."""
    model = nn.Module()
    for name, shape in shapes.items():
        parameter: Any = nn.Parameter(torch.empty(0))
        parameter.ds_shape, parameter.ds_numel = torch.Size(shape), torch.Size(shape).numel()
        parameter.ds_tensor = torch.full((-(-parameter.ds_numel // world),), torch.nan)
        model.register_parameter(name, parameter)
    return model


def write(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {"norm": torch.arange(5.0), "linear": torch.arange(12.0).view(3, 4) + 100}
    save_file(tensors, folder / NAME)
    return tensors


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_parts_of_all_processes_are_the_model(tmp_path, world):
    tensors = write(tmp_path)
    models = [divided(world) for _ in range(world)]
    for rank, model in enumerate(models):
        read_parts(model, tmp_path, rank)
    for name, value in tensors.items():
        joined = torch.cat([model.get_parameter(name).ds_tensor for model in models])
        assert torch.equal(joined[: value.numel()], value.flatten())
        assert not joined[value.numel() :].any()  # the padding


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 2), (1, 12)])
def test_every_range_of_a_stored_tensor(tmp_path, shape):
    value = torch.arange(float(torch.Size(shape).numel())).view(shape)
    save_file({"a": value}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        stored = file.get_slice("a")
        for start in range(value.numel()):
            for stop in range(start + 1, value.numel() + 1):
                found = flat_range(stored, shape, start, stop)
                assert torch.equal(found, value.flatten()[start:stop])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"norm": (5,)}, "1 tensors are in only one of .* the first is linear"),
        ({**SHAPES, "more": (2,)}, "the first is more"),
        ({**SHAPES, "norm": (6,)}, r"norm has the shape \(5,\), config.json asks for \(6,\)"),
    ],
)
def test_files_that_do_not_fit_the_model(tmp_path, shapes, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        read_parts(divided(2, shapes), tmp_path, 0)


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0damaged!"])
def test_files_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"holds no readable .* Download the model again"):
        read_parts(divided(2), tmp_path, 0)


def test_an_index_that_names_a_missing_file(tmp_path):
    (tmp_path / f"{NAME}.index.json").write_text('{"weight_map": {"norm": "x", "linear": "x"}}')
    with pytest.raises(UserError, match="x cannot be read"):
        read_parts(divided(2), tmp_path, 0)
