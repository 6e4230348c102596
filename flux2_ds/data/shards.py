"""Shards: ordinary WebDataset tars of one resolution each.

Members of a sample, all with the key as stem:

    latent.safetensors  `latent` [32, H/8, W/8] fp32: mean of the VAE's posterior, before patchifying
                        and normalising
    text.safetensors    `text` [512, text width]: the encoded caption, in the encoder's dtype
    mask.safetensors    `mask` [H/16, W/16] fp32: weights of the loss, if the picture has a mask
    references.safetensors  `0`, `1`, ...: reference images as latents, each of its own size, if any
    json                caption, source file, bucket, and `text_key`: the sample whose text it shares

A caption that recurs in a shard is stored once, with its first sample: text is most of a sample's
bytes (15.7 of 17.8 MB for FLUX.2-dev at 1024²). Every shard stands alone. Latents stay fp32 because
they are small beside the text.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import webdataset
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from flux2_ds.data.buckets import Bucket
from flux2_ds.data.index import Shard
from flux2_ds.errors import UserError

LATENT, TEXT, META = "latent.safetensors", "text.safetensors", "json"
MASK, REFERENCES = "mask.safetensors", "references.safetensors"


@dataclass(frozen=True)
class Record:
    """One sample on its way into a shard. `latent`, `references`: [32, H/8, W/8] fp32.
    `mask`: [H/16, W/16] fp32 in [0, 1]."""

    source: str
    caption: str
    latent: torch.Tensor
    mask: torch.Tensor | None = None
    references: Sequence[torch.Tensor] = ()


def write_shard(
    path: Path,
    bucket: Bucket,
    records: Iterable[Record],
    text_of: Callable[[str], torch.Tensor],
    source: str = "",
) -> Shard:
    """Write one shard; it appears whole or not at all. `text_of` gives a caption's [512, D]."""
    partial = path.with_suffix(".partial")
    try:
        facts = _write_tar(partial, bucket, records, text_of)
        shard = Shard(path.name, bucket, size=partial.stat().st_size, source=source, **facts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # above all when the disk is full
    return shard


def _write_tar(
    path: Path, bucket: Bucket, records: Iterable[Record], text_of: Callable[[str], torch.Tensor]
) -> dict[str, Any]:
    """Write a tar; returns the facts of `Shard` that its contents decide."""
    text_keys: dict[str, str] = {}
    count = masks = 0
    references = set()
    with path.open("wb") as stream:
        # encoder=False: members are bytes already. mtime=0: the same input makes the same file.
        with webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
            for count, record in enumerate(records, start=1):
                key = f"{count - 1:08d}"
                members = {
                    "__key__": key,
                    LATENT: save_tensors({"latent": record.latent.contiguous()}),
                }
                if record.mask is not None:
                    masks += 1
                    members[MASK] = save_tensors({"mask": record.mask.contiguous()})
                if record.references:
                    tensors = {
                        str(k): each.contiguous() for k, each in enumerate(record.references)
                    }
                    members[REFERENCES] = save_tensors(tensors)
                references.add(_sizes(record.references))
                if record.caption not in text_keys:
                    text_keys[record.caption] = key
                    members[TEXT] = save_tensors({"text": text_of(record.caption).contiguous()})
                meta = {
                    "caption": record.caption,
                    "source": record.source,
                    "height": bucket.height,
                    "width": bucket.width,
                    "text_key": text_keys[record.caption],
                }
                members[META] = json.dumps(meta, ensure_ascii=False).encode()
                tar.write(members)
        stream.flush()
        os.fsync(stream.fileno())
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    sizes = references.pop() if len(references) == 1 else "several" if references else ""
    return {"samples": count, "sha256": sha256, "masks": masks, "references": sizes}


def _sizes(references: Sequence[torch.Tensor]) -> str:
    """Sizes of reference images in px, such as 1024x768,512x512."""
    return ",".join(f"{8 * each.shape[-1]}x{8 * each.shape[-2]}" for each in references)


class ShardReader:
    """Random access to the samples of one shard on a local disk.

    The tar headers are read once, by seeking; a sample is then two or three reads. Rows in `dropped`
    are not counted.
    """

    def __init__(self, path: Path, dropped: Iterable[int] = ()) -> None:
        self._path = path
        self._members: dict[str, tuple[int, int]] = {}
        try:
            self._file = path.open("rb")
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for member in tar:
                    self._members[member.name] = (member.offset_data, member.size)
        except (OSError, tarfile.TarError) as error:
            raise UserError(
                f"shard {path} cannot be read ({error}). Copy it again or prepare the shards again."
            ) from error
        keys = [name.split(".", 1)[0] for name in self._members if name.endswith(f".{META}")]
        gone = set(dropped)
        self._keys = [key for row, key in enumerate(keys) if row not in gone]

    def meta(self, row: int) -> dict[str, Any]:
        """Caption, source and the rest of the sample's JSON."""
        value: dict[str, Any] = json.loads(self._read(f"{self._key(row)}.{META}"))
        return value

    def latent(self, row: int) -> torch.Tensor:
        """[32, H/8, W/8] fp32."""
        return load_tensors(self._read(f"{self._key(row)}.{LATENT}"))["latent"]

    def text(self, row: int) -> torch.Tensor:
        """[512, text width]."""
        return load_tensors(self._read(f"{self.meta(row)['text_key']}.{TEXT}"))["text"]

    def mask(self, row: int) -> torch.Tensor | None:
        """[H/16, W/16] fp32 in [0, 1], or None if the sample has none."""
        name = f"{self._key(row)}.{MASK}"
        return load_tensors(self._read(name))["mask"] if name in self._members else None

    def references(self, row: int) -> list[torch.Tensor]:
        """Reference images, [32, h, w] fp32 each."""
        name = f"{self._key(row)}.{REFERENCES}"
        if name not in self._members:
            return []
        tensors = load_tensors(self._read(name))
        return [tensors[str(k)] for k in range(len(tensors))]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _key(self, row: int) -> str:
        if row >= len(self._keys):
            raise UserError(
                f"shard {self._path} has {len(self._keys)} samples, index.json counts more. Copy it "
                "again or prepare the shards again."
            )
        return self._keys[row]

    def _read(self, name: str) -> bytes:
        if name not in self._members:
            raise UserError(f"shard {self._path} has no member {name}. Prepare the shards again.")
        offset, size = self._members[name]
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise UserError(
                f"shard {self._path}: member {name} ends after {len(data)} of {size} bytes. "
                "Copy it again or prepare the shards again."
            )
        return data
