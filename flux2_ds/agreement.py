"""What any of the processes has seen, for all of them to act on together."""

from __future__ import annotations

from collections.abc import Callable

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
