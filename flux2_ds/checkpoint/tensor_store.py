"""Named tensors in safetensors files: each in full in one file, or sharded over several.

A shard is a flat run of a tensor's elements. Its file's metadata has each shard's first element and
the full tensor's shape. Files of full tensors have neither: they are what anyone would write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from flux2_ds.model.safetensors_file import write_all

FILE_BYTES = 2 << 30
"""Shards go to disk in files of about this size, one of which is in host memory at a time."""


@dataclass(frozen=True)
class TensorShard:
    """A tensor to store: in full, or elements from `start` on of one of `shape`."""

    kind: str
    name: str
    tensor: torch.Tensor
    start: int = 0
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class File:
    """Shards in host memory that go into one file."""

    name: str
    shards: list[TensorShard]


def files_of(
    tensor_shards: Iterable[TensorShard],
    rank: int | None = None,
    to_host: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: stored(tensor).to(
        "cpu", copy=True
    ),
) -> Iterator[File]:
    """Copy shards, ordered by kind, to host memory, a file at a time: KIND.safetensors, or in parts of about
    `FILE_BYTES` KIND-RANK-NUMBER.safetensors. `rank`: of this process, if several write."""
    group: list[TensorShard] = []
    kind, number, size = "", 0, 0

    def file() -> File:
        name = kind if rank is None else f"{kind}-{rank:04d}-{number:04d}"
        return File(f"{name}.safetensors", group)

    for shard in tensor_shards:
        if group and (shard.kind != kind or (rank is not None and size >= FILE_BYTES)):
            yield file()
            group, number, size = [], number + 1 if shard.kind == kind else 0, 0
        # A copy: the next shard may come in the same buffer.
        tensor = to_host(shard.tensor.detach())
        kind, size = shard.kind, size + tensor.nbytes
        group.append(replace(shard, tensor=tensor))
    if group:
        yield file()


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is stored: floats in fp32."""
    return tensor.float() if tensor.is_floating_point() else tensor


def write(folder: Path, file: File) -> Path:
    """Write a file of shards; the same bytes for the same shards."""
    parts = [shard for shard in file.shards if shard.shape is not None]
    metadata = {
        "starts": json.dumps({shard.name: shard.start for shard in parts}),
        "shapes": json.dumps({shard.name: shard.shape for shard in parts}),
    }
    path = folder / file.name
    write_all(path, {s.name: s.tensor for s in file.shards}, metadata if parts else {})
    return path


class TensorStore:
    """The tensors of one kind in the files that hold them."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of full tensors, by name."""
        self._shards: dict[str, list[tuple[int, int, Path]]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                starts = json.loads(metadata.get("starts", "{}"))
                shapes = json.loads(metadata.get("shapes", "{}"))
                for name in file.keys():  # noqa: SIM118
                    stored = tuple(file.get_slice(name).get_shape())
                    start = starts.get(name, 0)
                    self.shapes[name] = tuple(shapes.get(name, stored))
                    stop = start + math.prod(stored)
                    self._shards.setdefault(name, []).append((start, stop, path))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, whichever ranks wrote them."""
        found = []
        for first, last, path in sorted(self._shards[name]):
            low, high = max(start, first), min(stop, last)
            if low < high:
                with safe_open(path, framework="pt") as file:
                    found.append(file.get_tensor(name).flatten()[low - first : high - first])
        joined = torch.cat(found) if found else torch.empty(0)
        if joined.numel() != stop - start:
            raise ValueError(f"{name}: elements {start} to {stop} are not all stored")
        return joined

    def tensor(self, name: str) -> torch.Tensor:
        """The full tensor in its shape."""
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)
