"""index.json: what is in a folder of shards, and what made it. Pure, no torch.

The index is small whatever the size of the data: one entry a shard. The offsets of the samples are in
the table of contents of each shard, which is read when the shard is first needed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.recipe import is_url
from flux2_ds.data.storage import Blob, join
from flux2_ds.errors import MALFORMED, OutageError, UserError, counted
from flux2_ds.run.atomic import atomic_write_text

FORMAT = 4
OLDER = "an older version of flux2-ds wrote it, whose form this one does not read"
INDEX_NAME = "index.json"
CONDITIONING_NAME = "conditioning.safetensors"
"""Latent statistics (`latent_mean`, `latent_std`: [128] fp32) and the encoded empty caption
(`empty_text`: [512, text width])."""
PROMPTS_NAME = "prompts.safetensors"
"""The encoded preview prompts, by prompt: [512, text width] each."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a file, and the XXH3 (128 bits, hex) that they have."""

    offset: int
    size: int
    xxh3: str

    @property
    def end(self) -> int:
        """Offset of the first byte after them."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: its bucket, number of samples, size in bytes and sha256.

    `source` names the images that it was made of, as in `data.images`. `dropped`: rows of the file that are no longer
    part of the data; `samples` does not count them. `masks`: rows of the file with a mask. `texts`: different texts in
    the file, of `text_bytes` together, and `latents`: views of all images in the file. `repeats`: times that an epoch
    serves each sample. `toc`: the table of contents. `held_out`: not trained on, but evaluated.
    """

    name: str
    bucket: Bucket
    samples: int
    size: int
    sha256: str
    source: str = ""
    dropped: list[int] = field(default_factory=list)
    masks: int = 0
    toc: Part = Part(0, 0, "")
    held_out: bool = False
    texts: int = 0
    text_bytes: int = 0
    latents: int = 0
    repeats: int = 1

    @classmethod
    def of(cls, values: dict[str, Any]) -> Shard:
        """A shard from its JSON values."""
        return cls(
            **{**values, "bucket": Bucket.of(values["bucket"]), "toc": Part(**values["toc"])}
        )


@dataclass(frozen=True)
class Index:
    """All shards of a data set.

    `fingerprint` maps each part that shaped the samples (VAE, text encoder, tokenizer, pipeline) to
    a digest; see `config/model_files.py`. `settings`: the data settings that decided how images were cropped.
    `conditioning`: all of conditioning.safetensors. `text_dtype`: of captions.
    """

    variant: str
    text_width: int
    fingerprint: dict[str, str]
    settings: dict[str, Any]
    shards: list[Shard] = field(default_factory=list)
    conditioning: Part = Part(0, 0, "")
    text_dtype: str = ""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def largest_tokens(self) -> int:
        """Image tokens of the longest sample, reference images included."""
        return max(shard.bucket.all_tokens for shard in self.shards)

    def stored_lines(self) -> list[str]:
        """How many images and texts are stored, and how large, for people."""
        latents, texts, size, total = (
            sum(getattr(shard, name) for shard in self.shards)
            for name in ("latents", "texts", "text_bytes", "size")
        )
        rows = sum(shard.samples + len(shard.dropped) for shard in self.shards)
        crops = " with crops and flips" if latents > rows else ""
        line = f"stored: {counted(latents, 'image')}{crops}, {counted(texts, 'text')} of {size / 1e9:.2f} GB; {total / 1e9:.2f} GB in all"
        return [line] * bool(texts)

    @property
    def digest(self) -> str:
        """Names these samples: another content or order has another digest."""
        digest = hashlib.sha256(self.conditioning.xxh3.encode())
        for shard in self.shards:
            facts = f"{shard.sha256}|{shard.samples}|{shard.dropped}|{shard.source}"
            facts += f"|{shard.repeats}" * (shard.repeats != 1)
            digest.update(f"{facts}\n".encode())
        return digest.hexdigest()[:16]

    def part(self, *, held_out: bool) -> Index:
        """The shards to evaluate on, or those to train on."""
        return replace(self, shards=[s for s in self.shards if s.held_out == held_out])

    def bucket_counts(self) -> dict[Bucket, int]:
        """Samples in each bucket, sorted by bucket."""
        counts: Counter[Bucket] = Counter()
        for shard in self.shards:
            counts[shard.bucket] += shard.samples
        return dict(sorted(counts.items()))


def write_index(directory: Path, index: Index) -> Path:
    """Write `index` to `directory`/index.json, atomically."""
    path = directory / INDEX_NAME
    atomic_write_text(path, index_json(index))
    return path


def index_json(index: Index) -> str:
    """The contents of index.json: all fields, and the sha256 of them."""
    values = {"format": FORMAT, **asdict(index)}
    return json.dumps({**values, "sha256": _sha256(values)}, indent=1) + "\n"


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_prepared(folder: str) -> bool:
    """Whether a folder has an index; a URL is believed to have one until it is read."""
    return is_url(folder) or (Path(folder) / INDEX_NAME).is_file()


def read_index(folder: str | Path, setting: str = "data.shards") -> Index:
    """Read index.json; on disk also check that every shard is there with its size. `setting` names the
    folder in the recipe, for the errors."""
    folder = str(folder)
    path = join(folder, INDEX_NAME)
    if not is_prepared(folder):
        raise UserError(
            f"{setting} {folder} has no {INDEX_NAME}. Run `flux2-ds prepare` with "
            f"{'this recipe' if setting == 'data.shards' else 'data.shards set to that folder'} first."
        )
    index = parse_index(Blob(path).read(), path)
    if not is_url(folder):
        _check_files(Path(folder), index)
    return index


def encoded_prompts(folder: str) -> set[str]:
    """The preview prompts of a folder of shards, by the header of their file; none if there is no file."""
    path = join(folder, PROMPTS_NAME)
    try:
        size = int.from_bytes(Blob(path, 0, 8).read(), "little")
        header: dict[str, Any] = json.loads(Blob(path, 8, size).read())
        return header.keys() - {"__metadata__"}
    except OutageError:
        raise
    except UserError:
        return set()
    except MALFORMED as error:
        raise UserError(
            f"{path} is damaged ({error}). Remove it and run `flux2-ds prepare` again, which writes it anew."
        ) from error


def parse_index(content: bytes, path: str) -> Index:
    """The index in the contents of index.json; `path` is for the errors."""
    try:
        value: dict[str, Any] = json.loads(content)
        found = value.get("format")
        if found != FORMAT:
            raise UserError(
                f"{path} has format {found}, this version of flux2-ds reads {FORMAT}. Prepare the shards again."
            )
        if value.pop("sha256", None) != _sha256(value):
            raise ValueError("it does not have its sha256")
        value["shards"] = [Shard.of(item) for item in value["shards"]]
        value["conditioning"] = Part(**value["conditioning"])
        del value["format"]
        index = Index(**value)
    except MALFORMED as error:
        raise UserError(f"{path} is damaged ({error!r}). Prepare the shards again.") from error
    if not index.samples:
        raise UserError(f"{path} lists no samples. Prepare the shards again.")
    return index


def _check_files(folder: Path, index: Index) -> None:
    if not (folder / CONDITIONING_NAME).is_file():
        raise UserError(
            f"{folder / CONDITIONING_NAME} is missing. Copy it from where the shards were "
            "prepared, or prepare them again."
        )
    for shard in index.shards:
        file = folder / shard.name
        if not file.is_file():
            raise UserError(
                f"shard {file} is missing, which {INDEX_NAME} lists. Copy it, or prepare the shards again."
            )
        size = file.stat().st_size
        if size != shard.size:
            raise UserError(
                f"shard {file} has {size} bytes, {INDEX_NAME} says {shard.size}: "
                "the copy is incomplete. Copy it again or prepare the shards again."
            )
