"""A transformer's weights: from safetensors files, one tensor at a time, or drawn at random."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import Flux2Transformer2DModel
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from flux2_ds.config.cards import Card, card_problem
from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import UserError
from flux2_ds.ops.quantized_linear import BASE_WEIGHTS, QuantizedLinear

_NAME = "diffusion_pytorch_model.safetensors"
Edit = Callable[[str, torch.Tensor, int, torch.dtype], torch.Tensor]
"""From a weight's name, some of its rows as they are stored, the first one's number and a dtype to the rows to load."""


def as_stored(name: str, weight: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight itself."""
    return weight.to(dtype)


class Streamed(Protocol):
    """Blocks that wait elsewhere; see `streamed_base.StreamedBase`."""

    def loads(self, name: str) -> bool:
        """Whether this rank reads that parameter; else it stays on meta."""

    def pack(self, block: nn.Module) -> None:
        """Take a complete block's weights away, if it is one of these."""


def read_weights(
    model: nn.Module,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    base_weights: str | None = None,
    edit: Edit = as_stored,
    streamed: Streamed | None = None,
) -> None:
    """Fill `model`, built on the meta device, from `directory`'s files, in `dtype` on `device`.

    With quantized `base_weights` the blocks' linears become `QuantizedLinear`, each as soon as it is
    read, so that the peak is the quantized model and one tensor. Embedders, modulation, norms and the
    output layer stay in `dtype`.
    """
    files, blocks = _checked_files(model, directory), _blocks_by_last_parameter(model)
    for name, parameter in _with_bar(model):
        weight = parameter.to(dtype)
        if streamed is None or streamed.loads(name):
            with open_file(files[name]) as file:
                _checked_slice(file, files[name], name, parameter)
                weight = edit(name, file.get_tensor(name).to(device), 0, dtype)
        place_weight(model, name, weight, base_weights)
        if streamed is not None and name in blocks:
            streamed.pack(blocks[name])


def _blocks_by_last_parameter(model: nn.Module) -> dict[str, nn.Module]:
    names = [name for name, _ in model.named_parameters() if "transformer_blocks." in name]
    last = {name.rsplit(".", name.count(".") - 1)[0]: name for name in names}
    return {name: model.get_submodule(path) for path, name in last.items()}


def read_partitioned(
    model: nn.Module,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    partition: Callable[[nn.Module], None],
    rank: int,
    edit: Edit = as_stored,
) -> None:
    """`read_weights` of a plain base, each parameter partitioned as soon as it exists.

    `partition`: see `zero3.make_partitioner`. `rank`: among the ranks that share each parameter; this
    one reads the rows of its own partition only, which is a range of the parameter's flattened elements.
    """
    files = _checked_files(model, directory)
    for name, parameter in _with_bar(model):
        # Nothing in FLUX.2 has a bias: a module has one parameter.
        module = place_weight(model, name, parameter.to(dtype), None)
        partition(module.to_empty(device=device))
        own = getattr(next(module.parameters()), "ds_tensor")  # noqa: B009
        total, row = parameter.numel(), parameter.numel() // parameter.shape[0]
        start = min(rank * own.numel(), total)
        stop = min(start + own.numel(), total)
        first, last = start // row, -(-stop // row)
        # Opened anew for each tensor: pages of the file stay resident only while it is open.
        with open_file(files[name]) as file:
            stored = _checked_slice(file, files[name], name, parameter)
            weight = edit(name, stored[first:last].to(device), first, dtype)
        own.zero_()  # what pads the last rank's partition
        own[: stop - start].copy_(weight.flatten()[start - first * row : stop - first * row])


def fill_randomly(
    model: Flux2Transformer2DModel,
    dtype: torch.dtype,
    base_weights: str | None,
    device: torch.device,
    partition: Callable[[nn.Module], None] | None = None,
    streamed: Streamed | None = None,
) -> None:
    """Give an empty transformer random weights, the same in every rank; see `read_partitioned` and
    `read_weights`."""
    blocks = _blocks_by_last_parameter(model)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        weight = torch.ones(parameter.shape, device=device, dtype=dtype)
        if weight.ndim > 1:
            weight.normal_(0, 1 / math.sqrt(weight.shape[1]), generator=generator)
        module = place_weight(model, name, weight, base_weights)
        if partition is not None:
            partition(module)
        if streamed is not None and name in blocks:
            streamed.pack(blocks[name])


def place_weight(
    model: nn.Module, name: str, weight: torch.Tensor, base_weights: str | None
) -> nn.Module:
    """Put a weight into its module, quantized if it is a block's linear; returns the module."""
    path, _, leaf = name.rpartition(".")
    if base_weights in BASE_WEIGHTS and "transformer_blocks." in name and weight.ndim == 2:
        try:
            model.set_submodule(path, QuantizedLinear(weight, *BASE_WEIGHTS[base_weights]))
        except ValueError as error:
            raise UserError(
                f"base_weights: the model's {name} cannot be quantized: {error}. Set base_weights: fp8 or "
                "int8, or remove it."
            ) from error
    else:
        setattr(model.get_submodule(path), leaf, nn.Parameter(weight))
    return model.get_submodule(path)


def card_of(device: torch.device) -> Card | None:
    """The GPU, None on a CPU."""
    if device.type != "cuda":
        return None
    return Card(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def check_card(recipe: Recipe, device: torch.device) -> None:
    """Refuse what this GPU cannot compute."""
    card = card_of(device)
    if card is not None and (problem := card_problem(recipe, card)):
        raise UserError(problem)


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it: one file, or several with an index.json."""
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
    """A safetensors file, opened for reading."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}). Download the model again.") from error


def _with_bar(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """The parameters to fill; a terminal shows how many are."""
    named = list(model.named_parameters())
    return tqdm(
        named, "loading the transformer", unit=" tensors", disable=None, leave=False, delay=1
    )


def _checked_files(model: nn.Module, directory: Path) -> dict[str, Path]:
    files = tensor_files(directory)
    differing = sorted(files.keys() ^ dict(model.named_parameters()).keys())
    if differing:
        raise UserError(
            f"{directory} does not fit its config.json: {len(differing)} tensors are in only one of "
            f"weights and model, the first is {differing[0]}. Download the model again."
        )
    return files


def _checked_slice(file: Any, path: Path, name: str, parameter: torch.Tensor) -> Any:
    stored = file.get_slice(name)
    found, expected = tuple(stored.get_shape()), tuple(parameter.shape)
    if found != expected:
        raise UserError(
            f"{path}: {name} has the shape {found}, config.json asks for {expected}. Download the "
            "model again."
        )
    return stored
