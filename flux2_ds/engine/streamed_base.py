"""A frozen base that passes through the device block by block.

ZeRO-3 gathers and frees a base as if it were trained. A frozen one never changes, so a block's weights are
one packed run of bytes that is written once: whole in pinned host memory, or a part of it in each rank of a
group. Two buffers on the device hold the block that is computed and the one that comes next: the blocks
after each other in the forward pass, the blocks before each other in the backward pass.

A block's parameters are views of one of the two buffers, the same for ever: their addresses and versions do
not change, so compiled blocks stay one graph for each kind. What autograd saves of them are these views, too.
Hence a block's bytes must be back before its backward pass reads them, checkpointed or not: the gradient of
a block's output is what its backward pass begins with, and a hook there brings them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import Flux2Transformer2DModel
from torch import distributed, nn

from flux2_ds.engine.host_memory import mmap_large_allocations, pin_in_place
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
) -> Iterator[Callable[[nn.Module], None] | None]:
    """Let blocks stream as `StreamedBase` says: each is given to the function as soon as it is loaded."""
    if not streamed:
        yield None
        return
    base = StreamedBase(model, streamed, device, shard_group)
    yield base.pack
    base.connect()


class StreamedBase:
    """The streamed blocks of a model: `pack` each as soon as it is loaded, then `connect` them.

    `streamed`: the numbers of these blocks, in the order in which the blocks run. `shard_group`: how many
    neighboring ranks share one copy; None: each process has a copy in host memory. Collective, as is every
    pass of the model with a shard group: all its ranks make the same passes.
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
        else:
            mmap_large_allocations()
        self._pieces: list[list[_Piece]] = []
        self._stored: list[torch.Tensor] = []
        self._buffers: list[torch.Tensor] = []
        self._held: list[int | None] = [None, None]
        self._arrivals: list[Callable[[], Any] | None] = [None, None]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pack(self, block: nn.Module) -> None:
        """Move a loaded block's weights out of the way, if it is a streamed one; in the order of the blocks."""
        if not any(block is each for each in self._blocks):
            return
        pieces, start = [], 0
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                pieces.append(_Piece(module, name, start, parameter.shape, parameter.dtype))
                start = _aligned(start + parameter.nbytes, _ALIGNED)
        ranks = 1 if self._group is None else distributed.get_world_size(self._group)
        size = _aligned(start, _ALIGNED * ranks)
        at = self._device if self._group else torch.device("cpu")
        stored = torch.empty(size, dtype=torch.uint8, device=at)
        for piece in pieces:
            parameter = getattr(piece.module, piece.name)
            piece_of(stored, piece).copy_(parameter.data)
            setattr(piece.module, piece.name, nn.Parameter(parameter.to("meta"), False))
        if self._group is not None:
            stored = stored.chunk(ranks)[distributed.get_rank(self._group)].clone()
        elif self._copies is not None:
            _pin(stored)
        self._pieces.append(pieces)
        self._stored.append(stored)

    def connect(self) -> None:
        """Make the packed blocks' parameters views of the buffers, which their passes fill."""
        ranks = 1 if self._group is None else distributed.get_world_size(self._group)
        for first in (0, 1):
            size = max((stored.numel() * ranks for stored in self._stored[first::2]), default=0)
            buffer = torch.zeros(size, dtype=torch.uint8, device=self._device)
            self._buffers.append(buffer)
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
        self._held[at] = number
        if self._group is not None:
            ranks = distributed.get_world_size(self._group)
            work = distributed.all_gather_into_tensor(
                self._buffers[at][: ranks * stored.numel()], stored, self._group, async_op=True
            )
            self._arrivals[at] = work.wait
            return
        buffer = self._buffers[at][: stored.numel()]
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


def _pin(tensor: torch.Tensor) -> None:
    try:
        pin_in_place(tensor)
    except RuntimeError as error:
        raise UserError(
            f"base_placement is host, and the host cannot pin the base ({str(error).splitlines()[0]}). Set "
            "base_weights to fewer bits or base_placement: gpu, or allow the process more locked memory "
            "(ulimit -l)."
        ) from error
