"""A number is read from the card without waiting for what is queued after it."""

from __future__ import annotations

import pytest
import torch

from flux2_ds.distributed import AsyncScalar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LONG = 10**10  # clock cycles, some seconds


def test_a_number_is_read_once_it_is_there_and_before_what_comes_later() -> None:
    value = torch.zeros((), device="cuda")
    torch.cuda._sleep(LONG // 20)
    value.fill_(3)
    readback, later = AsyncScalar(value), torch.cuda.Event()
    torch.cuda._sleep(LONG)
    value.fill_(4)
    later.record()
    assert float(readback) == 3
    assert not later.query()
