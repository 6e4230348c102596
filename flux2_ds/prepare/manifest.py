"""What has been prepared: a manifest for every finished shard, kept beside the shards.

A start compares the images with the manifests. Shards are never rewritten: what is new or changed goes
into new shards, and rows whose image is gone or changed are dropped from the index. Going on after a
kill is the same as growing: only shards with a manifest are finished.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path

from flux2_ds.data.index import OLDER, Shard
from flux2_ds.errors import MALFORMED, UserError
from flux2_ds.prepare.source_images import PlannedImage, SourceImage
from flux2_ds.run.atomic import atomic_write_text

MANIFESTS = "prepared"
"""Folder of the manifests, in that of the shards."""


@dataclass(frozen=True, slots=True)
class Row:
    """The image that one sample of a shard was made of. `sha256` is of its bytes, `texts` are digests, joined by
    commas. `notes` are for the report."""

    key: str
    stamp: str
    sha256: str
    texts: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """A finished shard: a row for each sample, and the images that could not be decoded."""

    shard: Shard
    rows: list[Row]
    skipped: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Stamp and reason by key; without a stamp it is tried again."""


@dataclass(frozen=True)
class Comparison:
    """The images against the manifests.

    `kept`: with the bucket that they were encoded in. `new`: to be encoded. `dropped`: rows to leave
    out, by shard name. `skipped`: reasons by image name.
    """

    kept: list[PlannedImage]
    new: list[SourceImage]
    dropped: dict[str, list[int]]
    skipped: dict[str, str]


def texts_digest(texts: tuple[str, ...]) -> str:
    """Names the texts of an image."""
    return ",".join(map(caption_digest, texts))


def caption_digest(caption: str) -> str:
    """Names a text."""
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def manifest_paths(folder: Path) -> list[Path]:
    """The files of the manifests of all finished shards."""
    return sorted((folder / MANIFESTS).glob("*.tar.json"))


def read_manifests(folder: Path) -> list[Manifest]:
    """The manifests of all finished shards, sorted by name."""
    manifests = []
    for path in manifest_paths(folder):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(k, s, d, c, tuple(notes)) for k, s, d, c, notes in values["rows"]]
            skipped = {key: (stamp, reason) for key, (stamp, reason) in values["skipped"].items()}
            manifests.append(Manifest(Shard.of(values["shard"]), rows, skipped))
        except MALFORMED as error:
            raise UserError(f"{path}: {OLDER} ({error!r}). Give another data.shards.") from error
    return manifests


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Record that a shard is finished."""
    (folder / MANIFESTS).mkdir(exist_ok=True)
    rows = [list(astuple(row)) for row in manifest.rows]
    values = {"shard": asdict(manifest.shard), "rows": rows, "skipped": manifest.skipped}
    atomic_write_text(folder / MANIFESTS / f"{manifest.shard.name}.json", json.dumps(values))


def compare(images: list[SourceImage], manifests: list[Manifest]) -> Comparison:
    """Sort the images into those that are encoded, those that are not, and rows without one.

    An image is unchanged if its texts are, and its stamp or, failing that, its bytes.
    """
    wanted = {(image.source, image.key): image for image in images}
    kept: list[PlannedImage] = []
    dropped: dict[str, list[int]] = {}
    skipped: dict[str, str] = {}
    for manifest in manifests:
        source, name = manifest.shard.source, manifest.shard.name
        for number, row in enumerate(manifest.rows):
            image = wanted.get((source, row.key))
            if image is not None and _is_unchanged(image, row):
                del wanted[source, row.key]
                kept.append(PlannedImage(image, manifest.shard.bucket))
            else:
                dropped.setdefault(name, []).append(number)
        for key, (stamp, reason) in manifest.skipped.items():
            image = wanted.get((source, key))
            if image is not None and image.stamp == stamp:
                del wanted[source, key]
                skipped[image.name] = reason
    return Comparison(kept, list(wanted.values()), dropped, skipped)


def made_of_others(images: list[SourceImage], manifests: list[Manifest]) -> bool:
    """Whether there are shards, and of none of these images, whatever their captions are now."""
    present = {(image.source, image.key): image for image in images}
    rows = [(present.get((m.shard.source, row.key)), row) for m in manifests for row in m.rows]
    return bool(rows) and not any(image and _is_same_image(image, row) for image, row in rows)


def _is_unchanged(image: SourceImage, row: Row) -> bool:
    if texts_digest(image.captions) != row.texts:
        return False
    if image.stamp.partition("|")[2] != row.stamp.partition("|")[2]:  # of mask and references
        return False
    return _is_same_image(image, row)


def _is_same_image(image: SourceImage, row: Row) -> bool:
    own, own_before = image.stamp.partition("|")[0], row.stamp.partition("|")[0]
    return own == own_before or (
        own.split(":")[0] == own_before.split(":")[0]
        and hashlib.sha256(image.blob.read()).hexdigest() == row.sha256
    )


def indexed_shards(manifests: list[Manifest], dropped: dict[str, list[int]]) -> list[Shard]:
    """The shards for the index, without the dropped rows; shards without a sample are left out."""
    shards = []
    for manifest in sorted(manifests, key=lambda each: each.shard.name):
        gone = dropped.get(manifest.shard.name, [])
        samples = manifest.shard.samples - len(gone)
        if samples:
            shards.append(replace(manifest.shard, samples=samples, dropped=gone))
    return shards
