"""A safetensors file written one tensor after the other, the same bytes for the same content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name of a tensor -> what it will be."""


def write_safetensors(
    path: Path,
    shapes: Shapes,
    tensor: Callable[[str], torch.Tensor],
    metadata: dict[str, str],
    *,
    progress: bool = True,
) -> None:
    """Write the tensors that `tensor` gives by name, of which one at a time is in memory.

    `progress`: show a bar on a terminal.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    stop = 0
    for name in _order(shapes):
        dtype, shape = shapes[name]
        start, stop = stop, stop + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        names, off = _order(shapes), None if progress else True
        for name in tqdm(names, path.name, unit=" tensors", disable=off, leave=False, delay=1):
            value = tensor(name)
            if (value.dtype, tuple(value.shape)) != shapes[name]:
                raise ValueError(
                    f"{name} is {value.dtype} {tuple(value.shape)}, not {shapes[name]}"
                )
            file.write(_bytes(value))


def write_all(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors that are in memory."""
    write_safetensors(path, shapes_of(tensors), tensors.__getitem__, metadata, progress=False)


def shapes_of(tensors: dict[str, torch.Tensor]) -> Shapes:
    """Of tensors that are in memory."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def content_digest(tensors: dict[str, torch.Tensor]) -> str:
    """The sha256 of what comes after the header of these tensors' file."""
    digest = hashlib.sha256()
    for name in _order(shapes_of(tensors)):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def stored_digest(path: Path) -> str:
    """The sha256 of what comes after the header of a file."""
    with path.open("rb") as stream:
        stream.seek(int.from_bytes(stream.read(8), "little") + 8)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _order(shapes: Shapes) -> Iterable[str]:
    """Large elements first, so that each tensor starts at a multiple of its element's size."""
    return sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
