"""Log lines: rank 0's on the console and in its log, the others' in theirs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from flux2_ds.run.atomic import no_follow

FILE_ONLY = {"console": False}
"""`extra` of a log line that the console does not show."""


def open_log(path: Path) -> TextIO:
    """Open a log to append to it."""
    # Names of files may have bytes that are no UTF-8.
    return open(path, "a", encoding="utf-8", errors="backslashreplace", opener=no_follow)


class LogFile(logging.FileHandler):
    """A log that loses lines when its disk is full, and says so once."""

    _lost = False

    def _open(self) -> TextIO:  # type: ignore[override]
        return open_log(Path(self.baseFilename))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Called where a line cannot be written."""
        if not self._lost:
            self._lost = True
            error = sys.exc_info()[1]
            sys.stderr.write(f"lines are missing in {self.baseFilename} from here on: {error}\n")


class Console(logging.StreamHandler[TextIO]):
    """Standard error; lines stand above a progress bar, if there is one."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the console shows it."""
        return getattr(record, "console", True) and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line in the bar's place, and the bar below."""
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def progress_bar(title: str, total: int | None, unit: str, **options: Any) -> tqdm[Any]:
    """A bar on a terminal; elsewhere one that shows nothing, because log lines say how far it is."""
    return tqdm(
        desc=title, total=total, unit=unit, disable=None, dynamic_ncols=True, leave=False, **options
    )


def clear_line(descriptor: int) -> bytes:
    """What to write before a message to a terminal on which another process may have a bar."""
    return b"\r\x1b[K" if os.isatty(descriptor) else b""


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what DeepSpeed prints, and the compilers that it starts: a result has stdout to itself."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(own, 1)
        os.close(own)


class Line(logging.Formatter):
    """`12:03:45 message`; what is more than a message says so."""

    def format(self, record: logging.LogRecord) -> str:
        """`12:03:45 warning: message`."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{super().format(record)}"


def once(text: str) -> Callable[[logging.LogRecord], bool]:
    """A filter that lets messages with this text pass once."""
    passed = False

    def new(record: logging.LogRecord) -> bool:
        nonlocal passed
        repeats = text in record.getMessage()
        passes = not (repeats and passed)
        passed = passed or repeats
        return passes

    return new


def set_up_console() -> None:
    """Log lines as they are, for a command that is one process."""
    logging.basicConfig(
        handlers=[Console()], format="%(message)s", level=logging.WARNING, force=True
    )
    logging.getLogger("flux2_ds").setLevel(logging.INFO)


def set_up_log(logs: Path, rank: int) -> None:
    """Rank 0's log lines and Python's warnings, on the console and in its log; of the others the
    warnings, in their logs (the watchdog has sent their output there)."""
    handlers: list[logging.Handler] = [Console()]
    if rank == 0:
        handlers.append(LogFile(logs / "rank_0.log"))
    logging.basicConfig(handlers=handlers, force=True)
    for handler in handlers:
        handler.setFormatter(Line())
    logging.getLogger("flux2_ds").setLevel(logging.WARNING if rank else logging.INFO)
    logging.captureWarnings(True)
    # DeepSpeed calls collectives by names that torch is about to rename; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Of a card that is nearly full DeepSpeed says so after each step at stage 3.
    logging.getLogger("DeepSpeed").addFilter(once("pytorch allocator cache flushes"))
    # A recipe that says fp32 means it.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
