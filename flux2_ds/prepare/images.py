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
    ALIGNED,
    OWN_SIZE,
    BlackMaskError,
    UnreadableImageError,
    image_size,
    is_aligned,
    load_alpha,
    load_cropped,
    load_mask,
    load_reference,
)
from flux2_ds.data.shards import Record, View, write_shard
from flux2_ds.errors import OutageError, UserError
from flux2_ds.model import latents, pipeline
from flux2_ds.prepare.captions import CaptionFiles
from flux2_ds.prepare.manifest import Manifest, Row, texts_digest, write_manifest
from flux2_ds.prepare.plan import ShardJob
from flux2_ds.prepare.source_images import PlannedImage

Item = TypeVar("Item")

ALPHA_MASK = "a mask of their transparency"
BLACK_CROPS = "crops whose mask is black all over, which are left out"
"""Notes on images that are used."""


@dataclass(frozen=True)
class Pixels:
    """One crop of an image, with its mask and references."""

    pixels: NDArray[np.uint8]
    mask: NDArray[np.float32] | None = None
    references: tuple[NDArray[np.uint8], ...] = ()

    def mirrored(self) -> Pixels:
        """All of it, left and right exchanged."""
        mask = None if self.mask is None else self.mask[:, ::-1].copy()
        pixels, *references = (each[:, ::-1].copy() for each in (self.pixels, *self.references))
        return Pixels(pixels, mask, tuple(references))


@dataclass(frozen=True)
class Decoded:
    """The crops of an image, or the reason why there is none."""

    planned: PlannedImage
    views: tuple[Pixels, ...] = ()
    sha256: str = ""
    reason: str = ""
    may_pass: bool = False
    """Whether the reason may be gone at the next start."""
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
        manifest = Manifest(
            replace(shard, held_out=job.held_out, repeats=job.repeats), rows, skipped
        )
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
                if not decoded.views:
                    skipped[image.key] = ("" if decoded.may_pass else image.stamp, decoded.reason)
                    continue
                digest = texts_digest(image.captions)
                rows.append(Row(image.key, image.stamp, decoded.sha256, digest, decoded.notes))
                readable.append(decoded)
            pixels = [view.pixels for each in readable for view in each.views]
            chunks = in_chunks(pixels, self._settings.image_batch_size)
            encoded = (latent for chunk in chunks for latent in self._encode(chunk))
            for decoded in readable:
                image = decoded.planned.image
                views = tuple(self._view(next(encoded), view) for view in decoded.views)
                yield Record(image.key, image.captions, views)
            self._done(len(batch))

    def _view(self, latent: torch.Tensor, view: Pixels) -> View:
        mask = None if view.mask is None else torch.from_numpy(view.mask)
        return View(latent, mask, [self._encode([each])[0] for each in view.references])

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
    image, notes = planned.image, list[str]()
    views, black = list[Pixels](), None
    try:
        content = image.blob.read()
        places = dict.fromkeys(crop.place for crop in planned.crops)
        for place in places:
            try:
                view = _crop(planned, content, reference_resolution, notes, place)
            except BlackMaskError as error:
                black = error
                notes.append(BLACK_CROPS)
                continue
            crops = (crop for crop in planned.crops if crop.place == place)
            views += [view.mirrored() if crop.flipped else view for crop in crops]
        if not views and black:
            raise black
    except UnreadableImageError as error:
        return Decoded(planned, reason=f"unreadable: {error}")
    except UserError as error:
        if is_url(image.blob.location) or isinstance(error, OutageError):
            raise  # the store is away, or the disk fails: the next image would be lost, too
        return Decoded(planned, reason=f"unreadable: {error}", may_pass=True)
    digest = hashlib.sha256(content).hexdigest()
    unique = tuple(dict.fromkeys([*planned.notes, *notes]))
    return Decoded(planned, tuple(views), digest, notes=unique)


def _crop(
    planned: PlannedImage, content: bytes, resolution: int | None, notes: list[str], place: float
) -> Pixels:
    image, bucket = planned.image, planned.bucket
    pixels = load_cropped(content, bucket, notes, place)
    if resolution is None:
        return Pixels(pixels)
    size, mask = image_size(content), None
    if image.mask is not None:
        mask = load_mask(image.mask.read(), size, bucket, place)
    elif planned.alpha_mask:
        mask = load_alpha(content, bucket, place)
        notes += [ALPHA_MASK] * (mask is not None)
    references = []
    for each, own in zip(image.references, bucket.references, strict=True):
        reference = each.blob.read()
        aligned = is_aligned(image_size(reference), size)
        notes.append(ALIGNED if aligned else OWN_SIZE)
        if aligned:
            references.append(load_cropped(reference, own, notes, place))
        else:
            references.append(load_reference(reference, own, resolution, notes))
    return Pixels(pixels, mask, tuple(references))


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
