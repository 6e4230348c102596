"""Host memory is locked where it is, and no more of it than asked for."""

from __future__ import annotations

import pytest
import torch

from flux2_ds.engine.host_memory import LARGE, HostBuffers, mmap_large_allocations, pin_in_place

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def _apart() -> None:
    mmap_large_allocations()


@pytest.mark.parametrize("size", [1, 1000, LARGE - 1, LARGE, 3 * LARGE + 12345])
def test_a_locked_tensor_is_what_it_was(size: int) -> None:
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8)
    expected, before = tensor.clone(), tensor.data_ptr()
    pin_in_place(tensor)
    pin_in_place(tensor)
    assert tensor.is_pinned() and torch.equal(tensor, expected)
    assert (tensor.data_ptr() == before) == (size >= LARGE)
    assert torch.equal(tensor.to("cuda", non_blocking=True).cpu(), expected)


def test_memory_is_unlocked_as_it_is_freed() -> None:
    """Or another tensor at its address would look locked."""
    for _ in range(3):
        tensor = torch.empty(8 * LARGE, dtype=torch.uint8)
        address = tensor.data_ptr()
        assert not tensor.is_pinned()
        pin_in_place(tensor)
        view = tensor[10:]
        tensor.data = torch.empty(1, dtype=torch.uint8)
        assert view.is_pinned()
        del view
        other = torch.empty(8 * LARGE, dtype=torch.uint8)
        assert other.data_ptr() == address and not other.is_pinned()
        del other


def test_a_copy_from_locked_memory_does_not_wait() -> None:
    tensor, before = torch.empty(1 << 28, dtype=torch.uint8), torch.cuda.Event()
    pin_in_place(tensor)
    torch.cuda._sleep(10**9)
    before.record()
    tensor.to("cuda", non_blocking=True)
    assert not before.query()


def test_a_snapshot_is_what_the_gpu_held_when_it_was_taken() -> None:
    """Though training goes on, in memory that is pinned and used again."""
    buffers = HostBuffers(float("inf"), torch.device("cuda"))
    addresses = []
    for _ in range(2):
        held = [torch.randn(size, device="cuda") for size in (10, LARGE)]
        expected = [tensor.cpu() for tensor in held]
        torch.cuda._sleep(10**8)
        copies = [buffers.copy(tensor) for tensor in held]
        buffers.hand_over(copies)
        for tensor in held:
            tensor.zero_()
        torch.cuda.synchronize()
        assert all(map(torch.equal, copies, expected)) and copies[1].is_pinned()
        addresses.append([copy.data_ptr() for copy in copies])
        buffers.give_back(copies)
    assert addresses[0] == addresses[1]
