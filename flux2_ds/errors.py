"""The one error that is addressed to the user, and the exit codes of commands."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL: training was stopped, a checkpoint was saved, the same command continues it."""


USER_INFO = re.compile(
    r"""(?<=://)(?![^\s/:@]*:\d{1,5}/)[^\s/@'"]*:[^\s'"]*@|(?<=http://|ttps://)[^\s/@'"]*@""",
    re.IGNORECASE,
)
"""In a URL `user:password@`, whose password may hold any character, and a web server's `user@`; but not the
port before a path."""


def without_secrets(text: str) -> str:
    """Cut user names and passwords out of the URLs in `text`, and queries, fragments and parameters off
    them, which may be signatures."""
    return re.sub(r"(\w://[^\s?#;]*)[?#;][^\s'\")]+", r"\1", USER_INFO.sub("", text))


class UserError(Exception):
    """Something in the recipe, the data or the model directory is wrong.

    The message names the setting or file, its value, and what to do. It is printed without a
    traceback; every other exception keeps its traceback, because it is a defect of ours.
    """

    code = EXIT_USER_ERROR

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class OutageError(UserError):
    """Something outside is out of reach; the same command may work later, so restarts try it again."""

    code = EXIT_FAILURE


MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading JSON or YAML, and the values in it, raises where a file is not ours or damaged."""


class Arguments(argparse.ArgumentParser):
    """The command line of a command that takes no recipe; its faults are a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Refuse in one line."""
        raise UserError(f"{message}. `{self.prog} --help` lists the options.")


def run_root(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one clear message and its exit code."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        # One write, so that the lines of several processes do not run into each other.
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        sys.exit(error.code)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        sys.exit(128 + signal.SIGPIPE)


def _nobody_reads() -> bool:
    """Whether the reader of our output has gone, as in `... | head`; then later output goes nowhere."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    gone = [descriptor for descriptor, _ in poll.poll(0)]
    for descriptor in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(gone)


def shown(value: str) -> str:
    """A value as an error repeats it: short, and on one line."""
    text = value if value.isprintable() else ascii(value)[1:-1]
    return f"{text[:60]}..." if len(text) > 64 else text or "''"


def counted(count: float, noun: str) -> str:
    """`1 image`, `2 images`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{plural * (count != 1)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Name what `word` may have been meant to be."""
    near = difflib.get_close_matches(word[:100], known, n=1)
    return f" Did you mean {near[0]}?" if near else ""
