"""Existing WebDataset tars of raw images, such as img2dataset writes: KEY.jpg, KEY.txt, KEY.json.

A tar is read once from front to back, wherever it is, and nothing is unpacked; what was found is
kept, with the place of every image, so that encoding reads the images alone.
"""

from __future__ import annotations

import glob
import hashlib
import json
import tarfile
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
from flux2_ds.data.images import UnreadableImageError, image_size, is_image
from flux2_ds.data.storage import Blob, file_system, tried_again
from flux2_ds.errors import UserError
from flux2_ds.prepare.caption_text import BESIDE, MOST_BYTES, Captions, captions_beside, too_large
from flux2_ds.prepare.source_images import (
    Found,
    SourceImage,
    Unused,
    is_hidden,
    printable,
    problem_of,
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


def read_tar(source: str, location: str, column: str, scratch: Path) -> Found:
    """The images of one tar with their captions, and its other members."""
    key = f"{_VERSION}|{location}|{_stamp(location)}|{column}"
    note = scratch / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if note.is_file():
        values = json.loads(note.read_text())
        images = [SourceImage.of(each | {"source": source}) for each in values["images"]]
        files = {suffix: (count, first) for suffix, (count, first) in values["unused"].items()}
        return Found(images, Unused(files))

    def scan() -> Found:
        try:
            with _stream(location) as stream:
                return _scan(source, location, stream, column)
        except tarfile.TarError as error:
            raise UserError(f"{location} cannot be read as a tar ({error}).") from error

    found = tried_again(location, scan) if is_url(location) else scan()
    scratch.mkdir(parents=True, exist_ok=True)
    values = {"images": [asdict(image) for image in found.images], "unused": found.unused.files}
    atomic_write_text(note, json.dumps(values))
    return found


def _scan(source: str, location: str, stream: IO[bytes], column: str) -> Found:
    found, images = Found(), dict[str, SourceImage]()
    captions: dict[str, dict[str, Captions]] = {}  # by name without suffix, by that
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            name = printable(member.name)
            parts = PurePosixPath(name).parts
            if content is None or any(is_hidden(part) for part in parts if part != ".."):
                continue  # a folder, link or device, or hidden
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in BESIDE:
                large = member.size > MOST_BYTES
                captions.setdefault(stem(name), {})[suffix] = (
                    too_large(name, member.size)
                    if large
                    else captions_beside(content.read(), name, column)
                )
                continue
            if not is_image(name):
                found.unused.add(f"{location}/{name}")
                continue
            image = SourceImage(
                source,
                f"{PurePosixPath(location).name}/{name}",
                f"{member.size}:{member.mtime:.0f}",
                (),
                Blob(location, member.offset_data, member.size),
            )
            if problem := _problem(name, known=name in images):
                key = f"{image.key}@{member.offset_data}"
                found.images.append(replace(image, key=key, problem=problem))
                continue
            problem = problem_of(name, member.size)
            if member.issparse():
                problem = "it is stored in the tar with holes (sparse): pack it anew"
            if problem:
                images[name] = replace(image, problem=problem)
            else:
                images[name] = _measured(image, content.read())
        _check_rest(tar)
    stems = {stem(name) for name in images}
    for name, files in captions.items():
        if name not in stems:
            for suffix in files:
                found.unused.add(f"{location}/{name}{suffix}")
    for name, image in images.items():
        files = captions.get(stem(name), {})
        known = (files[suffix] for suffix in BESIDE if suffix in files)
        texts, problem = next((each for each in known if each != ((), None)), ((), None))
        found.images.append(replace(image, captions=texts, problem=image.problem or problem))
    return found


_VERSION = 4
"""Of what is kept in `scratch`."""
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
"""Types of members that tarfile reads into memory at once."""
_RECORD = 1 << 20
"""More than writers fill up with zeros: 10 KiB, unless they are told another length."""


class _Member(tarfile.TarInfo):
    """A member whose header is what it should be: with another one tarfile takes the archive to end there."""

    def _proc_member(self, tarfile: tarfile.TarFile) -> Any:
        if self.type in _NAMES and self.size > MOST_BYTES:
            raise ReadError(f"a name of {self.size} bytes at byte {tarfile.offset}")
        return super()._proc_member(tarfile)  # type: ignore[misc]

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
