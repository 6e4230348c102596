"""A frozen base that passes through the device block by block.

ZeRO-3 gathers and frees a base as if it were trained. A frozen one never changes, so a block's weights are
one packed run of bytes that is written once: whole in pinned host memory, which a machine's ranks share, or a
part of it in each rank of a group. Two buffers on the device hold the block that is computed and the one that comes next: the blocks
after each other in the forward pass, the blocks before each other in the backward pass.

A block's parameters are views of one of the two buffers, the same for ever: their addresses and versions do
not change, so compiled blocks stay one graph for each kind. What autograd saves of them are these views, too.
Hence a block's bytes must be back before its backward pass reads them, checkpointed or not: the gradient of
a block's output is what its backward pass begins with, and a hook there brings them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import Flux2Transformer2DModel
from torch import distributed, nn

from flux2_ds.distributed import all_gather_object
from flux2_ds.engine.host_memory import pin_in_place
from flux2_ds.errors import UserError
from flux2_ds.model.activation_checkpointing import blocks_of

_ALIGNED = 256
"""Bytes. Compiled kernels take a weight to begin where torch's allocator would begin one."""


class _Piece(NamedTuple):
    """One parameter of a block, and where its bytes are among the block's."""

    module: Any
    name: str
    start: int
    shape: torch.Size
    dtype: torch.dtype


@contextmanager
def streamed_base(
    model: Flux2Transformer2DModel,
    streamed: Collection[int],
    device: torch.device,
    shard_group: int | None = None,
) -> Iterator[StreamedBase | None]:
    """Let blocks stream as `StreamedBase` says: each is packed as soon as it is loaded."""
    if not streamed:
        yield None
        return
    base = StreamedBase(model, streamed, device, shard_group)
    yield base
    base.connect()


class StreamedBase:
    """The streamed blocks of a model: `pack` each as soon as it is loaded, then `connect` them.

    `streamed`: the numbers of these blocks, in the order in which the blocks run. `shard_group`: how many
    neighboring ranks share one copy on their devices; None: the ranks of a machine share one in host memory.
    Those that share a copy load its blocks in turn. Collective, as is every pass of the model with a shard
    group: all its ranks make the same passes.
    """

    def __init__(
        self,
        model: Flux2Transformer2DModel,
        streamed: Collection[int],
        device: torch.device,
        shard_group: int | None = None,
    ) -> None:
        self._blocks = [block for n, block in enumerate(blocks_of(model)) if n in streamed]
        self._device, self._group = device, None
        if shard_group is not None:
            self._group, _ = distributed.new_subgroups(shard_group)
            self._rank, self._ranks = distributed.get_rank(self._group), shard_group
        else:
            here = _machine(), os.getpid()
            together = [each for each in _of_all_ranks(here) if each[0] == here[0]]
            self._rank, self._ranks = together.index(here), len(together)
        paths = {block: path for path, block in model.named_modules()}
        others = [b for n, b in enumerate(self._blocks) if n % self._ranks != self._rank]
        self._of_others = tuple(f"{paths[block]}." for block in others)
        self._pieces: list[list[_Piece]] = []
        self._sizes: list[int] = []
        self._packed = torch.empty(0)  # what this rank has loaded and not given away
        self._files: dict[int, int] = {}
        self._stored: dict[int, torch.Tensor] = {}
        self._buffers: list[torch.Tensor] = []
        self._held: list[int | None] = [None, None]
        self._arrivals: list[Callable[[], Any] | None] = [None, None]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def loads(self, name: str) -> bool:
        """Whether this rank reads that parameter; those of a block that another one loads stay on meta."""
        return not name.startswith(self._of_others)

    def pack(self, block: nn.Module) -> None:
        """Move a loaded block's weights out of the way, if it is a streamed one; in the order of the blocks."""
        number = len(self._pieces)
        if number == len(self._blocks) or block is not self._blocks[number]:
            return
        pieces, start = [], 0
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                pieces.append(_Piece(module, name, start, parameter.shape, parameter.dtype))
                start = _aligned(start + parameter.nbytes, _ALIGNED)
        size = _aligned(start, _ALIGNED * (1 if self._group is None else self._ranks))
        self._pieces.append(pieces)
        self._sizes.append(size)
        own = number % self._ranks == self._rank
        if own and self._group is None:
            self._files[number] = os.memfd_create("flux2_ds base")
            self._packed = self._stored[number] = _mapped(os.getpid(), self._files[number], size)
        elif own:
            self._packed = torch.empty(size, dtype=torch.uint8, device=self._device)
        for piece in pieces:
            parameter = getattr(piece.module, piece.name)
            if own:
                piece_of(self._packed, piece).copy_(parameter.data)
            setattr(piece.module, piece.name, nn.Parameter(parameter.to("meta"), False))
        last = number + 1 == len(self._blocks)
        if self._group is not None and (last or (number + 1) % self._ranks == 0):
            self._scatter()

    def _scatter(self) -> None:
        """Give each rank its part of the blocks that were loaded since the last time."""
        assert self._group is not None
        for number in range(len(self._stored), len(self._pieces)):
            owner = number % self._ranks
            size = self._sizes[number] // self._ranks
            part = torch.empty(size, dtype=torch.uint8, device=self._device)
            parts = list(self._packed.chunk(self._ranks)) if owner == self._rank else None
            source = distributed.get_global_rank(self._group, owner)
            distributed.scatter(part, parts, source, self._group)
            self._stored[number] = part
        self._packed = torch.empty(0)

    def _share(self) -> None:
        """Map the blocks that the machine's other ranks have loaded."""
        here, own = _machine(), os.getpid()
        for machine, pid, files in _of_all_ranks((here, own, self._files)):
            if machine == here and pid != own:
                for number, file in files.items():
                    self._stored[number] = _mapped(pid, file, self._sizes[number])
        _of_all_ranks(None)  # all are mapped
        for file in self._files.values():
            os.close(file)
        if self._copies is not None:
            for stored in self._stored.values():
                _pin(stored)

    def connect(self) -> None:
        """Make the packed blocks' parameters views of the buffers, which their passes fill."""
        if self._group is None:
            self._share()
        for first in (0, 1):
            size = max(self._sizes[first::2], default=0)
            self._buffers.append(torch.zeros(size, dtype=torch.uint8, device=self._device))
        for number, (block, pieces) in enumerate(zip(self._blocks, self._pieces, strict=True)):
            for piece in pieces:
                # `.data` has a version of its own, which filling the buffer leaves as it is.
                view = piece_of(self._buffers[number % 2], piece).data
                setattr(piece.module, piece.name, nn.Parameter(view, requires_grad=False))
                piece.module.fetch = partial(self._bring, number, 0)
            block.register_forward_pre_hook(partial(self._before_forward, number))
            block.register_forward_hook(partial(self._after_forward, number))

    def _before_forward(self, number: int, block: nn.Module, args: Any) -> None:
        self._bring(number, 1)

    def _after_forward(self, number: int, block: nn.Module, args: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if tensor.requires_grad:
                # Autograd has done all of the next block by then: it takes what was computed last first.
                tensor.register_hook(lambda _: self._bring(number, -1))

    def _bring(self, number: int, step: int) -> None:
        """Have a block's weights in its buffer for what is queued from here on, and begin with the block
        `step` further."""
        if self._held[number % 2] != number:
            self._begin(number)
        if (arrive := self._arrivals[number % 2]) is not None:
            arrive()
            self._arrivals[number % 2] = None
        following = number + step
        if 0 <= following < len(self._stored) and self._held[following % 2] != following:
            self._begin(following)

    def _begin(self, number: int) -> None:
        """Begin to fill a block's buffer, once all that was queued before has read it."""
        stored, at = self._stored[number], number % 2
        buffer = self._buffers[at][: self._sizes[number]]
        self._held[at] = number
        if self._group is not None:
            work = distributed.all_gather_into_tensor(buffer, stored, self._group, async_op=True)
            self._arrivals[at] = work.wait
            return
        if self._copies is None:
            buffer.copy_(stored)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            buffer.copy_(stored, non_blocking=True)
        self._arrivals[at] = self._copies.record_event().wait


def piece_of(packed: torch.Tensor, piece: _Piece) -> torch.Tensor:
    """A view of a parameter's bytes among a block's."""
    size = math.prod(piece.shape) * piece.dtype.itemsize
    return packed[piece.start : piece.start + size].view(piece.dtype).view(piece.shape)


def _aligned(size: int, step: int) -> int:
    return -(-size // step) * step


def _of_all_ranks(value: Any) -> list[Any]:
    return all_gather_object(value) if distributed.is_initialized() else [value]


def _machine() -> str:
    """The same in processes that see each other's files in /proc."""
    started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{started} {Path('/proc/self/ns/pid').readlink()}"


def _mapped(pid: int, file: int, size: int) -> torch.Tensor:
    """A process's file in memory, which is gone with the last process that maps it."""
    path = f"/proc/{pid}/fd/{file}"
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def _pin(tensor: torch.Tensor) -> None:
    try:
        pin_in_place(tensor)
    except RuntimeError as error:
        raise UserError(
            f"base_placement is host, and the host cannot pin the base ({str(error).splitlines()[0]}). Set "
            "base_weights to fewer bits or base_placement: gpu, or allow the process more locked memory "
            "(ulimit -l)."
        ) from error
