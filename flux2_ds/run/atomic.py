"""Files that appear whole or not at all. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""So ends the name of a file that is being written; a killed process leaves it."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Where to write: it becomes `path` at the block's end, or is removed if the block raises.

    One writer at a time.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # above all when the disk is full


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that appears whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
