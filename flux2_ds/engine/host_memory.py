"""Large tensors in host memory: on pages of their own, and pinned without growing."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections import defaultdict
from collections.abc import Iterable
from threading import Condition

import torch

from flux2_ds.checkpoint.tensor_store import stored

log = logging.getLogger("flux2_ds")

LARGE = 4 << 20
"""Bytes."""


def mmap_large_allocations() -> None:
    """Give each large tensor pages of its own from now on, which go back to the system with it.

    By itself glibc soon keeps freed tensors in its heap, where they leave holes as large as a model.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, LARGE)  # M_MMAP_THRESHOLD


def pin_in_place(tensor: torch.Tensor) -> None:
    """Pin `tensor`, contiguous in host memory, until its memory is freed.

    torch's own pinning takes a power of two of bytes, 94 GiB for the 60 GiB of FLUX.2-dev in bf16. A
    large tensor on pages of its own is pinned where it is; small ones move. A RuntimeError says
    that CUDA cannot pin so much.
    """
    if tensor.is_pinned():
        return
    if tensor.nbytes < LARGE:
        tensor.data = tensor.pin_memory()
        return
    address = tensor.data_ptr()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, tensor.nbytes, 0))
    unpin = weakref.finalize(
        tensor.untyped_storage(), torch.cuda.cudart().cudaHostUnregister, address
    )
    unpin.atexit = False  # the process takes its memory along


class HostBuffers:
    """Host memory for the snapshots of checkpoints, used again by the next one; pinned for what is on a GPU.

    `limit`: bytes of all copies that are handed over, above which a copy waits until others are given back.
    """

    def __init__(self, limit: float, device: torch.device) -> None:
        self._limit, self._on_gpu = limit, device.type == "cuda"
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._held = 0.0
        """Bytes that are handed over."""
        self._changed = Condition()
        self._pins = self._on_gpu
        if self._pins:
            mmap_large_allocations()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy [...] in host memory, floats in fp32; from a GPU it is there after `hand_over`."""
        source = stored(tensor)
        with self._changed:
            found = self._free[source.nbytes]
            if not found and self._held + source.nbytes > self._limit:
                self._free.clear()  # of other sizes
            buffer = found.pop() if found else self._new(source.nbytes)
        copy = buffer.view(source.dtype).view(source.shape)
        return copy.copy_(source, non_blocking=True)

    def _new(self, size: int) -> torch.Tensor:
        buffer = torch.empty(size, dtype=torch.uint8)
        if self._pins:
            try:
                pin_in_place(buffer)
            except RuntimeError as error:
                self._pins = False
                reason = str(error).splitlines()[0]
                log.warning("snapshots of checkpoints are not pinned, and slower (%s)", reason)
        return buffer

    def hand_over(self, copies: Iterable[torch.Tensor]) -> None:
        """Wait for these copies, and for room beside the others."""
        size = sum(copy.nbytes for copy in copies)
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size

    def give_back(self, copies: Iterable[torch.Tensor]) -> None:
        """Take back what has been handed over; called by the thread that has written it."""
        with self._changed:
            for copy in copies:
                self._free[copy.nbytes].append(copy.flatten().view(torch.uint8))
                self._held -= copy.nbytes
            self._changed.notify_all()
