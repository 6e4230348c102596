"""Files that appear complete or not at all, and no symbolic link followed. No torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flux2_ds.errors import UserError

PARTIAL = ".partial"
"""So ends the name of a file that is being written; a killed process leaves it."""


@contextmanager
def atomic_path(path: Path, writer: int | None = None) -> Iterator[Path]:
    """Where to write: it becomes `path` at the block's end, or is removed if the block raises.

    One writer at a time; several have a number each.
    """
    partial = path.with_name(f"{path.name}{'' if writer is None else f'.{writer}'}{PARTIAL}")
    partial.unlink(missing_ok=True)  # it may be a link to somewhere else
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # above all when the disk is full


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that appears complete or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_private(folder: Path) -> None:
    """Make a directory where others may write, too, as in /tmp; refuse one that is not this user's."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UserError(
            f"{folder} is not a directory of this user alone. Remove it, or set TMPDIR."
        )


def no_follow(path: str, flags: int) -> int:
    """An opener for `open()` that refuses a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
