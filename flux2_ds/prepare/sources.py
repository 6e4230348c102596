"""Where images and captions come from: folders, with Hugging Face's metadata files, and tars.

    find_images({"me": "photos/me", "web": "s3://bucket/{000..099}.tar"}, "text")

A caption is, in this order: the row of `metadata.jsonl` or `metadata.csv` that names the image, the
`.txt` file of the same name beside it, and in tars the caption of the `.json` member.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from flux2_ds.config.recipe import is_url
from flux2_ds.data.images import SUFFIXES, is_image, why_unread
from flux2_ds.data.storage import Blob
from flux2_ds.errors import UserError
from flux2_ds.prepare.masks_and_references import attach
from flux2_ds.prepare.source_images import (
    SourceImage,
    clean_caption,
    decode_caption,
    printable,
    stem,
)
from flux2_ds.prepare.tars import expand, read_tar

log = logging.getLogger("flux2_ds")

DEFAULT_SOURCE = "images"
_METADATA = ("metadata.jsonl", "metadata.csv")


def find_images(
    images: str | dict[str, str], caption_column: str, scratch: Path, apart: Sequence[Path] = ()
) -> list[SourceImage]:
    """All images of all sources, sorted by source and name.

    `scratch` keeps what was found in tars, so that a second start does not read them again. Folders
    in `apart` are not searched where they lie within a source."""
    sources = {DEFAULT_SOURCE: images} if isinstance(images, str) else images
    if not sources:
        raise UserError("data.images is empty. Give the folder of your images.")
    found = []
    for name, location in sorted(sources.items()):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(
                f"data.images has a source called {name!r}. Use letters, digits, - and _: the shards "
                "are named after it."
            )
        source_images = list(_source(name, location, caption_column, scratch, apart))
        if not source_images:
            raise UserError(
                f"data.images {location} holds no images ({', '.join(sorted(SUFFIXES))}), neither "
                "in itself nor below. Give the folder of your images."
            )
        source_images.sort(key=lambda image: image.key)
        for one, other in pairwise(source_images):
            if one.key == other.key:
                raise UserError(
                    f"data.images {location} has {one.key} twice, in {one.blob.location} and in "
                    f"{other.blob.location}. Give them as two sources, data.images: "
                    f"{{one: {one.blob.location}, other: {other.blob.location}}}."
                )
        found += attach(source_images)
    return found


def _source(
    name: str, location: str, caption_column: str, scratch: Path, apart: Sequence[Path]
) -> Iterator[SourceImage]:
    if location.endswith(".tar"):
        tars = expand(location)
    elif is_url(location):
        raise UserError(
            f"data.images {location} is a URL but no tar. Folders of images are read from disk; "
            "name tars in a store one by one or by a pattern such as s3://bucket/{000..099}.tar."
        )
    elif not Path(location).is_dir():
        raise UserError(f"data.images {location} is not a folder. Give the folder of your images.")
    else:
        yield from _folder(name, location, caption_column, apart)
        tars = sorted(str(path) for path in Path(location).glob("*.tar"))
    for tar in tars:
        yield from read_tar(name, tar, caption_column, scratch)


def _folder(
    source: str, folder: str, caption_column: str, apart: Sequence[Path]
) -> Iterator[SourceImage]:
    """The images below a folder on disk."""
    listed: dict[str, str | None] = {}
    images: list[os.DirEntry[str]] = []
    texts: dict[str, str] = {}  # by path without its suffix, which may be in capitals
    for file in _walk(folder, apart):
        suffix = Path(file.name).suffix.lower()
        if file.name in _METADATA:
            listed |= _metadata(file.path, caption_column)
        elif is_image(file.name):
            images.append(file)
        elif suffix == ".txt":
            texts[stem(file.path)] = file.path  # a .txt comes after a .TXT
    alone = texts.keys() - {stem(file.path) for file in images}
    if alone:
        first = printable(texts[min(alone)])
        log.warning("%d .txt files belong to no image, the first is %s", len(alone), first)
    for file in images:
        key = printable(os.path.relpath(file.path, folder))
        try:
            facts = file.stat()
        except OSError as error:
            yield SourceImage(
                source, key, "", "", Blob(file.path), f"cannot be read: {error.strerror}"
            )
            continue
        stamp = f"{facts.st_size}:{facts.st_mtime_ns}"
        caption, problem = listed.pop(os.path.normpath(file.path), None), None
        if caption is None:
            caption, problem = _text_in(texts.get(stem(file.path)))
        problem = why_unread(file.name) or problem
        yield SourceImage(source, key, stamp, caption, Blob(file.path), problem)
    for path in listed:
        missing = "named in the metadata, but there is no such image"
        key = printable(os.path.relpath(path, folder))
        yield SourceImage(source, key, "", "", Blob(path), missing)


def _walk(folder: str, apart: Sequence[Path]) -> Iterator[os.DirEntry[str]]:
    """All files below `folder`, but for the folders in `apart`; a folder that links reach again is
    searched once."""
    seen: set[tuple[int, int]] = set()
    left = [folder]
    while left:
        current = left.pop()
        facts = Path(current).stat()
        if (facts.st_dev, facts.st_ino) in seen:
            log.info("%s is reached again through a link and searched once", current)
            continue
        seen.add((facts.st_dev, facts.st_ino))
        try:
            with os.scandir(current) as files:
                for file in sorted(files, key=lambda file: file.name):
                    if file.is_dir():
                        if any(path.exists() and path.samefile(file.path) for path in apart):
                            log.info("%s is not searched: its images were made here", file.path)
                        else:
                            left.append(file.path)
                    elif file.is_file() or file.is_symlink():  # a link may be broken
                        yield file
        except OSError as error:
            raise UserError(
                f"data.images {current} cannot be searched: {error.strerror}."
            ) from error


def _text_in(file: str | None) -> tuple[str | None, str | None]:
    """The caption in the .txt file beside an image, if there is one, and what is wrong with it."""
    if file is None:
        return None, None
    path = Path(file)
    try:
        content = path.read_bytes()
    except OSError as error:
        return None, f"caption {printable(path.name)} cannot be read: {error.strerror}"
    return decode_caption(content, path.name)


def _metadata(path: str, caption_column: str) -> dict[str, str | None]:
    """Captions by path from one metadata file, whose names are relative to its folder."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".csv"):
            rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        folder = Path(path).parent
        captions: dict[str, str | None] = {}
        for number, row in enumerate(rows, start=1):
            for column in ("file_name", caption_column):
                if column not in row:
                    raise UserError(
                        f"{path}: row {number} has no {column!r}, but {', '.join(map(repr, row))}. "
                        "Name the images in file_name, and the captions' column in "
                        "data.caption_column."
                    )
            image = os.path.normpath(folder / str(row["file_name"]))
            captions[image] = clean_caption(row[caption_column])
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}. Correct or remove it.") from error
    return captions
