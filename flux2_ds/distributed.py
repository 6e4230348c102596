"""The process group of a run, its small collectives, and values read without a host wait."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed

from flux2_ds.errors import OutageError, UserError
from flux2_ds.run.environment import Ranks, given_ranks

Value = TypeVar("Value")


@dataclass(frozen=True)
class Process:
    """This process in the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0


def init_process_group(accelerator: Literal["cuda", "cpu"]) -> Process:
    """Join the process group that the launcher's environment describes; alone without one.

    Refuses another accelerator and variables that cannot be. An `OutageError` says that this rank 0
    cannot listen where the others would meet it.
    """
    found = get_accelerator().device_name()
    if found != accelerator:
        raise UserError(
            f"DeepSpeed chose the {found} accelerator, the recipe's launch.accelerator is "
            f"{accelerator}. Start with `flux2-ds train`, or set DS_ACCELERATOR={accelerator}."
        )
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # whichever is free
    }
    ranks = given_ranks(os.environ)
    if ranks is None:
        os.environ.update(alone)
    # DeepSpeed would compile a shared-memory collective on its first CPU run: minutes, and a failure
    # without a C++ compiler. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = _own_device(accelerator, ranks)
    with _address_explained(ranks):
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return Process(distributed.get_rank(), distributed.get_world_size(), device)


@contextmanager
def cpu_process_group(accelerator: Literal["cuda", "cpu"]) -> Iterator[Process]:
    """Join a gloo group for work that only coordinates; leave it at the end, when all are done.

    Its collectives wait as long as the slowest rank takes: that one hangs is for the watchdog to say.
    """
    ranks = given_ranks(os.environ)
    device = _own_device(accelerator, ranks)
    if ranks is None:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    else:
        with _address_explained(ranks):
            distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Process(distributed.get_rank(), distributed.get_world_size(), device)
        barrier()
    finally:
        distributed.destroy_process_group()


def _own_device(accelerator: Literal["cuda", "cpu"], ranks: Ranks | None) -> torch.device:
    """This process's device, made the current one."""
    if accelerator == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank if ranks else 0)
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"the environment variable LOCAL_RANK is {device.index}; this machine shows "
            f"{torch.cuda.device_count()} GPUs. Start fewer processes here, or correct "
            "CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(device)
    return device


@contextmanager
def _address_explained(ranks: Ranks | None) -> Iterator[None]:
    """Say what is wrong where rank 0 cannot listen at MASTER_ADDR and MASTER_PORT."""
    try:
        yield
    except distributed.DistNetworkError as error:
        if ranks is None or ranks.rank:  # that rank 0 cannot be reached has a cause there
            raise
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        raise OutageError(
            f"the processes cannot meet at {address}, port {port}, by the environment variables MASTER_ADDR "
            f"and MASTER_PORT ({str(error).splitlines()[0]}). They must name this machine, on which rank 0 "
            "runs, and a port that nothing else uses."
        ) from error


def barrier() -> None:
    """Wait for all processes."""
    # Without a device torch warns, where DeepSpeed has bound none to the group: with one process.
    on_cuda = distributed.get_backend() == "nccl"
    distributed.barrier(device_ids=[torch.cuda.current_device()] if on_cuda else None)


def destroy_process_group() -> None:
    """Wait for all processes and leave the process group."""
    # Not only for each other: a gloo thread that still returns the tensor of the last collective when
    # Python shuts down aborts a process that has done all its work ("terminate called without an
    # active exception").
    barrier()
    distributed.destroy_process_group()


def any_rank(flag: Callable[[], bool], device: torch.device) -> Callable[[], bool]:
    """Return a function that says whether the flag is up in any rank. Collective.

    Several ranks read their flags now, and the device goes on meanwhile; one alone reads its flag when
    the function is called.
    """
    if distributed.get_world_size() == 1:
        return flag
    value = torch.full((), float(flag()), device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    answer = AsyncScalar(value)
    return lambda: bool(float(answer))


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks. Collective."""
    distributed.all_reduce(value, op=distributed.ReduceOp.SUM)
    return value


def all_reduce_mean(value: torch.Tensor) -> torch.Tensor:
    """Mean over all ranks. Collective."""
    return all_reduce_sum(value) / distributed.get_world_size()


def all_gather_object(value: Any) -> list[Any]:
    """What each rank gives, by rank, in all of them. Collective."""
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def all_gather_floats(values: list[float], device: torch.device) -> list[list[float]]:
    """What each rank gives, by rank, in all of them; as many from each. Collective."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, own)
    return [of_rank.tolist() for of_rank in gathered]


def broadcast_object(value: Value | None) -> Value:
    """Rank 0's value, which may be of any kind, in all ranks. Collective."""
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return cast(Value, values[0])


def broadcast_from_rank0(value: int, device: torch.device) -> int:
    """Rank 0's value, in all ranks. Collective."""
    tensor = torch.tensor(value, device=device)
    distributed.broadcast(tensor, src=0)
    return int(tensor)


class AsyncScalar:
    """A number on its way from the device to the host.

    `float()` waits until it is there. That of a tensor would wait for all that has been queued on the
    device by then, such as the next step.
    """

    def __init__(self, value: torch.Tensor | float) -> None:
        self._value = value
        self._arrived: torch.cuda.Event | None = None
        if isinstance(value, torch.Tensor) and value.is_cuda:
            host = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value = host.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def __float__(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)
