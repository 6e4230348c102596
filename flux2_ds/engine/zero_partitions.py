"""Which part of each trained parameter this process owns.

ZeRO flattens the fp32 masters of all parameters and divides them among the processes: at stages 1 and 2
as one sequence, so that a boundary falls inside some parameter, at stage 3 each parameter by itself. The
optimizer works on, and keys its state by, those flat tensors. Without ZeRO they are the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ZeroPartition:
    """Elements [start, start + count) of a flattened parameter, at `offset` in the `flat` master."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    flat: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment's view [count] of a tensor as large as `flat`, such as an Adam moment."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]

    @property
    def weight(self) -> torch.Tensor:
        """View [count] of the fp32 master."""
        return self.of(self.flat)


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter, also of one that ZeRO-3 has divided."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def owned_partitions(
    named: dict[str, nn.Parameter], optimizer: Any, stage: int, rank: int
) -> list[ZeroPartition]:
    """This process's fragments; `optimizer` is DeepSpeed's at ZeRO stages 1 to 3.

    At stage 0 every process owns all of every parameter.
    """
    found = []
    for name, parameter in named.items():
        partition_ = (_whole, _of_sequence, _of_sequence, _of_parameter)[stage](
            name, parameter, optimizer, rank
        )
        if partition_ is not None and partition_.count > 0:
            found.append(partition_)
    return found


def _whole(name: str, parameter: Any, optimizer: Any, rank: int) -> ZeroPartition:
    return ZeroPartition(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0)


def _of_sequence(name: str, parameter: Any, optimizer: Any, rank: int) -> ZeroPartition | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    # At stage 1 in bf16 DeepSpeed has another optimizer, with another name for its masters.
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if masters is None:
        masters = optimizer.fp32_groups_flat_partition
    flat = masters[mapping.param_group_index]
    place, master = mapping.lp_fragment_address, mapping.hp_fragment_address
    return ZeroPartition(name, tuple(parameter.shape), place.start, place.numel, flat, master.start)


def _of_parameter(name: str, parameter: Any, optimizer: Any, rank: int) -> ZeroPartition:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = rank * size
    count = min(size, parameter.ds_numel - start)  # the last process's part is padded
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return ZeroPartition(name, shape_of(parameter), start, count, flat, offset)
