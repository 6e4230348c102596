"""Which images are encoded, in which bucket and shard. No torch: what is wrong is said before it is imported."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flux2_ds.config.buckets import Bucket, bucket_table, choose_bucket, resolutions, upscale_factor
from flux2_ds.config.model_spec import PADDING_SIDES, PIXELS_PER_TOKEN, TEXT_TOKENS, Spec
from flux2_ds.config.recipe import DEFAULT_SOURCE, Data, Recipe
from flux2_ds.data.images import UnreadableImageError, image_size, reference_bucket
from flux2_ds.errors import UserError, counted
from flux2_ds.prepare.folder import (
    check_contents,
    check_folder,
    claim_contents,
    is_unused,
    text_weights,
)
from flux2_ds.prepare.manifest import (
    MANIFESTS,
    Comparison,
    Manifest,
    compare,
    made_of_others,
    read_manifests,
)
from flux2_ds.prepare.source_images import (
    Crop,
    PlannedImage,
    Skipped,
    SourceImage,
    Unused,
    printable,
)
from flux2_ds.prepare.sources import find_images
from flux2_ds.prepare.texts import check_trigger_words, texts_of

log = logging.getLogger("flux2_ds")

_NAMED = 5
_REPEATS = re.compile(r"(\d{1,3})_[^/]*/")
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_MUCH = 0.3
CROPPED = f"a crop that cuts away more than {_MUCH:.0%}"
NO_CAPTION = "no caption"
ENLARGED = "fewer pixels than the bucket, enlarged"
"""Notes on images that are used."""
_THREADS = 16  # reading a header is waiting, on network file systems above all


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written."""

    name: str
    source: str
    bucket: Bucket
    images: list[PlannedImage]
    held_out: bool = False
    repeats: int = 1


@dataclass(frozen=True)
class Plan:
    """What is there and what is to be done."""

    jobs: list[ShardJob]
    manifests: list[Manifest]
    """Of the shards that are finished."""
    images: list[PlannedImage]
    """To be encoded."""
    comparison: Comparison
    skipped: Skipped
    unused: Unused


@dataclass(frozen=True)
class Usable:
    """The images that can be used as far as their files' names and captions go, with their texts."""

    images: list[SourceImage]
    skipped: Skipped
    unused: Unused


def find_usable(recipe: Recipe) -> Usable:
    """Look for the images and their captions, and refuse what is wrong with them, all at once."""
    data, skipped = recipe.data, Skipped()
    scratch = check_folder(data.shards) / MANIFESTS / "tars"
    log.info("looking for images in %s", data.images)
    found, unused = find_images(data, scratch, own_folders(recipe))
    log.info("found %s", counted(len(found), "image"))
    if unused.files:
        log.warning(unused.line().strip())
    if not data.repeats_from_folders and (like := _repeats(found)):
        log.warning(
            "data.repeats_from_folders: true would serve %s as often as the name says",
            ", ".join(like),
        )
    return Usable(with_texts(with_captions(found, data, skipped), recipe), skipped, unused)


def plan_shards(recipe: Recipe, usable: Usable, spec: Spec, contents: dict[str, Any]) -> Plan:
    """Compare the images with the shards that there are, and plan the others."""
    data, folder = recipe.data, check_folder(recipe.data.shards)
    found, skipped = usable.images, usable.skipped
    if not is_unused(folder):
        check_contents(folder, contents)
    manifests = read_manifests(folder)
    comparison = compare(found, manifests)
    if not comparison.kept and made_of_others(found, manifests):
        raise UserError(
            f"data.shards {folder} was prepared from other images: none of data.images "
            f"{data.images} is among them. Give a new folder."
        )
    skipped.reasons |= comparison.skipped
    images = choose_buckets(comparison.new, recipe, skipped)
    sources = {planned.image.source for planned in (*images, *comparison.kept)}
    for source in {DEFAULT_SOURCE: ""} if isinstance(data.images, str) else data.images:
        if source not in sources:
            raise nothing_usable(
                data.images if isinstance(data.images, str) else data.images[source]
            )
    warn_of_flips(images)
    warn_of_validation([each.image for each in (*images, *comparison.kept)], data)
    claim_contents(folder, contents)
    jobs = group_into_shards(images, manifests, data)
    plan = Plan(jobs, manifests, images, comparison, skipped, usable.unused)
    log_plan(plan)
    check_disk(folder, plan.jobs, spec, recipe)
    return plan


def own_folders(recipe: Recipe) -> list[Path]:
    """Folders whose images are ours: contact sheets and previews."""
    data = recipe.data
    return [Path(each) for each in (data.shards, *data.more_shards.values(), recipe.run_dir)]


def nothing_usable(images: str) -> UserError:
    """The error that no image is left."""
    return UserError(f"none of the images in data.images {images} can be used; see above.")


def with_captions(found: list[SourceImage], data: Data, skipped: Skipped) -> list[SourceImage]:
    """The images that can be used as far as their captions go; refuse missing ones if the recipe does."""
    usable, bare = [], []
    listed = lru_cache(4)(lambda folder: sorted(path.name for path in folder.iterdir()))
    for image in found:
        # A caption of an image that cannot be used anyway is not asked for.
        broken = image.problem is not None and not image.problem.startswith("caption ")
        if data.repeats_from_folders and repeats_of(image) == 0:
            skipped.add(image.name, "its folder says 0 repeats")
        elif not image.captions and data.missing_caption == "error" and not broken:
            bare.append(image)
        elif image.problem is not None:
            skipped.add(image.name, image.problem)
        elif not image.captions and data.missing_caption == "skip":
            skipped.add(image.name, f"{NO_CAPTION}{_beside(image, listed)}")
        else:
            usable.append(replace(image, captions=image.captions or (data.fixed_caption,)))
    if bare:
        named = [
            each.name + (f" ({each.problem})" if each.problem else _beside(each, listed))
            for each in bare[:_NAMED]
        ]
        more = f" and {len(bare) - _NAMED} more" if len(bare) > _NAMED else ""
        raise UserError(
            f"{len(bare)} of {counted(len(found), 'image')} without a caption, that is, without text in a .txt, "
            f".caption or .json file beside it or in metadata: {', '.join(named)}{more}. Write the captions, or set "
            "data.missing_caption to skip or fixed."
        )
    return usable


def _beside(image: SourceImage, listed: Callable[[Path], list[str]]) -> str:
    """Other files of an image's name in its folder, for people: a caption may be among them."""
    path, whole = Path(image.blob.location), image.blob.size is None
    names = listed(path.parent) if whole else []
    first = bisect_left(names, f"{path.stem}.")
    found = takewhile(lambda name: name.startswith(f"{path.stem}."), names[first:])
    others = [printable(name) for name in found if name != path.name][:_NAMED]
    return f" (beside it: {', '.join(others)})" if others else ""


def with_texts(images: list[SourceImage], recipe: Recipe) -> list[SourceImage]:
    """The images with the texts that they are trained with; refuse a trigger word that is in none of them."""
    fraction = recipe.data.validation_fraction
    found = [
        replace(i, captions=texts_of(i, recipe.captions, held_out=is_held_out(i, fraction)))
        for i in images
    ]
    check_trigger_words(found, recipe.captions)
    return found


def choose_buckets(
    images: list[SourceImage], recipe: Recipe, skipped: Skipped
) -> list[PlannedImage]:
    """Measure the images and their references and give each its bucket; those that fit none are skipped."""
    data, planned = recipe.data, []
    tables = [
        bucket_table(resolution, data.bucket_step, data.max_aspect)
        for resolution in resolutions(data.resolution)
    ]
    with ThreadPoolExecutor(_THREADS) as threads:
        measured = tqdm(threads.map(_sizes, images), "measured", len(images), unit="img", delay=2)
        for image, sizes in zip(images, measured, strict=True):
            if isinstance(sizes, str):
                skipped.add(image.name, sizes)
                continue
            size, *references = sizes
            bucket = fitting_bucket(*size, tables, data.max_upscale)
            if bucket is None:
                smallest = choose_bucket(*size, tables[-1])
                skipped.add(
                    image.name,
                    f"{size[0]}x{size[1]} px must be enlarged {upscale_factor(*size, smallest):.2f}× "
                    f"for bucket {smallest}; data.max_upscale is {data.max_upscale:g}",
                )
                continue
            kept = size[0] / size[1] / bucket.aspect
            lost = 1 - min(kept, 1 / kept)
            if lost > data.max_crop:
                skipped.add(
                    image.name,
                    f"of {size[0]}x{size[1]} px the crop to bucket {bucket} would cut away {lost:.0%}; "
                    f"data.max_crop is {data.max_crop:g}",
                )
                continue
            factor, notes = upscale_factor(*size, bucket), []
            if lost > _MUCH:
                notes.append(f"{CROPPED}: {lost:.0%}")
            if factor > 1:
                notes.append(f"{ENLARGED}: {factor:.3g}×")
            held_out = is_held_out(image, data.validation_fraction)
            crops = (Crop(),) if held_out else choose_crops(*size, bucket, data)
            most = recipe.prepare.reference_resolution
            try:
                own = [
                    reference_bucket(r, size, bucket, most, data.bucket_step) for r in references
                ]
            except UnreadableImageError as error:
                skipped.add(image.name, str(error))
                continue
            bucket = replace(bucket, references=tuple(own))
            planned.append(PlannedImage(image, bucket, tuple(notes), crops, data.alpha_mask))
    return planned


def choose_crops(width: int, height: int, bucket: Bucket, data: Data) -> tuple[Crop, ...]:
    """The views of an image of width × height px: as many crops as `data.crops`, but a token or more apart, from one
    end of what the bucket cuts away to the other, those nearest to the center first."""
    factor = upscale_factor(width, height, bucket)
    spare = max(width * factor - bucket.width, height * factor - bucket.height)
    count = min(data.crops, 1 + int(spare) // PIXELS_PER_TOKEN)
    places = [0.5] if count == 1 else [number / (count - 1) for number in range(count)]
    places.sort(key=lambda place: abs(place - 0.5))
    flips = (False, True) if data.horizontal_flip else (False,)
    return tuple(Crop(place, flipped) for place in places for flipped in flips)


def warn_of_flips(images: list[PlannedImage]) -> None:
    """Say what mirrored images do to text, faces and captions."""
    flipped = [each.image for each in images if any(crop.flipped for crop in each.crops)]
    if flipped:
        sided = [i.name for i in flipped if any(map(_SIDES.search, i.captions))]
        named = (
            f"; {counted(len(sided), 'caption')} with left or right: {', '.join(sided[:_NAMED])}"
            if sided
            else ""
        )
        log.warning(
            "data.horizontal_flip: %s trained mirrored, too; letters in them, and what makes a face "
            "or a logo itself, are learned the wrong way around%s", counted(len(flipped), "image"), named,
        )  # fmt: skip


def fitting_bucket(
    width: int, height: int, tables: list[list[Bucket]], max_upscale: float
) -> Bucket | None:
    """The best bucket of the first table in which the image need not be enlarged too much."""
    for table in tables:
        bucket = choose_bucket(width, height, table)
        if upscale_factor(width, height, bucket) <= max_upscale:
            return bucket
    return None


def _sizes(image: SourceImage) -> list[tuple[int, int]] | str:
    """Width and height of an image and of its references, or why they cannot be known."""
    try:
        return [each.size or image_size(each.blob.location) for each in (image, *image.references)]
    except UnreadableImageError as error:
        return f"unreadable: {error}"


def is_held_out(image: SourceImage, fraction: float) -> bool:
    """Whether an image is for validation: a function of its name, whatever else there is."""
    return _draw(image) < fraction * 2**64


def _draw(image: SourceImage) -> int:
    digest = hashlib.sha256(f"held out|{image.name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def warn_of_validation(images: list[SourceImage], data: Data) -> None:
    """Say that none of so few images is held out, as long as another fraction costs nothing."""
    least = math.ceil((min(map(_draw, images)) + 1) / 2**64 * 100) / 100
    fraction = data.validation_fraction
    if fraction and not data.more_shards and not any(is_held_out(i, fraction) for i in images):
        log.warning(
            "data.validation_fraction is %g, but none of %s is held out (each name decides for itself), so there will be "
            "no validation loss. %s Another fraction needs a new data.shards.",
            fraction, counted(len(images), "image"),
            f"From {least:g} on one is." if least <= 0.5 else "More images would help.",
        )  # fmt: skip


def group_into_shards(
    images: list[PlannedImage], manifests: list[Manifest], data: Data
) -> list[ShardJob]:
    """The shards to write, each of one source, bucket and number of repeats, for training or validation, under names
    not taken yet."""
    groups: dict[tuple[str, Bucket, bool, int], list[PlannedImage]] = {}
    for planned in images:
        held_out = is_held_out(planned.image, data.validation_fraction)
        repeats = repeats_of(planned.image) if data.repeats_from_folders and not held_out else 1
        key = (planned.image.source, planned.bucket, held_out, repeats)
        groups.setdefault(key, []).append(planned)
    taken = {manifest.shard.name for manifest in manifests}
    jobs, free = [], dict[str, Iterator[str]]()
    for (source, bucket, held_out, repeats), members in sorted(groups.items()):
        kind = "-held_out" if held_out else f"-{repeats}x" if repeats > 1 else ""
        stem = f"{source}-{bucket.alone}{kind}"
        names = free.setdefault(stem, _free_names(stem, taken))
        for start in range(0, len(members), data.samples_per_shard):
            group = members[start : start + data.samples_per_shard]
            jobs.append(ShardJob(next(names), source, bucket, group, held_out, repeats))
    return jobs


def repeats_of(image: SourceImage) -> int:
    """The number before the underscore in the first folder of an image's name; 1 if it has none."""
    found = _REPEATS.match(image.key)
    return int(found[1]) if found and not image.blob.location.endswith(".tar") else 1


def _repeats(images: list[SourceImage]) -> list[str]:
    """The folders of images that are to be repeated by their names."""
    return sorted({f"{i.source}/{i.key.partition('/')[0]}" for i in images if repeats_of(i) != 1})


def _free_names(stem: str, taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        name = f"{stem}-{number:05d}.tar"
        if name not in taken:
            yield name
        number += 1


def log_plan(plan: Plan) -> None:
    """Log what is there and what is to be encoded."""
    if plan.comparison.kept:
        log.info("%s encoded already", counted(len(plan.comparison.kept), "image"))
    for name, rows in plan.comparison.dropped.items():
        log.info("%s of %s dropped: changed or gone", counted(len(rows), "sample"), name)
    if plan.images:
        views = sum(len(planned.crops) for planned in plan.images)
        more = f", {views} with crops and flips" if views > len(plan.images) else ""
        log.info("%s to encode%s:", counted(len(plan.images), "image"), more)
        for line in bucket_lines(planned.bucket for planned in plan.images):
            log.info(line)


def bucket_lines(buckets: Iterable[Bucket]) -> list[str]:
    """The table of buckets with counts, for people."""
    return [
        f"  {bucket!s:<10} {count:7d}  ({bucket.all_tokens} tokens)"
        for bucket, count in sorted(Counter(buckets).items())
    ]


def check_disk(folder: Path, jobs: list[ShardJob], spec: Spec, recipe: Recipe) -> None:
    """Log how much will be written, at least, and refuse what cannot fit."""

    def text(captions: set[str]) -> int:
        return (
            sum(_least_rows(each, spec) for each in captions)
            * text_bytes(spec, recipe)
            // TEXT_TOKENS
        )

    shards = sum(
        sum(4 * 128 * len(p.crops) * p.bucket.all_tokens for p in job.images)
        + text(texts_in([job]))
        for job in jobs
    )
    texts = texts_in(jobs)
    waiting = text(texts)
    needed = shards + min(waiting, recipe.prepare.scratch_gb * 1e9)
    free = shutil.disk_usage(folder).free
    if jobs:
        log.info(
            "at least %.2f GB of shards to write, %.2f GB of them %s; %.2f GB free", shards / 1e9,
            waiting / 1e9, counted(len(texts), "text"), free / 1e9,
        )  # fmt: skip
    if needed > free:
        raise UserError(
            f"data.shards {folder} needs at least {needed / 1e9:.2f} GB more, of which "
            f"{(needed - shards) / 1e9:.2f} GB for the time of encoding (prepare.scratch_gb is "
            f"{recipe.prepare.scratch_gb:g}), and its disk has {free / 1e9:.2f} GB free."
        )


def texts_in(jobs: list[ShardJob]) -> set[str]:
    """The distinct texts of some shards."""
    return {text for job in jobs for planned in job.images for text in planned.image.captions}


def _least_rows(caption: str, spec: Spec) -> int:
    """Rows of a caption that are stored, at least: dev's padding is one, and a word at least another."""
    if PADDING_SIDES[spec.pipeline] == "right":
        return TEXT_TOKENS
    return min(TEXT_TOKENS, 1 + len(caption.split()))


def text_bytes(spec: Spec, recipe: Recipe) -> int:
    """Size of one encoded caption, at most."""
    return TEXT_TOKENS * spec.text_width * (4 if text_weights(recipe) == "fp32" else 2)
