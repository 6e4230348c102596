"""Which partition of each trained parameter this rank owns.

ZeRO flattens the fp32 masters of all parameters and partitions them: at stages 1 and 2 as one
sequence, so that a boundary falls inside some parameter, at stage 3 each parameter by itself. The
optimizer works on these flat tensors and keys its state by them. Without ZeRO they are the parameters.
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
        """View [count] of a tensor as large as `flat`, such as an Adam moment."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]

    @property
    def weight(self) -> torch.Tensor:
        """View [count] of the fp32 master."""
        return self.of(self.flat)


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter, before ZeRO-3 partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def owned_partitions(
    named: dict[str, nn.Parameter], optimizer: Any, stage: int, rank: int
) -> list[ZeroPartition]:
    """This rank's partitions; `optimizer` is DeepSpeed's at ZeRO stages 1 to 3.

    At stage 0 every rank owns every parameter.
    """
    locate = (_parameter, _of_sequence, _of_sequence, _of_parameter)[stage]
    found = [locate(name, parameter, optimizer, rank) for name, parameter in named.items()]
    return [partition for partition in found if partition is not None and partition.count > 0]


def _parameter(name: str, parameter: Any, optimizer: Any, rank: int) -> ZeroPartition:
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
    low, master = mapping.lp_fragment_address, mapping.hp_fragment_address
    return ZeroPartition(name, tuple(parameter.shape), low.start, low.numel, flat, master.start)


def _of_parameter(name: str, parameter: Any, optimizer: Any, rank: int) -> ZeroPartition:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = rank * size
    count = min(size, parameter.ds_numel - start)  # the last rank's partition is padded
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return ZeroPartition(name, full_shape(parameter), start, count, flat, offset)
