"""Which pictures are used: those with a caption that fill a bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from tqdm import tqdm

from flux2_ds.config.buckets import Bucket, bucket_table, choose_bucket, resolutions, upscale_factor
from flux2_ds.config.recipe import Data
from flux2_ds.data.images import UnreadableImageError, image_size
from flux2_ds.errors import UserError
from flux2_ds.prepare.source_images import Picture, Skipped, SourceImage

_NAMED = 5
_THREADS = 16  # reading a header is waiting, on network file systems above all


def with_captions(
    source_images: list[SourceImage], data: Data, skipped: Skipped
) -> list[SourceImage]:
    """The entries that can be used as far as their captions go.

    Raises:
        UserError: a picture without a caption with `missing_caption: error`, or none left.
    """
    usable, bare = [], []
    for entry in source_images:
        if entry.caption is None and data.missing_caption == "error" and not _broken(entry):
            bare.append(entry)
        elif entry.problem is not None:
            skipped.add(entry.name, entry.problem)
        elif entry.caption is None and data.missing_caption == "skip":
            skipped.add(entry.name, "no caption")
        else:
            usable.append(replace(entry, caption=entry.caption or data.fixed_caption))
    if bare:
        named = [each.name + f" ({each.problem})" * bool(each.problem) for each in bare[:_NAMED]]
        more = f" and {len(bare) - _NAMED} more" if len(bare) > _NAMED else ""
        raise UserError(
            f"{len(bare)} of {len(source_images)} pictures have no caption, that is, no text in a .txt file "
            f"beside them or in metadata: {', '.join(named)}{more}. Write the captions, or set "
            "data.missing_caption to skip or fixed."
        )
    return usable


def _broken(entry: SourceImage) -> bool:
    """Whether the picture itself cannot be used, whatever its caption."""
    return entry.problem is not None and not entry.problem.startswith("caption ")


def choose_buckets(source_images: list[SourceImage], data: Data, skipped: Skipped) -> list[Picture]:
    """Measure the pictures and give each its bucket; those that fit none are skipped."""
    tables = [
        bucket_table(resolution, data.bucket_step, data.max_aspect)
        for resolution in resolutions(data.resolution)
    ]
    chosen = []
    with ThreadPoolExecutor(_THREADS) as threads:
        sizes = threads.map(_size, source_images)
        for entry, size in tqdm(
            zip(source_images, sizes, strict=True),
            "measured",
            len(source_images),
            unit="img",
            delay=2,
        ):
            if isinstance(size, str):
                skipped.add(entry.name, size)
                continue
            bucket = fitting_bucket(*size, tables, data.max_upscale)
            if bucket is not None:
                kept = size[0] / size[1] / bucket.aspect
                lost = 1 - min(kept, 1 / kept)
                chosen.append(Picture(entry, entry.caption or "", bucket, round(lost, 3)))
                continue
            smallest = choose_bucket(*size, tables[-1])
            skipped.add(
                entry.name,
                f"{size[0]}x{size[1]} px must be enlarged {upscale_factor(*size, smallest):.2f}× "
                f"for bucket {smallest}; data.max_upscale is {data.max_upscale:g}",
            )
    return chosen


def fitting_bucket(
    width: int, height: int, tables: list[list[Bucket]], max_upscale: float
) -> Bucket | None:
    """The best bucket of the first table in which the picture need not be enlarged too much."""
    for table in tables:
        bucket = choose_bucket(width, height, table)
        if upscale_factor(width, height, bucket) <= max_upscale:
            return bucket
    return None


def _size(entry: SourceImage) -> tuple[int, int] | str:
    """Width and height, or why they cannot be known."""
    try:
        return entry.size or image_size(entry.blob.location)
    except UnreadableImageError as error:
        return f"unreadable: {error}"


def bucket_lines(buckets: Iterable[Bucket]) -> list[str]:
    """The table of buckets with counts, for people."""
    return [
        f"  {bucket!s:<10} {count:7d}  ({bucket.tokens} tokens)"
        for bucket, count in sorted(Counter(buckets).items())
    ]
