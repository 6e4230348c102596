"""Existing WebDataset tars of raw images, such as img2dataset writes: KEY.jpg, KEY.txt, KEY.json.

A tar is read once from front to back, wherever it is, and nothing is unpacked; what was found is
kept, with the place of every image, so that encoding reads the images alone.
"""

from __future__ import annotations

import glob
import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from tarfile import (  # type: ignore[attr-defined]
    EOFHeaderError,
    HeaderError,
    ReadError,
)
from typing import IO, Any, Self

import braceexpand

from flux2_ds.config.recipe import is_url
from flux2_ds.data.images import UnreadableImageError, image_size, is_image, why_unread
from flux2_ds.data.storage import Blob, file_system, tried_again
from flux2_ds.errors import UserError
from flux2_ds.prepare.source_images import (
    SourceImage,
    clean_caption,
    decode_caption,
    printable,
    stem,
)
from flux2_ds.run.atomic import atomic_write_text


def expand(pattern: str) -> list[str]:
    """The tars that a name with {000..099} or * stands for; a store must list its files for *."""
    found: list[str] = []
    for name in braceexpand.braceexpand(pattern):
        matches = [name]
        if "*" in name:
            matches = sorted(_listed(name) if is_url(name) else glob.glob(name))  # noqa: PTH207
        missing = [path for path in matches if not is_url(path) and not Path(path).is_file()]
        if missing or not matches:
            raise UserError(f"data.images {pattern}: there is no file {(missing or [name])[0]}.")
        found += matches
    return found


def _listed(name: str) -> list[str]:
    def found() -> list[str]:
        system, path = file_system(name)
        return [system.unstrip_protocol(each) for each in system.glob(path)]

    return tried_again(name, found)


def read_tar(source: str, location: str, caption_column: str, scratch: Path) -> list[SourceImage]:
    """The images of one tar with their captions."""
    stamp = _stamp(location)
    name = hashlib.sha256(f"{location}|{stamp}|{caption_column}".encode()).hexdigest()[:24]
    note = scratch / f"{name}.json"
    if note.is_file():
        return [
            SourceImage.of(values | {"source": source}) for values in json.loads(note.read_text())
        ]

    def scan() -> list[SourceImage]:
        try:
            with _stream(location) as stream:
                return list(_scan(source, location, stream, caption_column))
        except tarfile.TarError as error:
            raise UserError(f"{location} cannot be read as a tar ({error}).") from error

    source_images = tried_again(location, scan) if is_url(location) else scan()
    scratch.mkdir(parents=True, exist_ok=True)
    atomic_write_text(note, json.dumps([asdict(image) for image in source_images]))
    return source_images


def _scan(
    source: str, location: str, stream: IO[bytes], caption_column: str
) -> Iterator[SourceImage]:
    images: dict[str, SourceImage] = {}
    texts: dict[str, tuple[str | None, str | None]] = {}
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is None:  # a folder, link or device
                continue
            name = printable(member.name)
            suffix = PurePosixPath(name).suffix.lower()
            if suffix == ".txt":
                texts[stem(name)] = decode_caption(content.read(), name)
            elif suffix == ".json":
                texts.setdefault(stem(name), _from_json(content.read(), name, caption_column))
            elif is_image(name):
                image = SourceImage(
                    source,
                    f"{PurePosixPath(location).name}/{name}",
                    f"{member.size}:{member.mtime:.0f}",
                    None,
                    Blob(location, member.offset_data, member.size),
                )
                problem = _problem(name, known=name in images)
                if problem:
                    key = f"{image.key}@{member.offset_data}"
                    yield replace(image, key=key, problem=problem)
                elif problem := why_unread(name):
                    images[name] = replace(image, problem=problem)
                else:
                    images[name] = _measured(image, content.read())
        _check_rest(tar)
    for name, image in images.items():
        caption, problem = texts.get(stem(name), (None, None))
        yield replace(image, caption=caption, problem=image.problem or problem)


_RECORD = 1 << 20
"""More than writers fill up with zeros: 10 KiB, unless they are told another length."""


class _Member(tarfile.TarInfo):
    """A member whose header is what it should be: with another one tarfile takes the archive to end there."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        """The next member."""
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(f"{error} at byte {tarfile.offset}: it is cut or damaged") from error


def _check_rest(tar: tarfile.TarFile) -> None:
    """Refuse what tarfile would not read: more behind the archive's end than a record is filled up with."""
    stream: Any = tar.fileobj
    rest: bytes = stream.read(_RECORD)
    if len(rest) == _RECORD or rest.strip(b"\0"):
        raise ReadError(
            "there is more behind its end: it is damaged, not copied whole, or several in one file"
        )


def _measured(image: SourceImage, content: bytes) -> SourceImage:
    try:
        return replace(image, size=image_size(content))
    except UnreadableImageError as error:
        return replace(image, problem=f"unreadable: {error}")


def _problem(name: str, known: bool) -> str | None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "its name in the tar points outside (absolute or with ..)"
    return "the tar has another image of this name" if known else None


def _from_json(content: bytes, name: str, caption_column: str) -> tuple[str | None, str | None]:
    try:
        facts: Any = json.loads(content)
        value = facts.get(caption_column, facts.get("caption"))
    except (ValueError, AttributeError) as error:
        return None, f"{name} is not a JSON object ({error})"
    return clean_caption(value), None


def _stream(location: str) -> IO[bytes]:
    if is_url(location):
        system, path = file_system(location)
        stream: IO[bytes] = system.open(path, "rb")
        return stream
    return Path(location).open("rb")


def _stamp(location: str) -> str:
    """Changes when the tar does."""
    if not is_url(location):
        facts = Path(location).stat()
        return f"{facts.st_size}:{facts.st_mtime_ns}"

    def info() -> Any:
        system, path = file_system(location)
        return system.info(path)

    facts_of = tried_again(location, info)
    return "|".join(
        str(facts_of.get(name))
        for name in ("size", "ETag", "etag", "LastModified", "Last-Modified")
    )
