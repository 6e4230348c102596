"""What has been prepared: one note for every finished shard, kept beside the shards.

A start compares the pictures with the notes. Shards are never rewritten: what is new or changed goes
into new shards, and rows whose picture is gone or changed are dropped from the index. Going on after a
kill is the same as growing: only shards with a note are finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flux2_ds.config.buckets import Bucket
from flux2_ds.data.index import Shard
from flux2_ds.prepare.source_images import Picture, SourceImage
from flux2_ds.run.atomic import atomic_write_text

FOLDER = "prepared"


@dataclass(frozen=True, slots=True)
class Row:
    """The picture that one sample of a shard was made of. `sha256` is of its bytes."""

    key: str
    stamp: str
    sha256: str
    caption: str


@dataclass(frozen=True)
class Note:
    """A finished shard: a row for each sample, and the pictures that could not be decoded."""

    shard: Shard
    rows: list[Row]
    skipped: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Stamp and reason by key; without a stamp it is tried again."""


@dataclass(frozen=True)
class Job:
    """A shard to be written."""

    name: str
    source: str
    bucket: Bucket
    pictures: list[Picture]
    held_out: bool = False


@dataclass(frozen=True)
class Comparison:
    """What is there already and what is to be done.

    `kept`: entries with the bucket they were encoded in. `fresh`: entries to encode.
    `dropped`: rows to leave out, by shard name. `skipped`: reasons by picture name.
    """

    kept: list[Picture]
    fresh: list[SourceImage]
    dropped: dict[str, list[int]]
    skipped: dict[str, str]


def caption_digest(caption: str) -> str:
    """Names a caption."""
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def note_values(note: Note) -> dict[str, Any]:
    """A note as JSON values."""
    rows = [[row.key, row.stamp, row.sha256, row.caption] for row in note.rows]
    return {"shard": asdict(note.shard), "rows": rows, "skipped": note.skipped}


def note_of(values: dict[str, Any]) -> Note:
    """The note that `note_values` wrote."""
    rows = [Row(*row) for row in values["rows"]]
    skipped = {key: (stamp, reason) for key, (stamp, reason) in values["skipped"].items()}
    return Note(Shard.of(values["shard"]), rows, skipped)


def read_notes(folder: Path) -> list[Note]:
    """All finished shards, sorted by name."""
    paths = sorted((folder / FOLDER).glob("*.tar.json"))
    return [note_of(json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def write_note(folder: Path, note: Note) -> None:
    """Remember a finished shard; it is finished when this file is there."""
    (folder / FOLDER).mkdir(exist_ok=True)
    atomic_write_text(folder / FOLDER / f"{note.shard.name}.json", json.dumps(note_values(note)))


def compare(source_images: list[SourceImage], notes: list[Note]) -> Comparison:
    """Sort the pictures into those that are encoded, those that are not, and rows without one.

    A picture is unchanged if its caption is, and its stamp or, failing that, its bytes.
    """
    wanted = {(entry.source, entry.key): entry for entry in source_images}
    kept: list[Picture] = []
    dropped: dict[str, list[int]] = {}
    skipped: dict[str, str] = {}
    for note in notes:
        source = note.shard.source
        for number, row in enumerate(note.rows):
            entry = wanted.get((source, row.key))
            if entry is not None and _same(entry, row):
                del wanted[source, row.key]
                kept.append(Picture(entry, entry.caption or "", note.shard.bucket))
            else:
                dropped.setdefault(note.shard.name, []).append(number)
        for key, (stamp, reason) in note.skipped.items():
            entry = wanted.get((source, key))
            if entry is not None and entry.stamp == stamp:
                del wanted[source, key]
                skipped[entry.name] = reason
    return Comparison(kept, list(wanted.values()), dropped, skipped)


def of_others(source_images: list[SourceImage], notes: list[Note]) -> bool:
    """Whether shards were made, and of none of these pictures, whatever their captions and companions are now."""
    present = {(entry.source, entry.key): entry for entry in source_images}
    rows = [(present.get((note.shard.source, row.key)), row) for note in notes for row in note.rows]
    return bool(rows) and not any(entry and _same_picture(entry, row) for entry, row in rows)


def _same(entry: SourceImage, row: Row) -> bool:
    if caption_digest(entry.caption or "") != row.caption:
        return False
    if entry.stamp.partition("|")[2] != row.stamp.partition("|")[2]:  # the companions'
        return False
    return _same_picture(entry, row)


def _same_picture(entry: SourceImage, row: Row) -> bool:
    own, own_before = entry.stamp.partition("|")[0], row.stamp.partition("|")[0]
    return own == own_before or (
        own.split(":")[0] == own_before.split(":")[0]
        and hashlib.sha256(entry.blob.read()).hexdigest() == row.sha256
    )


def is_held_out(entry: SourceImage, share: float) -> bool:
    """Whether a picture is for evaluation: a function of its name, whatever else there is."""
    digest = hashlib.sha256(f"held out|{entry.name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def plan_shards(
    pictures: list[Picture], notes: list[Note], samples_per_shard: int, held_out: float
) -> list[Job]:
    """The shards to write, each of one source and bucket, for training or evaluation, under names not
    taken yet."""
    groups: dict[tuple[str, Bucket, bool], list[Picture]] = {}
    for picture in pictures:
        kind = (picture.entry.source, picture.bucket, is_held_out(picture.entry, held_out))
        groups.setdefault(kind, []).append(picture)
    taken = {note.shard.name for note in notes}
    jobs = []
    for (source, bucket, evaluated), members in sorted(groups.items()):
        names = _free_names(f"{source}-{bucket}" + ("-held_out" if evaluated else ""), taken)
        for start in range(0, len(members), samples_per_shard):
            group = members[start : start + samples_per_shard]
            jobs.append(Job(next(names), source, bucket, group, evaluated))
    return jobs


def _free_names(stem: str, taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        name = f"{stem}-{number:05d}.tar"
        if name not in taken:
            yield name
        number += 1


def shards_of(notes: list[Note], dropped: dict[str, list[int]]) -> list[Shard]:
    """The shards for the index, without the dropped rows; shards without a sample are left out."""
    shards = []
    for note in notes:
        gone = dropped.get(note.shard.name, [])
        shard = replace(note.shard, samples=note.shard.samples - len(gone), dropped=gone)
        if shard.samples:
            shards.append(shard)
    return shards
