"""How large tensors lie in host memory: on pages of their own, and page-locked without growing."""

from __future__ import annotations

import ctypes
import weakref

import torch

LARGE = 4 << 20
"""Bytes."""


def mmap_large_allocations() -> None:
    """From now on each large tensor has pages of its own, which go back to the system with it.

    On its own glibc would soon keep freed tensors in its heap, where they leave holes as large as a model.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, LARGE)  # M_MMAP_THRESHOLD


def pin_in_place(tensor: torch.Tensor) -> None:
    """Let copies between `tensor`, contiguous in host memory, and a card run beside other work.

    torch's own way takes a power of two of bytes, 94 GiB for the 60 GiB of FLUX.2-dev in bf16. Here a large
    tensor, placed apart, is locked where it is, until its memory is freed; small ones move.

    Raises:
        RuntimeError: CUDA cannot lock so much.
    """
    if tensor.is_pinned():
        return
    if tensor.nbytes < LARGE:
        tensor.data = tensor.pin_memory()
        return
    address = tensor.data_ptr()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, tensor.nbytes, 0))
    unlock = weakref.finalize(
        tensor.untyped_storage(), torch.cuda.cudart().cudaHostUnregister, address
    )
    unlock.atexit = False  # the process takes its memory along
