"""An image as it was found, with its caption; the images that are left out, with their reasons."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from flux2_ds.config.buckets import Bucket
from flux2_ds.data.storage import Blob

log = logging.getLogger("flux2_ds")

_LOGGED_BY_NAME = 20


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image of a source.

    `key` names it within the source and `stamp` changes when the file does. `problem` is the reason
    why it cannot be used, `caption` None if it has none. `size` (width, height) is known of images
    in tars, where finding out means reading them. `mask` and `references` belong to the image.
    """

    source: str
    key: str
    stamp: str
    caption: str | None
    blob: Blob
    problem: str | None = None
    size: tuple[int, int] | None = None
    mask: Blob | None = None
    references: tuple[Blob, ...] = ()

    @staticmethod
    def of(values: dict[str, Any]) -> SourceImage:
        """An image that has no mask and references yet, from its JSON values."""
        size = values["size"] and tuple(values["size"])
        parts = {"blob": Blob(**values["blob"]), "size": size, "references": ()}
        return SourceImage(**(values | parts))

    @property
    def name(self) -> str:
        """Source and key, for people."""
        return f"{self.source}/{self.key}"


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """An image to be encoded: its caption in training, and how it is cropped.

    `lost` is the share of it that the crop cuts away; 0 also if it was encoded earlier.
    """

    image: SourceImage
    caption: str
    bucket: Bucket
    lost: float = 0.0


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


def stem(key: str) -> str:
    """A key without its suffix, which an image shares with its caption, mask and references."""
    return str(PurePosixPath(key).with_suffix(""))


def printable(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 become \\x escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def clean_caption(value: object) -> str | None:
    """A caption from JSON or CSV; None if there is none. Lone surrogates become question marks."""
    if value is None:
        return None
    return str(value).encode("utf-8", "replace").decode().strip() or None


def decode_caption(content: bytes, name: str) -> tuple[str | None, str | None]:
    """The caption in the contents of a text file, and what is wrong with it."""
    try:
        return content.decode("utf-8-sig").strip() or None, None
    except UnicodeDecodeError as error:
        return None, f"caption {printable(name)} is not UTF-8 ({error.reason})"
