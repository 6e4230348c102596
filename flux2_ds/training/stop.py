"""A request to stop, by a signal or a file."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from flux2_ds.distributed import Process, any_rank


@dataclass
class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1, or by a file; acted on at the end of a step, with several ranks
    of one that begins after it.

    The file is how `flux2-ds train` reaches the processes on every host; rank 0 looks for it.
    """

    file: Path
    reason: str | None = None

    def listen(self) -> None:
        """Install the handlers; must be called in the main thread. A file that is older than this
        process was meant for an earlier one."""
        with contextlib.suppress(FileNotFoundError):
            if self.file.stat().st_mtime < psutil.Process().create_time():
                self.file.unlink()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def seen(self, process: Process) -> bool:
        """Whether this process has been asked to stop."""
        if process.is_rank0:
            with contextlib.suppress(
                OSError
            ):  # there is none, or its file system is away for a moment
                self.reason = self.file.read_text(errors="replace").strip() or self.file.name
                self.file.unlink()
        return self.reason is not None

    def any_rank(self, process: Process) -> Callable[[], bool]:
        """Start asking all ranks; the function that is returned waits for the answer. Collective."""
        return any_rank(lambda: self.seen(process), process.device)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
