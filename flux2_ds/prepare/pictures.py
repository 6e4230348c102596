"""Pictures to latents, and whole shards of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from numpy.typing import NDArray

from flux2_ds.config.recipe import Prepare, is_url
from flux2_ds.data.images import (
    UnreadableImageError,
    image_size,
    load_cropped,
    load_mask,
    load_reference,
)
from flux2_ds.data.shards import Record, write_shard
from flux2_ds.errors import OutageError, UserError
from flux2_ds.model import latents
from flux2_ds.prepare.manifest import Job, Note, Row, caption_digest, write_note
from flux2_ds.prepare.source_images import Picture
from flux2_ds.prepare.texts import TextFiles

Item = TypeVar("Item")


@dataclass(frozen=True)
class Decoded:
    """A cropped picture with its companions, or the reason why there is none."""

    picture: Picture
    pixels: NDArray[np.uint8] | None
    sha256: str = ""
    reason: str = ""
    passing: bool = False
    """Whether the reason may be gone at the next start."""
    mask: NDArray[np.float32] | None = None
    references: tuple[NDArray[np.uint8], ...] = ()


class PictureWorker:
    """Writes shards: decodes, crops and encodes their pictures."""

    def __init__(
        self,
        directory: Path,
        settings: Prepare,
        texts: TextFiles,
        folder: Path,
        device: torch.device,
    ) -> None:
        self._vae = load_vae(directory, settings, device)
        self._settings, self._texts, self._folder = settings, texts, folder

    def __call__(self, job: Job, tick: Callable[[int], Any]) -> Note:
        """Write one shard and its note."""
        rows: list[Row] = []
        skipped: dict[str, tuple[str, str]] = {}
        shard = write_shard(
            self._folder / job.name,
            job.bucket,
            self._records(job, rows, skipped, tick),
            self._texts.read,
            job.source,
        )
        note = Note(replace(shard, held_out=job.held_out), rows, skipped)
        write_note(self._folder, note)
        return note

    def _records(
        self,
        job: Job,
        rows: list[Row],
        skipped: dict[str, tuple[str, str]],
        tick: Callable[[int], Any],
    ) -> Iterator[Record]:
        """Encode the pictures of a shard; notes those that become a row and those that do not."""
        for batch in self._batches(job.pictures):
            readable: list[Decoded] = []
            for decoded in batch:
                entry = decoded.picture.entry
                if decoded.pixels is None:
                    stamp = "" if decoded.passing else entry.stamp
                    skipped[entry.key] = (stamp, decoded.reason)
                    continue
                digest = caption_digest(decoded.picture.caption)
                rows.append(Row(entry.key, entry.stamp, decoded.sha256, digest))
                readable.append(decoded)
            if readable:
                encoded = self._encode(
                    [each.pixels for each in readable if each.pixels is not None]
                )
                for decoded, latent in zip(readable, encoded, strict=True):
                    yield Record(
                        decoded.picture.entry.key,
                        decoded.picture.caption,
                        latent,
                        None if decoded.mask is None else torch.from_numpy(decoded.mask),
                        [self._encode([pixels])[0] for pixels in decoded.references],
                    )
            tick(len(batch))

    def _encode(self, pictures: list[NDArray[np.uint8]]) -> torch.Tensor:
        return latents.encode(self._vae, torch.from_numpy(np.stack(pictures))).cpu()

    def _batches(self, pictures: list[Picture]) -> Iterator[list[Decoded]]:
        """Decoded batches in order; threads decode the next while one is encoded."""
        batches = list(in_chunks(pictures, self._settings.image_batch_size))
        resolution = self._settings.reference_resolution
        ahead = 1 + -(-self._settings.decode_threads // self._settings.image_batch_size)
        with ThreadPoolExecutor(self._settings.decode_threads) as threads:
            waiting = [
                [threads.submit(decode, p, resolution) for p in batch] for batch in batches[:ahead]
            ]
            for number in range(len(batches)):
                futures = waiting.pop(0)
                yield [future.result() for future in futures]
                if number + ahead < len(batches):
                    coming = batches[number + ahead]
                    waiting.append([threads.submit(decode, p, resolution) for p in coming])


def decode(picture: Picture, reference_resolution: int | None = None) -> Decoded:
    """Read a picture and crop it to its bucket; with a reference resolution its companions, too."""
    entry, mask = picture.entry, None
    references: tuple[NDArray[np.uint8], ...] = ()
    try:
        content = entry.blob.read()
        pixels = load_cropped(content, picture.bucket)
        if reference_resolution is not None:
            if entry.mask is not None:
                mask = load_mask(entry.mask.read(), image_size(content), picture.bucket)
            references = tuple(
                load_reference(blob.read(), reference_resolution) for blob in entry.references
            )
    except UnreadableImageError as error:
        return Decoded(picture, None, reason=f"unreadable: {error}")
    except UserError as error:
        if is_url(entry.blob.location) or isinstance(error, OutageError):
            raise  # the store is away, or the disk fails: the next picture would be lost, too
        return Decoded(picture, None, reason=f"unreadable: {error}", passing=True)
    digest = hashlib.sha256(content).hexdigest()
    return Decoded(picture, pixels, digest, mask=mask, references=references)


def load_vae(directory: Path, settings: Prepare, device: torch.device) -> AutoencoderKLFlux2:
    """The VAE with the recipe's precision, slicing and tiling."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.vae_precision]
    vae = AutoencoderKLFlux2.from_pretrained(
        directory, subfolder="vae", dtype=dtype, use_safetensors=True
    ).to(device)
    if settings.vae_slicing:
        vae.enable_slicing()
    if settings.vae_tiling:
        vae.enable_tiling()
    return vae


def in_chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
