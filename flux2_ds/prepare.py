"""Prepare: photographs and captions in, WebDataset shards of latents and text embeddings out.

    flux2-ds prepare --config recipes/h100x1.yaml

First every distinct caption is encoded, then the text encoder is freed and the VAE encodes the
pictures, so that both are never in memory together. Finished shards and captions are not encoded
again: a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from flux2_ds.data.buckets import Bucket, bucket_table, choose_bucket, upscale_factor
from flux2_ds.data.images import (
    Photo,
    UnreadableImageError,
    contact_sheet,
    find_photos,
    image_size,
    load_cropped,
)
from flux2_ds.data.index import CONDITIONING_NAME, INDEX_NAME, Index, Shard, read_index, write_index
from flux2_ds.data.shards import Record, write_shard
from flux2_ds.errors import UserError, run_root
from flux2_ds.model import latents
from flux2_ds.model.files import fingerprint, model_directory
from flux2_ds.model.text import TextEncoder
from flux2_ds.plan import check_ranges
from flux2_ds.recipe import Data, Recipe, parse_recipe, recipe_parser
from flux2_ds.spec import TEXT_TOKENS, Spec, read_spec
from flux2_ds.tensors import write_tensors

log = logging.getLogger("flux2_ds")

CONTENT_NAME, REPORT_NAME, SHEET_NAME = "content.json", "report.json", "contact_sheet.jpg"
CROP_SETTINGS = ("resolution", "bucket_step", "max_aspect", "max_upscale")
"""The data settings that decide which part of a picture is trained on, and how large."""
_SHEET_PICTURES = 64

Item = TypeVar("Item")


@dataclass(frozen=True)
class Captioned:
    """A readable picture with its caption and bucket."""

    path: Path
    caption: str
    bucket: Bucket


@dataclass
class Skipped:
    """Pictures left out, with the reason; said at once and again in the report."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, path: Path, reason: str) -> None:
        """Note and say that `path` is left out."""
        self.reasons[str(path)] = reason
        log.warning("skipped %s: %s", path, reason)


def main() -> None:
    """Entry point of `flux2-ds prepare`."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    recipe, _ = parse_recipe(
        recipe_parser("flux2-ds prepare", "Encode photographs and captions into shards.")
    )
    check_ranges(recipe)
    torch.backends.cudnn.allow_tf32 = False  # fp32 encoding means fp32 on a GPU too
    directory = model_directory(
        recipe.model.path, recipe.model.revision, ["vae", "text_encoder", "tokenizer", "scheduler"]
    )
    prepare(recipe, directory, read_spec(directory, allow_distilled=True))


def prepare(recipe: Recipe, directory: Path, spec: Spec) -> Index:
    """Write the shards, index.json, report.json and a contact sheet; returns the index."""
    data, shards = recipe.data, Path(recipe.data.shards)
    skipped = Skipped()
    photos = read_photos(data, skipped)
    prints = fingerprint(directory)
    claim(shards, photos, recipe, prints)
    if (shards / INDEX_NAME).is_file():
        remove_scratch(shards)
        log.info("%s is already prepared from these pictures with this model", shards)
        return read_index(shards)
    groups = group_by_shard(photos, data.samples_per_shard)
    say_buckets(photos)

    device = torch.device(recipe.launch.accelerator)
    texts = shards / ".texts"
    encode_texts(recipe, directory, spec, sorted({"", *(p.caption for p in photos)}), texts, device)
    vae = AutoencoderKLFlux2.from_pretrained(
        directory, subfolder="vae", dtype=torch.float32, use_safetensors=True
    ).to(device)
    mean, std = latents.statistics(vae)
    write_tensors(
        shards / CONDITIONING_NAME,
        {"latent_mean": mean, "latent_std": std, "empty_text": read_text(texts, "")},
    )
    written = []
    with tqdm(total=len(photos), desc="pictures", unit="img") as progress:
        for name, bucket, group in groups:
            shard = finished_shard(shards, name, skipped)
            if shard is None:
                records = encode_pictures(vae, group, bucket, data.image_batch, skipped)
                shard = write_shard(
                    shards / name, bucket, records, lambda caption: read_text(texts, caption)
                )
                note_finished(shards, shard, skipped, group)
            progress.update(len(group))
            written.append(shard)
    settings = {name: getattr(data, name) for name in CROP_SETTINGS}
    kept = [shard for shard in written if shard.samples]
    index = Index(spec.variant, spec.text_width, prints, settings, kept)
    if not index.samples:
        raise UserError(
            f"none of the pictures in data.images {data.images} can be used; see above."
        )
    finish(shards, index, photos, skipped)
    return index


def read_photos(data: Data, skipped: Skipped) -> list[Captioned]:
    """All usable pictures with caption and bucket, sorted by path.

    Raises:
        UserError: no pictures, or one without a caption with `missing_caption: error`.
    """
    found = find_photos(Path(data.images))
    bare = [photo.path for photo in found if photo.caption is None]
    if bare and data.missing_caption == "error":
        raise UserError(
            f"{len(bare)} of {len(found)} pictures have no caption, the first is {bare[0]} (no text "
            f"in {bare[0].with_suffix('.txt').name}). Write the captions, or set "
            "data.missing_caption to skip or fixed."
        )
    table = bucket_table(data.resolution, data.bucket_step, data.max_aspect)
    usable = []
    for photo in found:
        caption = photo.caption
        if caption is None and data.missing_caption == "skip":
            skipped.add(photo.path, "no caption")
            continue
        bucket = bucket_of(photo, table, data.max_upscale, skipped)
        if bucket is not None:
            usable.append(Captioned(photo.path, caption or data.fixed_caption, bucket))
    if not usable:
        raise UserError(
            f"none of the pictures in data.images {data.images} can be used; see above."
        )
    return usable


def bucket_of(
    photo: Photo, table: list[Bucket], max_upscale: float, skipped: Skipped
) -> Bucket | None:
    """The bucket of a picture, or None if it is unreadable or too small."""
    try:
        width, height = image_size(photo.path)
    except UnreadableImageError as error:
        skipped.add(photo.path, f"unreadable: {error}")
        return None
    bucket = choose_bucket(width, height, table)
    factor = upscale_factor(width, height, bucket)
    if factor > max_upscale:
        skipped.add(
            photo.path,
            f"{width}x{height} px must be enlarged {factor:.2f}× for bucket {bucket}; "
            f"data.max_upscale is {max_upscale:g}",
        )
        return None
    return bucket


def claim(shards: Path, photos: list[Captioned], recipe: Recipe, prints: dict[str, str]) -> None:
    """Make the output folder, or check that it is from the same pictures, settings and model.

    Raises:
        UserError: the folder holds something else; nothing in it is touched.
    """
    data = recipe.data
    listing = [
        f"{p.path.relative_to(data.images)}|{p.path.stat().st_size}|{p.path.stat().st_mtime_ns}|"
        f"{p.caption}|{p.bucket}"
        for p in photos
    ]
    content = {
        "pictures": hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16],
        "settings": {name: getattr(data, name) for name in (*CROP_SETTINGS, "samples_per_shard")},
        "text precision": str(text_dtype(recipe)),
        "model": prints,
    }
    path = shards / CONTENT_NAME
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [name for name in content if before.get(name) != content[name]]
        if changed:
            raise UserError(
                f"data.shards {shards} was prepared from something else (changed: "
                f"{', '.join(changed)}). Give a new folder, or remove this one."
            )
        return
    ours = path.with_name(f"{path.name}.partial")  # all that a kill right here can leave
    if shards.exists() and any(found != ours for found in shards.iterdir()):
        raise UserError(
            f"data.shards {shards} is not empty and was not made by prepare. Give a new folder."
        )
    shards.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")


def group_by_shard(
    photos: list[Captioned], samples_per_shard: int
) -> list[tuple[str, Bucket, list[Captioned]]]:
    """(file name, bucket, pictures) of every shard."""
    by_bucket: dict[Bucket, list[Captioned]] = {}
    for photo in photos:
        by_bucket.setdefault(photo.bucket, []).append(photo)
    return [
        (f"{bucket}-{number:05d}.tar", bucket, list(group))
        for bucket, members in sorted(by_bucket.items())
        for number, group in enumerate(in_chunks(members, samples_per_shard))
    ]


def encode_texts(
    recipe: Recipe,
    directory: Path,
    spec: Spec,
    captions: list[str],
    texts: Path,
    device: torch.device,
) -> None:
    """Encode every caption that has no file in `texts` yet, then free the encoder."""
    texts.mkdir(exist_ok=True)
    missing = [caption for caption in captions if not text_path(texts, caption).is_file()]
    if not missing:
        return
    encoder = TextEncoder(directory, spec, text_dtype(recipe), device)
    with tqdm(total=len(missing), desc="captions", unit="txt") as progress:
        for chunk in in_chunks(missing, recipe.data.text_batch):
            embeddings = encoder.encode(list(chunk))
            if embeddings.shape[1:] != (TEXT_TOKENS, spec.text_width):
                raise UserError(
                    f"the text encoder in {directory} gives embeddings of shape "
                    f"{tuple(embeddings.shape[1:])}, the transformer takes "
                    f"{(TEXT_TOKENS, spec.text_width)}: they are of different models."
                )
            for caption, embedding in zip(chunk, embeddings, strict=True):
                path = text_path(texts, caption)
                partial = path.with_suffix(".partial")
                write_tensors(partial, {"text": embedding})
                partial.replace(path)
            progress.update(len(chunk))
    del encoder
    if device.type == "cuda":
        torch.cuda.empty_cache()


def encode_pictures(
    vae: AutoencoderKLFlux2,
    group: list[Captioned],
    bucket: Bucket,
    batch_size: int,
    skipped: Skipped,
) -> Iterator[Record]:
    """Decode, crop and encode the pictures of one shard."""
    for chunk in in_chunks(group, batch_size):
        readable: list[tuple[Captioned, NDArray[np.uint8]]] = []
        for photo in chunk:
            try:
                readable.append((photo, load_cropped(photo.path, bucket)))
            except UnreadableImageError as error:
                skipped.add(photo.path, f"unreadable: {error}")
        if readable:
            pictures = torch.from_numpy(np.stack([pixels for _, pixels in readable]))
            for (photo, _), latent in zip(readable, latents.encode(vae, pictures), strict=True):
                yield Record(photo.path.name, photo.caption, latent.cpu())


def finish(shards: Path, index: Index, photos: list[Captioned], skipped: Skipped) -> None:
    """Write the contact sheet, the report and, last, the index; remove the scratch files."""
    sheet = write_contact_sheet(shards / SHEET_NAME, photos, skipped)
    report = {
        "samples": index.samples,
        "buckets": {str(bucket): count for bucket, count in index.bucket_counts().items()},
        "captions": len({photo.caption for photo in photos}),
        "skipped": skipped.reasons,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_whole(shards / REPORT_NAME, text)
    path = write_index(shards, index)
    remove_scratch(shards)
    log.info(
        "%d samples in %d shards, %d pictures skipped: %s, %s, %s",
        index.samples,
        len(index.shards),
        len(skipped.reasons),
        path,
        shards / REPORT_NAME,
        sheet,
    )


def write_contact_sheet(path: Path, photos: list[Captioned], skipped: Skipped) -> Path:
    """The first pictures as they were cropped, at most 192 px a side."""
    usable = [photo for photo in photos if str(photo.path) not in skipped.reasons]
    pictures = []
    for photo in usable[:_SHEET_PICTURES]:
        small = Image.fromarray(load_cropped(photo.path, photo.bucket))
        small.thumbnail((192, 192))
        pictures.append(np.asarray(small))
    contact_sheet(pictures).save(path, quality=88)
    return path


def say_buckets(photos: list[Captioned]) -> None:
    """Log how many pictures go to each bucket."""
    counts = Counter(photo.bucket for photo in photos)
    log.info("%d pictures in %d buckets:", len(photos), len(counts))
    for bucket, count in sorted(counts.items()):
        log.info("  %-10s %6d  (%d tokens)", bucket, count, bucket.tokens)


def finished_shard(shards: Path, name: str, skipped: Skipped) -> Shard | None:
    """The facts of a shard that an earlier, unfinished run completed; restores what it skipped."""
    note = shards / ".finished" / f"{name}.json"
    if not note.is_file():
        return None
    facts = json.loads(note.read_text())
    skipped.reasons |= facts["skipped"]
    return Shard(**{**facts["shard"], "bucket": Bucket(**facts["shard"]["bucket"])})


def note_finished(shards: Path, shard: Shard, skipped: Skipped, group: list[Captioned]) -> None:
    """Remember that a shard is complete, and which of its pictures were left out."""
    note = shards / ".finished" / f"{shard.name}.json"
    note.parent.mkdir(exist_ok=True)
    names = {str(photo.path) for photo in group}
    left_out = {name: reason for name, reason in skipped.reasons.items() if name in names}
    write_whole(note, json.dumps({"shard": asdict(shard), "skipped": left_out}))


def remove_scratch(shards: Path) -> None:
    """Remove what only an unfinished run needs."""
    for scratch in (".texts", ".finished"):
        shutil.rmtree(shards / scratch, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def text_dtype(recipe: Recipe) -> torch.dtype:
    """The text encoder's precision: bf16, in which it was trained, unless the recipe is fp32."""
    return torch.float32 if recipe.precision == "fp32" else torch.bfloat16


def text_path(texts: Path, caption: str) -> Path:
    """Where a caption's embedding waits for its shard."""
    return texts / f"{hashlib.sha256(caption.encode()).hexdigest()}.safetensors"


def read_text(texts: Path, caption: str) -> torch.Tensor:
    """The embedding of a caption, [512, text width]."""
    return load_file(text_path(texts, caption))["text"]


def in_chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


if __name__ == "__main__":
    run_root(main)
