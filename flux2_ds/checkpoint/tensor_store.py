"""Named tensors in safetensors files: each in full in one file, or sharded over several.

A shard is a flat run of a tensor's elements. Its file's metadata has each shard's first element and
the full tensor's shape. Files of full tensors have neither: they are what anyone would write.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

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


def write(
    folder: Path, tensor_shards: Iterable[TensorShard], rank: int | None = None
) -> Iterator[Path]:
    """Write shards, ordered by kind, into KIND.safetensors or KIND-RANK-NUMBER.safetensors; yields
    each file when it is written.

    Floats are stored in fp32. `rank`: of this process, if several write.
    """
    numbers: Counter[str] = Counter()
    for kind, group in _groups(tensor_shards, math.inf if rank is None else FILE_BYTES):
        name = kind if rank is None else f"{kind}-{rank:04d}-{numbers[kind]:04d}"
        numbers[kind] += 1
        parts = [shard for shard in group if shard.shape is not None]
        metadata = {
            "starts": json.dumps({shard.name: shard.start for shard in parts}),
            "shapes": json.dumps({shard.name: shard.shape for shard in parts}),
        }
        file = folder / f"{name}.safetensors"
        write_tensors(file, {s.name: s.tensor for s in group}, metadata if parts else None)
        yield file


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to `path`, contiguous, with the permissions that a new file gets here."""
    with default_permissions(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


@contextmanager
def default_permissions(path: Path) -> Iterator[None]:
    """Give `path`, written inside, the permissions of a new file; safetensors writes 0600."""
    path.touch()  # os.umask would set the mask for other threads, too
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def _groups(
    tensor_shards: Iterable[TensorShard], at_most: float
) -> Iterator[tuple[str, list[TensorShard]]]:
    """Shards in host memory that go into one file: of one kind, about `at_most` bytes."""
    kind, size = "", 0
    group: list[TensorShard] = []
    for shard in tensor_shards:
        if group and (shard.kind != kind or size >= at_most):
            yield kind, group
            group, size = [], 0
        dtype = torch.float32 if shard.tensor.is_floating_point() else shard.tensor.dtype
        # A copy: the next shard may come in the same buffer.
        tensor = shard.tensor.detach().to("cpu", dtype, copy=True)
        kind, size = shard.kind, size + tensor.nbytes
        group.append(replace(shard, tensor=tensor))
    if group:
        yield kind, group


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
