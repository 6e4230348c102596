"""Captions as they are found: beside an image, in a tar, and in metadata files."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from flux2_ds.errors import UserError
from flux2_ds.prepare.source_images import printable

BESIDE = (".txt", ".caption", ".json")
"""Suffixes of captions beside an image, in the order in which they count."""
METADATA = ("metadata.jsonl", "metadata.csv")
MOST_BYTES = 1 << 20
"""Of a caption's file: the encoder reads some 2 kB of it."""
_KEYS = ("text", "caption", "prompt")
"""Of a caption in JSON, after the column that the recipe names."""
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list in a list",
    dict: "an object",
}
_NAMED = 10

Captions = tuple[tuple[str, ...], str | None]
"""The texts, none if they are missing, and what is wrong with them."""


class CaptionError(ValueError):
    """What is there is no caption; the message completes "it"."""


def captions_of(value: object) -> tuple[str, ...]:
    """The captions that a value is: a text or a list of them, without those that are missing."""
    found = map(_caption_of, value if isinstance(value, list) else [value])
    return tuple(caption for caption in found if caption)


def _caption_of(value: object) -> str:
    """The caption that a value is; "" if it is missing. Lone surrogates become question marks."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        raise CaptionError(f"is {_KINDS.get(type(value), type(value).__name__)}, not a text")
    if "\0" in value:
        raise CaptionError("holds a NUL character")
    text = value.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip()
    return text.encode("utf-8", "replace").decode()


def decode_text(content: bytes) -> str:
    """UTF-8, or what a byte order mark says."""
    encoding = next(
        (name for mark, name in _ENCODINGS.items() if content.startswith(mark)), "utf-8"
    )
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise CaptionError(
            f"is not {encoding.upper().removesuffix('-SIG')} ({error.reason})"
        ) from error


def captions_beside(content: bytes, name: str, column: str) -> Captions:
    """The captions in the contents of a file beside an image."""
    name = printable(PurePosixPath(name).name)
    try:
        text = decode_text(content)
        if not name.lower().endswith(".json"):
            return captions_of(text), None
        facts = json.loads(text)
        if not isinstance(facts, dict):
            raise CaptionError("is not a JSON object")
        for key in (column, *_KEYS):
            try:
                found = captions_of(facts.get(key))
            except CaptionError as error:
                return (), f"caption {name}: {key!r} {error}"
            if found:
                return found, None
    except CaptionError as error:
        return (), f"caption {name} {error}"
    except (ValueError, RecursionError) as error:
        return (), f"caption {name} is not a JSON object ({error})"
    return (), None


def too_large(name: str, size: int) -> Captions:
    """What is wrong with a caption of so many bytes."""
    return (
        (),
        f"caption {printable(PurePosixPath(name).name)} has {size / 1e6:.1f} MB, and captions at most 1",
    )


@dataclass
class Metadata:
    """The captions in the metadata files of a source, by the image's path, and all that is wrong with them."""

    column: str
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _named_in: dict[str, str] = field(default_factory=dict)
    _faults: dict[str, list[str]] = field(default_factory=dict)
    """Places by what is wrong there."""

    def read(self, path: str) -> None:
        """Add one file, whose names are relative to its folder."""
        folder = Path(path).parent
        try:
            text = decode_text(Path(path).read_bytes())
            rows = _csv_rows(text) if path.endswith(".csv") else _json_rows(text)
            for place, row in rows:
                self._add(folder, f"{path}, {place}", row)
        except OSError as error:
            self._fault(path, f"cannot be read: {error.strerror}")
        except CaptionError as error:
            self._fault(path, str(error))

    def _add(self, folder: Path, place: str, row: dict[str, Any] | CaptionError) -> None:
        try:
            if isinstance(row, CaptionError):
                raise row
            for column in ("file_name", self.column):
                if column not in row:
                    raise CaptionError(
                        f"has no {column!r}, but {', '.join(map(repr, row)) or 'nothing'}"
                    )
            name = row["file_name"]
            if not isinstance(name, str) or not name or "\0" in name:
                raise CaptionError(f"has the file_name {name!r}, which is no name of a file")
            image = os.path.normpath(folder / name)
            if image in self._named_in:
                raise CaptionError(f"names {name} again, after {self._named_in[image]}")
            self._named_in[image] = place
            self.captions[image] = ()
            try:
                self.captions[image] = captions_of(row[self.column])
            except CaptionError as error:
                raise CaptionError(f"column {self.column!r} {error}") from error
        except CaptionError as error:
            self._fault(place, str(error))

    def _fault(self, place: str, what: str) -> None:
        self._faults.setdefault(what, []).append(place)

    def faults(self) -> list[str]:
        """What is wrong, with the first places of each kind."""
        return [
            f"{places[0]}: {what}" + f" (and {len(places) - 1} more such rows)" * (len(places) > 1)
            for what, places in self._faults.items()
        ]


def refuse_faults(faults: list[str]) -> None:
    """Refuse metadata that has any."""
    if faults:
        more = [f"and {len(faults) - _NAMED} more"] if len(faults) > _NAMED else []
        raise UserError(
            "\n  ".join(["metadata cannot be used as it is:", *faults[:_NAMED], *more])
            + "\nCorrect or remove it. Images are named in file_name, once each, and captions stand in the "
            "column data.caption_column."
        )


def _json_rows(text: str) -> Iterator[tuple[str, dict[str, Any] | CaptionError]]:
    number = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        number += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = CaptionError(f"is not JSON ({error})")
        if not isinstance(row, dict | CaptionError):
            row = CaptionError("is not a JSON object")
        yield f"row {number}", row


def _csv_rows(text: str) -> Iterator[tuple[str, dict[str, Any] | CaptionError]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise CaptionError("has a column twice in its header: " + ", ".join(map(repr, header)))
        for cells in rows:
            if not cells:
                continue
            number += 1
            if cells == header:
                yield f"row {number}", CaptionError("is the header again")
                continue
            if len(cells) == len(header):
                values = [None if cell.lower() in ("nan", "null") else cell for cell in cells]
                yield f"row {number}", dict(zip(header, values, strict=True))
                continue
            yield (
                f"row {number}",
                CaptionError(
                    f"has {len(cells)} fields and the header {len(header)}: a text with a comma in it "
                    "needs quotes around it"
                ),
            )
    except csv.Error as error:
        yield (
            f"row {number + 1}",
            CaptionError(f"is no CSV ({error}): are quotes closed, and doubled inside?"),
        )
