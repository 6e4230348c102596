"""Named tensors in safetensors files, each whole in one file or in parts over several.

A part is a flat run of a tensor's elements; the file's metadata has each part's first element and the
whole tensor's shape. Whole tensors have neither: their files are what anyone would write.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from flux2_ds.run.tensor_files import write_tensors

FILE_BYTES = 2 << 30
"""A process's part goes to disk in files of about this size, and holds one of them in host memory."""


@dataclass(frozen=True)
class TensorShard:
    """A tensor to store: whole, or elements from `start` on of one of `shape`."""

    kind: str
    name: str
    tensor: torch.Tensor
    start: int = 0
    shape: tuple[int, ...] | None = None


def write(
    folder: Path, tensor_shards: Iterable[TensorShard], part: int | None = None
) -> Iterator[Path]:
    """Write pieces, ordered by kind, into KIND.safetensors or KIND-PART-NUMBER.safetensors; gives each
    file when it is written.

    Floats are stored in fp32. `part`: the number of the process that writes, if several do.
    """
    numbers: Counter[str] = Counter()
    for kind, group in _groups(tensor_shards, FILE_BYTES if part is not None else None):
        name = kind if part is None else f"{kind}-{part:04d}-{numbers[kind]:04d}"
        numbers[kind] += 1
        partitioned = [piece for piece in group if piece.shape is not None]
        metadata = {
            "starts": json.dumps({piece.name: piece.start for piece in partitioned}),
            "shapes": json.dumps({piece.name: piece.shape for piece in partitioned}),
        }
        file = folder / f"{name}.safetensors"
        write_tensors(file, {p.name: p.tensor for p in group}, metadata if partitioned else None)
        yield file


def _groups(
    tensor_shards: Iterable[TensorShard], at_most: int | None
) -> Iterator[tuple[str, list[TensorShard]]]:
    """Pieces in host memory that go into one file: of one kind, about `at_most` bytes."""
    kind, size = "", 0
    group: list[TensorShard] = []
    for piece in tensor_shards:
        full = at_most is not None and size >= at_most
        if group and (piece.kind != kind or full):
            yield kind, group
            group, size = [], 0
        dtype = torch.float32 if piece.tensor.is_floating_point() else piece.tensor.dtype
        here = piece.tensor.detach().to("cpu", dtype, copy=True)
        kind, size = piece.kind, size + here.nbytes
        group.append(TensorShard(piece.kind, piece.name, here, piece.start, piece.shape))
    if group:
        yield kind, group


class TensorStore:
    """The tensors of one kind in the files that hold it."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of whole tensors, by name."""
        self._parts: dict[str, list[tuple[int, int, Path]]] = {}
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
                    self._parts.setdefault(name, []).append((start, stop, path))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, whoever wrote them."""
        found = []
        for first, last, path in sorted(self._parts[name]):
            low, high = max(start, first), min(stop, last)
            if low < high:
                with safe_open(path, framework="pt") as file:
                    found.append(file.get_tensor(name).flatten()[low - first : high - first])
        joined = torch.cat(found) if found else torch.empty(0)
        if joined.numel() != stop - start:
            raise ValueError(f"{name}: elements {start} to {stop} are not all stored")
        return joined

    def whole(self, name: str) -> torch.Tensor:
        """The tensor in its shape."""
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)
