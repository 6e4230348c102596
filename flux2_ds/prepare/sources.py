"""Find images and their captions: in folders, with Hugging Face's metadata files, and in tars.

    find_images(Data(images={"me": "photos/me", "web": "s3://bucket/{000..099}.tar"}, shards="s"), scratch)

A caption is, in this order: the row of `metadata.jsonl` or `metadata.csv` that names the image, and the
`.txt`, `.caption` or `.json` file of the same name beside it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from flux2_ds.config.recipe import DEFAULT_SOURCE, Data, is_url
from flux2_ds.data.images import SUFFIXES, is_image
from flux2_ds.data.storage import Blob
from flux2_ds.errors import UserError
from flux2_ds.prepare.caption_text import (
    BESIDE,
    METADATA,
    MOST_BYTES,
    Captions,
    Metadata,
    captions_beside,
    refuse_faults,
    too_large,
)
from flux2_ds.prepare.masks_and_references import attach
from flux2_ds.prepare.source_images import (
    Found,
    SourceImage,
    Unused,
    is_hidden,
    printable,
    problem_of,
    stem,
)
from flux2_ds.prepare.tars import expand, read_tar

log = logging.getLogger("flux2_ds")

DEFAULT_COLUMN = "text"


def find_images(
    data: Data, scratch: Path, apart: Sequence[Path] = ()
) -> tuple[list[SourceImage], Unused]:
    """All images of all sources, sorted by source and name, and the files that are none.

    `scratch` keeps what was found in tars, so that a second start does not read them again. Folders
    in `apart` are not searched where they lie within a source.
    """
    images = data.images
    sources = {DEFAULT_SOURCE: images} if isinstance(images, str) else images
    if not sources:
        raise UserError("data.images is empty. Give the folder of your images.")
    found, unused, faults = list[SourceImage](), Unused(), list[str]()
    for name, location in sorted(sources.items()):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(
                f"data.images has a source called {name!r}. Use letters, digits, - and _: the shards "
                "are named after it."
            )
        column = data.caption_column
        if isinstance(column, dict):
            column = column.get(name, DEFAULT_COLUMN)
        own, wrong = _find_in_source(name, location, column, scratch, apart)
        faults += wrong
        unused.add_all(own.unused)
        if not own.images and not wrong:
            raise UserError(
                f"data.images {location} holds no images ({', '.join(sorted(SUFFIXES))}), neither "
                f"in itself nor below.{own.unused.line()} Give the folder of your images."
            )
        own.images.sort(key=lambda image: image.key)
        for one, other in pairwise(own.images):
            if one.key == other.key:
                raise UserError(
                    f"data.images {location} has {one.key} twice, in {one.blob.location} and in "
                    f"{other.blob.location}. Give them as two sources, data.images: "
                    f"{{one: {one.blob.location}, other: {other.blob.location}}}."
                )
        found += attach(own.images, data.mask_suffixes, data.reference_suffixes)
    refuse_faults(faults)
    return found, unused


def _find_in_source(
    source: str, location: str, column: str, scratch: Path, apart: Sequence[Path]
) -> tuple[Found, list[str]]:
    """What a source holds, and what is wrong with its metadata."""
    found, faults = Found(), list[str]()
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
        tars = sorted(
            str(path) for path in Path(location).glob("*.tar") if not is_hidden(path.name)
        )
        found, faults = _read_folder(source, location, column, {*tars}, apart)
    for tar in tars:
        own = read_tar(source, tar, column, scratch)
        found.images += own.images
        found.unused.add_all(own.unused)
    return found, faults


def _read_folder(
    source: str, folder: str, column: str, tars: set[str], apart: Sequence[Path]
) -> tuple[Found, list[str]]:
    """The images below a folder on disk."""
    found, metadata = Found(), Metadata(column)
    images: list[os.DirEntry[str]] = []
    beside: dict[str, dict[str, os.DirEntry[str]]] = {}  # by path without its suffix, by that
    for file in _walk(folder, apart):
        suffix = Path(file.name).suffix.lower()
        if file.name in METADATA:
            metadata.read(file.path)
        elif is_image(file.name):
            images.append(file)
        elif suffix in BESIDE:
            beside.setdefault(stem(file.path), {})[suffix] = file  # a .txt comes after a .TXT
        elif file.path not in tars:
            found.unused.add(file.path)
    stems = {stem(file.path) for file in images}
    for path, files in beside.items():
        if path not in stems:
            for file in files.values():
                found.unused.add(file.path)
    listed = metadata.captions
    for file in images:
        key = printable(os.path.relpath(file.path, folder))
        try:
            facts = file.stat()
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
            found.images.append(SourceImage(source, key, "", (), Blob(file.path), why))
            continue
        stamp = f"{facts.st_size}:{facts.st_mtime_ns}"
        captions, problem = listed.pop(os.path.normpath(file.path), ()), None
        if not captions:
            captions, problem = _captions_on_disk(beside.get(stem(file.path), {}), column)
        problem = problem_of(file.name, facts.st_size) or problem
        found.images.append(SourceImage(source, key, stamp, captions, Blob(file.path), problem))
    for path in listed:
        key, why = printable(os.path.relpath(path, folder)), "named in the metadata, but not there"
        found.images.append(SourceImage(source, key, "", (), Blob(path), why))
    return found, metadata.faults()


def _walk(folder: str, apart: Sequence[Path]) -> list[os.DirEntry[str]]:
    """All files below `folder` but hidden ones, and but for the folders in `apart`; a folder that links
    reach again is searched once."""
    found: list[os.DirEntry[str]] = []
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
                    if is_hidden(file.name):
                        continue
                    if file.is_dir():
                        if any(path.exists() and path.samefile(file.path) for path in apart):
                            log.info("%s is not searched: its images were made here", file.path)
                        else:
                            left.append(file.path)
                    elif file.is_file() or file.is_symlink():  # a link may be broken
                        found.append(file)
        except OSError as error:
            raise UserError(
                f"data.images {current} cannot be searched: {error.strerror}."
            ) from error
    return found


def _captions_on_disk(files: dict[str, os.DirEntry[str]], column: str) -> Captions:
    """The captions in the files beside an image: of the first that has any, or is damaged."""
    for file in (files[suffix] for suffix in BESIDE if suffix in files):
        try:
            size = file.stat().st_size
            if size > MOST_BYTES:
                return too_large(file.name, size)
            captions, problem = captions_beside(Path(file.path).read_bytes(), file.name, column)
        except OSError as error:
            return (), f"caption {printable(file.name)} cannot be read: {error.strerror}"
        if captions or problem is not None:
            return captions, problem
    return (), None
