"""A checkpoint that is written while training goes on: a snapshot in host memory, and a thread in each rank.

.step_00000050.partial/0001.writing      rank 1's thread is at work
                       0001.written      its files, with size and sha256
                       0001.failed-28    it could not, by this errno: renaming takes no room on a full disk

No thread takes part in a collective. Rank 0's waits for what all ranks have written and makes the checkpoint
visible; those of the others wait until it has.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

import torch

from flux2_ds.checkpoint import manager
from flux2_ds.checkpoint.tensor_store import File, TensorShard, files_of
from flux2_ds.distributed import Process

_POLL = 0.1  # s between looks at what the other ranks have written
_WAIT = 1.0  # s between looks at what the own thread has written


class Buffers(Protocol):
    """Host memory for snapshots."""

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, floats in fp32; it may not be there before `hand_over`."""
        ...

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """Wait for these copies, and for room to make others beside them."""
        ...

    def give_back(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take back what has been handed over; may be called by another thread."""
        ...


class BackgroundSave:
    """The checkpoint of `step`, a snapshot of which is taken here. Collective.

    `tensor_shards`, `sharded`: as `manager.save` takes them. `done` is called in a thread of rank 0 with the
    checkpoint, or with why there is none.

    Raises:
        SaveError: it cannot even be begun.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        tensor_shards: Callable[[], Iterable[TensorShard]],
        state: dict[str, Any],
        process: Process,
        buffers: Buffers,
        done: Callable[[Path, str | None], None],
        *,
        sharded: bool,
    ) -> None:
        self.path = manager.checkpoint_path(root, step)
        self._process, self._buffers, self._done = process, buffers, done
        self._partial = manager.partial_path(self.path)
        self._state = {**state, "step": step}
        self._writers = process.world_size if sharded else 1
        self._own = self._partial / f"{process.rank:04d}.writing"
        self._files: SimpleQueue[File | None] = SimpleQueue()
        self._written = 0
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)

        def begin() -> None:
            if process.is_rank0:
                manager.begin(root, self._partial)

        def mark() -> None:
            if process.rank < self._writers:
                self._partial.mkdir(parents=True, exist_ok=True)  # as in `write_files`
                self._own.touch()

        for action in (begin, mark):
            manager.together(self.path, process, action)
        self._thread.start()
        try:
            rank = process.rank if sharded else None
            for file in files_of(tensor_shards(), rank, buffers.copy):
                buffers.hand_over(shard.tensor for shard in file.shards)
                self._files.put(file)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._files.put(None)

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self._thread.is_alive()

    def wait(self, heartbeat: Callable[[], None]) -> None:
        """Wait for this rank's thread; raise what ended it and is no plain failure to write. `heartbeat`: called
        for each file."""
        seen = self._written
        while self._thread.is_alive():
            self._thread.join(_WAIT)
            if self._written != seen:
                seen = self._written
                heartbeat()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            if self._process.rank < self._writers:
                self._write()
            if self._error is not None:  # in the main thread: the run ends
                return
            if self._process.is_rank0:
                self._done(self.path, self._complete())
            else:
                while self._partial.exists():
                    time.sleep(_POLL)
        except OSError as error:  # the others cannot be told
            why = manager.not_written(self.path, str(error), self._process.rank)
            self._error = manager.SaveError(why)
        except BaseException as error:  # a defect
            self._error = error

    def _write(self) -> None:
        """Write this rank's files and say so beside them."""

        def files() -> Iterator[File]:
            while (file := self._files.get()) is not None:
                yield file
                self._written += 1
                self._buffers.give_back(shard.tensor for shard in file.shards)

        mark = "written"
        try:
            self._own.write_text(json.dumps(manager.write_files(self._partial, files())))
        except OSError as error:
            mark = f"failed-{error.errno or 0}"
            deque(files(), maxlen=0)  # the main thread may wait for their memory
        if self._error is None:  # else the snapshot is not complete
            self._own.rename(self._own.with_suffix(f".{mark}"))

    def _complete(self) -> str | None:
        """Wait for all ranks, and make the checkpoint visible; returns why that cannot be."""
        marks: list[Path] = []
        while len(marks) < self._writers:
            marks = [*self._partial.glob("*.written"), *self._partial.glob("*.failed-*")]
            time.sleep(_POLL * (len(marks) < self._writers))
        rank, why = 0, None
        files: dict[str, Any] = {}
        try:
            for mark in sorted(marks):
                if mark.suffix != ".written":
                    rank, why = int(mark.stem), os.strerror(int(mark.suffix.rpartition("-")[2]))
                    break
                files |= json.loads(mark.read_text())
                mark.unlink()
            else:
                manager.finish(self._partial, self.path, {**self._state, "files": files})
        except OSError as error:
            why = str(error)
        if why is None:
            return None
        shutil.rmtree(self._partial, ignore_errors=True)
        return manager.not_written(self.path, why, rank)
