"""Run tasks in this process or in one process for each device, with progress."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from flux2_ds.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result", covariant=True)


class Worker(Protocol[Result]):
    """Does one task after the other; `tick(n)` says that n more items are done."""

    def __call__(self, task: Any, tick: Callable[[int], Any], /) -> Result:
        """Do one task."""
        ...


def run_tasks(
    make: Callable[[torch.device], Worker[Result]],
    tasks: Sequence[Task],
    devices: list[str],
    progress: tqdm,
) -> Iterator[Result]:
    """The results of all tasks, in any order.

    `make` builds the worker, once on each device. What it loaded is freed before this returns.

    Raises:
        UserError: a process was killed, for example for want of memory.
    """
    if len(devices) == 1:
        worker = make(torch.device(devices[0]))
        for task in tasks:
            yield worker(task, progress.update)
        del worker
        if devices[0].startswith("cuda"):
            torch.cuda.empty_cache()
        return
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    done = context.Value("q", 0)
    with ProcessPoolExecutor(len(devices), context, _start, (make, free, done)) as pool:
        waiting = {pool.submit(_work, task) for task in tasks}
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                progress.update(done.value - progress.n)
                for future in finished:
                    yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process of prepare was killed, perhaps for want of memory. Lower "
                "prepare.processes or the batches and start again: finished shards are kept."
            ) from error
        finally:
            for future in waiting:
                future.cancel()


_own: tuple[Worker[Any], Any] | None = None


def _start(make: Callable[[torch.device], Worker[Any]], free: Any, done: Any) -> None:
    """First thing in a process of the pool: build its worker on a free device."""
    global _own
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.backends.cudnn.allow_tf32 = False
    _own = make(torch.device(free.get())), done


def _end_with_parent() -> None:
    """A killed parent cannot stop its pool, which would write on and keep its GPUs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Any) -> Any:
    assert _own is not None
    worker, done = _own

    def tick(count: int) -> None:
        with done.get_lock():
            done.value += count

    return worker(task, tick)
