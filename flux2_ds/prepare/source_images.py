"""An image as it was found, with its caption; the images that are left out, with their reasons."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from flux2_ds.config.buckets import Bucket
from flux2_ds.data.images import why_unread
from flux2_ds.data.storage import Blob

log = logging.getLogger("flux2_ds")

_LOGGED_BY_NAME = 20


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image of a source.

    `key` names it within the source and `stamp` changes when the file does. `problem` is the reason
    why it cannot be used. `captions` are those that were found; once the image is planned, the texts
    that it is trained with. `size` (width, height) is known of images
    in tars, where finding out means reading them. `mask` and `references` belong to the image.
    """

    source: str
    key: str
    stamp: str
    captions: tuple[str, ...]
    blob: Blob
    problem: str | None = None
    size: tuple[int, int] | None = None
    mask: Blob | None = None
    references: tuple[SourceImage, ...] = ()

    @staticmethod
    def of(values: dict[str, Any]) -> SourceImage:
        """An image that has no mask and references yet, from its JSON values."""
        size = values["size"] and tuple(values["size"])
        parts = {"blob": Blob(**values["blob"]), "size": size, "references": ()}
        parts["captions"] = tuple(values["captions"])
        return SourceImage(**(values | parts))

    @property
    def name(self) -> str:
        """Source and key, for people."""
        return f"{self.source}/{self.key}"


@dataclass(frozen=True, slots=True)
class Crop:
    """A view of an image: where it lies in what the bucket cuts away, from 0 (left, top) to 1, and whether it is
    mirrored."""

    place: float = 0.5
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """An image to be encoded: with its texts in training, how it is cropped, and notes for the report."""

    image: SourceImage
    bucket: Bucket
    notes: tuple[str, ...] = ()
    crops: tuple[Crop, ...] = (Crop(),)
    alpha_mask: bool = False


@dataclass
class Skipped:
    """Images left out, with the reasons; the log names the first, the report all."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        """Record that an image is left out."""
        self.reasons[name] = reason
        if len(self.reasons) <= _LOGGED_BY_NAME:
            log.warning("skipped %s: %s", name, reason)
        elif len(self.reasons) == _LOGGED_BY_NAME + 1:
            log.warning("skipped more; report.json names them all")


@dataclass
class Unused:
    """Files that are neither images nor belong to one: how many of each suffix, and the first."""

    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, name: str, count: int = 1) -> None:
        """Count a file, or several of its suffix."""
        suffix = PurePosixPath(name).suffix.lower() or "without a suffix"
        before, first = self.files.get(suffix, (0, printable(name)))
        self.files[suffix] = (before + count, first)

    def add_all(self, other: Unused) -> None:
        """Count the files of another source."""
        for count, first in other.files.values():
            self.add(first, count)

    def line(self) -> str:
        """How many of what, for people."""
        if not self.files:
            return ""
        kinds = sorted(self.files.items(), key=lambda item: -item[1][0])
        named = [
            f"{count} {suffix} ({_WHY_UNUSED.get(suffix, '')}the first is {first})"
            for suffix, (count, first) in kinds
        ]
        total = sum(count for count, _ in self.files.values())
        files = "other file is" if total == 1 else "other files are"
        return f" {total} {files} not used: {', '.join(named)}."


_UNPACK = "unpack it; "
_WHY_UNUSED = {
    **dict.fromkeys((".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz", ".zst"), _UNPACK),
    **dict.fromkeys((".txt", ".caption", ".json"), "of no image; "),
    ".tar": "name it in data.images; ",
}


@dataclass
class Found:
    """What a folder or a tar holds."""

    images: list[SourceImage] = field(default_factory=list)
    unused: Unused = field(default_factory=Unused)


_FOLDERS_OF_PROGRAMS = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN"}
MOST_BYTES = 1 << 30
"""Of an image's file: 89 megapixels, Pillow's limit, have at most 0.7 GB."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or is a program's own: thumbnails, resource forks, trash."""
    return name.startswith(".") or name in _FOLDERS_OF_PROGRAMS


def problem_of(name: str, size: int) -> str | None:
    """Why a file that is an image by its name cannot be used, as far as name and size tell."""
    if size > MOST_BYTES:
        return f"{size / 1e9:.1f} GB: no image that is read is so large"
    return why_unread(name)


def stem(key: str) -> str:
    """A key without its suffix, which an image shares with its caption, mask and references."""
    return str(PurePosixPath(key).with_suffix(""))


def printable(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 become \\x escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
