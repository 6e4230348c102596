"""A safetensors file written one tensor after the other, the same bytes for the same content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}

_SHA256 = "flux2_ds.sha256"
_SHA256_FIELD = f'"{_SHA256}":"'.encode()

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


def write_adapter(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors that are in memory, and into the metadata the sha256 of the whole file with zeros in its place."""
    write_all(path, tensors, metadata | {_SHA256: "0" * 64})
    with path.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        place = file.read(8 + _header_size(file)).index(_SHA256_FIELD) + len(_SHA256_FIELD)
        file.seek(place)
        file.write(digest.encode())


def check_file(path: Path) -> None:
    """Refuse an adapter file of flux2-ds that is not what was written; of other programs' files nothing is known."""
    with path.open("rb") as file:
        head = file.read(8 + min(_header_size(file), path.stat().st_size))
        if b'"flux2_ds.' not in head:  # any of several keys
            return
        before, field, after = head.partition(_SHA256_FIELD)
        digest = hashlib.sha256(before + field + b"0" * 64 + after[64:])
        while block := file.read(1 << 20):
            digest.update(block)
    if after[:64] != digest.hexdigest().encode():
        raise ValueError("it does not have its sha256")


def _header_size(file: BinaryIO) -> int:
    """Bytes of the header after the first eight, which tell; leaves the file at its beginning."""
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    file.seek(0)
    return size


def shapes_of(tensors: dict[str, torch.Tensor]) -> Shapes:
    """Of tensors that are in memory."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def content_digest(tensors: dict[str, torch.Tensor]) -> str:
    """The sha256 of what comes after the header of these tensors' file."""
    digest = hashlib.sha256()
    for name in _order(shapes_of(tensors)):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _order(shapes: Shapes) -> Iterable[str]:
    """Large elements first, so that each tensor starts at a multiple of its element's size."""
    return sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
