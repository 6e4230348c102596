"""What the processes tell each other, so that all of them act on the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from flux2_ds.readback import Readback


def any_process(flag: Callable[[], bool], device: torch.device) -> Callable[[], bool]:
    """A function that says whether the flag is up in any process. Collective.

    One alone looks at its flag when that is called. Several have looked now; what the device is given meanwhile
    is not waited for.
    """
    if distributed.get_world_size() == 1:
        return flag
    value = torch.full((), float(flag()), device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    answer = Readback(value)
    return lambda: bool(float(answer))


def total(value: torch.Tensor) -> torch.Tensor:
    """Sum over all processes. Collective."""
    distributed.all_reduce(value, op=distributed.ReduceOp.SUM)
    return value


def average(value: torch.Tensor) -> torch.Tensor:
    """Mean over all processes. Collective."""
    return total(value) / distributed.get_world_size()


def exchange(value: Any) -> list[Any]:
    """What each process gives, by rank, in all of them. Collective."""
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def from_first(value: int, device: torch.device) -> int:
    """The first process's value, in all of them. Collective."""
    tensor = torch.tensor(value, device=device)
    distributed.broadcast(tensor, src=0)
    return int(tensor)
