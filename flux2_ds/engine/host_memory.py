"""Large tensors in host memory: on pages of their own, and pinned without growing."""

from __future__ import annotations

import ctypes
import weakref

import torch

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
