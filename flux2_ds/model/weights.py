"""A transformer's weights from its safetensors files into the model, one tensor at a time.

A model whose parameters ZeRO-3 has divided among processes gets this process's slices only, read
straight from the files: no process ever holds more than one tensor beside its own part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from flux2_ds.errors import UserError
from flux2_ds.model.quantize import Compute, QuantizedLinear, Storage

_NAME = "diffusion_pytorch_model.safetensors"


def read_parts(model: nn.Module, directory: Path, rank: int) -> None:
    """Fill the parameters of `model`, built under `engine.divided`, from `directory`'s files.

    `rank`: this process's place among those that share each parameter.

    Raises:
        UserError: files are missing, or their tensors are not those of the model.
    """
    files = _checked_files(model, directory)
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, parameter in parameters.items():
        shape, part = tuple(parameter.ds_shape), parameter.ds_tensor.data
        start = rank * part.numel()
        stop = min(start + part.numel(), parameter.ds_numel)
        # Opened anew for each tensor: pages of the file stay resident only while it is open.
        with open_file(files[name]) as file:
            stored = file.get_slice(name)
            _check_shape(files[name], name, tuple(stored.get_shape()), shape)
            part.zero_()  # what pads the last process's part
            if stop > start:
                part[: stop - start].copy_(flat_range(stored, shape, start, stop))


def read_weights(
    model: nn.Module,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantized: tuple[Storage, Compute] | None = None,
) -> None:
    """Fill `model`, built on the meta device, from `directory`'s files, in `dtype` on `device`.

    With `quantized` the blocks' linears become `QuantizedLinear`, each as soon as it is read, so that
    the peak is the quantised model and one tensor. Embedders, modulation, norms and the output layer
    stay in `dtype`.

    Raises:
        UserError: files are missing, or their tensors are not those of the model.
    """
    files = _checked_files(model, directory)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in shapes.items():
        with open_file(files[name]) as file:
            _check_shape(files[name], name, tuple(file.get_slice(name).get_shape()), shape)
            place_weight(model, name, file.get_tensor(name).to(device, dtype), quantized)


def place_weight(
    model: nn.Module, name: str, weight: torch.Tensor, quantized: tuple[Storage, Compute] | None
) -> None:
    """Put one weight where it belongs, quantised if it is a block's linear."""
    path, _, leaf = name.rpartition(".")
    if quantized is not None and "transformer_blocks." in name and weight.ndim == 2:
        model.set_submodule(path, QuantizedLinear(weight, *quantized))
    else:
        setattr(model.get_submodule(path), leaf, nn.Parameter(weight))


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it: one file, or several with an index.json.

    Raises:
        UserError: a file is missing or damaged.
    """
    index, single = directory / f"{_NAME}.index.json", directory / _NAME
    try:
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"]
            return {name: directory / file for name, file in names.items()}
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{directory} holds no readable {_NAME}, nor its index.json ({error}). Download the "
            "model again."
        ) from error


def open_file(path: Path) -> Any:
    """A safetensors file, opened for reading.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}). Download the model again.") from error


def flat_range(stored: Any, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a stored tensor of `shape`, flattened; reads only their rows.

    `stored`: a slice object of safetensors.
    """
    row = 1
    for size in shape[1:]:
        row *= size
    first, last = start // row, -(-stop // row)
    rows: torch.Tensor = stored[first:last]
    return rows.flatten()[start - first * row : stop - first * row]


def _checked_files(model: nn.Module, directory: Path) -> dict[str, Path]:
    files = tensor_files(directory)
    differing = sorted(files.keys() ^ dict(model.named_parameters()).keys())
    if differing:
        raise UserError(
            f"{directory} does not fit its config.json: {len(differing)} tensors are in only one of "
            f"weights and model, the first is {differing[0]}. Download the model again."
        )
    return files


def _check_shape(file: Path, name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if stored != expected:
        raise UserError(
            f"{file}: {name} has the shape {stored}, config.json asks for {expected}. Download the "
            "model again."
        )
