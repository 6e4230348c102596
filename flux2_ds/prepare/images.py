"""Images to latents, and shards of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

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
from flux2_ds.model import latents, pipeline
from flux2_ds.prepare.captions import CaptionFiles
from flux2_ds.prepare.manifest import Manifest, Row, texts_digest, write_manifest
from flux2_ds.prepare.plan import ShardJob
from flux2_ds.prepare.source_images import PlannedImage

Item = TypeVar("Item")


@dataclass(frozen=True)
class Decoded:
    """A cropped image with its mask and references, or the reason why there is none."""

    planned: PlannedImage
    pixels: NDArray[np.uint8] | None
    sha256: str = ""
    reason: str = ""
    may_pass: bool = False
    """Whether the reason may be gone at the next start."""
    mask: NDArray[np.float32] | None = None
    references: tuple[NDArray[np.uint8], ...] = ()
    notes: tuple[str, ...] = ()


class ShardWriter:
    """Writes shards: decodes, crops and encodes their images. Calls `done` with the size of every batch."""

    def __init__(
        self,
        vae: AutoencoderKLFlux2,
        settings: Prepare,
        captions: CaptionFiles,
        folder: Path,
        done: Callable[[int], None],
    ) -> None:
        self._vae, self._settings, self._captions = vae, settings, captions
        self._folder, self._done = folder, done

    def write(self, job: ShardJob) -> Manifest:
        """Write one shard and its manifest."""
        rows: list[Row] = []
        skipped: dict[str, tuple[str, str]] = {}
        records = self._records(job, rows, skipped)
        path = self._folder / job.name
        shard = write_shard(path, job.bucket, records, self._captions.read, job.source)
        manifest = Manifest(replace(shard, held_out=job.held_out), rows, skipped)
        write_manifest(self._folder, manifest)
        return manifest

    def _records(
        self, job: ShardJob, rows: list[Row], skipped: dict[str, tuple[str, str]]
    ) -> Iterator[Record]:
        """Encode the images of a shard; add those that become a row and those that do not."""
        for batch in self._batches(job.images):
            readable: list[Decoded] = []
            for decoded in batch:
                image = decoded.planned.image
                if decoded.pixels is None:
                    skipped[image.key] = ("" if decoded.may_pass else image.stamp, decoded.reason)
                    continue
                digest = texts_digest(image.captions)
                rows.append(Row(image.key, image.stamp, decoded.sha256, digest, decoded.notes))
                readable.append(decoded)
            pixels = [each.pixels for each in readable if each.pixels is not None]
            encoded = list(self._encode(pixels)) if pixels else []
            for decoded, latent in zip(readable, encoded, strict=True):
                yield Record(
                    decoded.planned.image.key,
                    decoded.planned.image.captions,
                    latent,
                    None if decoded.mask is None else torch.from_numpy(decoded.mask),
                    [self._encode([reference])[0] for reference in decoded.references],
                )
            self._done(len(batch))

    def _encode(self, images: list[NDArray[np.uint8]]) -> torch.Tensor:
        return latents.encode(self._vae, torch.from_numpy(np.stack(images))).cpu()

    def _batches(self, images: list[PlannedImage]) -> Iterator[list[Decoded]]:
        """Decoded batches in order; threads decode the next while one is encoded."""
        batches = list(in_chunks(images, self._settings.image_batch_size))
        resolution = self._settings.reference_resolution
        ahead = 1 + -(-self._settings.decode_threads // self._settings.image_batch_size)
        with ThreadPoolExecutor(self._settings.decode_threads) as threads:
            waiting = [
                [threads.submit(decode, each, resolution) for each in batch]
                for batch in batches[:ahead]
            ]
            for number in range(len(batches)):
                futures = waiting.pop(0)
                yield [future.result() for future in futures]
                if number + ahead < len(batches):
                    coming = batches[number + ahead]
                    waiting.append([threads.submit(decode, each, resolution) for each in coming])


def decode(planned: PlannedImage, reference_resolution: int | None = None) -> Decoded:
    """Read an image and crop it to its bucket; with a reference resolution its mask and references, too."""
    image, mask = planned.image, None
    references: tuple[NDArray[np.uint8], ...] = ()
    notes: list[str] = []
    try:
        content = image.blob.read()
        pixels = load_cropped(content, planned.bucket, notes)
        if reference_resolution is not None:
            size = image_size(content)
            if image.mask is not None:
                mask = load_mask(image.mask.read(), size, planned.bucket)
            references = tuple(
                load_reference(blob.read(), reference_resolution, size, planned.bucket, notes)
                for blob in image.references
            )
    except UnreadableImageError as error:
        return Decoded(planned, None, reason=f"unreadable: {error}")
    except UserError as error:
        if is_url(image.blob.location) or isinstance(error, OutageError):
            raise  # the store is away, or the disk fails: the next image would be lost, too
        return Decoded(planned, None, reason=f"unreadable: {error}", may_pass=True)
    digest = hashlib.sha256(content).hexdigest()
    unique = tuple(dict.fromkeys([*planned.notes, *notes]))
    return Decoded(planned, pixels, digest, mask=mask, references=references, notes=unique)


def load_vae(directory: Path, settings: Prepare, device: torch.device) -> AutoencoderKLFlux2:
    """The VAE with the recipe's precision, slicing and tiling."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.vae_precision]
    vae = pipeline.load_vae(directory, dtype).to(device)
    if settings.vae_slicing:
        vae.enable_slicing()
    if settings.vae_tiling:
        vae.enable_tiling()
    return vae


def in_chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
