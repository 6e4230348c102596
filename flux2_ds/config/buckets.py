"""Aspect-ratio buckets: the resolutions that images are cropped to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flux2_ds.config.model_spec import PIXELS_PER_TOKEN


@dataclass(frozen=True, order=True)
class Bucket:
    """One resolution; height and width in px, multiples of 16."""

    height: int
    width: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    @property
    def tokens(self) -> int:
        """Image tokens of one sample."""
        return (self.height // PIXELS_PER_TOKEN) * (self.width // PIXELS_PER_TOKEN)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def bucket_table(resolution: int, step: int, max_aspect: float) -> list[Bucket]:
    """All buckets with area ≤ resolution² and aspect ratio ≤ max_aspect, sorted.

    For each width (a multiple of `step`) the height is the largest multiple of `step` that keeps
    the area within resolution².
    """
    area = resolution * resolution
    table = set()
    for width in range(step, math.floor(resolution * math.sqrt(max_aspect)) + step, step):
        height = area // width // step * step
        if height >= step and max(width / height, height / width) <= max_aspect:
            table.add(Bucket(height, width))
            table.add(Bucket(width, height))
    return sorted(table)


def resolutions(setting: int | list[int]) -> list[int]:
    """The `data.resolution` setting as a list, largest first."""
    return sorted({setting} if isinstance(setting, int) else set(setting), reverse=True)


def choose_bucket(width: int, height: int, table: list[Bucket]) -> Bucket:
    """The bucket that keeps most of a `width` × `height` image; larger area breaks ties."""
    aspect = width / height

    def kept(bucket: Bucket) -> tuple[float, int]:
        ratio = aspect / bucket.aspect
        return round(min(ratio, 1 / ratio), 6), bucket.tokens

    return max(table, key=kept)


def upscale_factor(width: int, height: int, bucket: Bucket) -> float:
    """Factor by which the image must be enlarged to cover the bucket; < 1 means it shrinks."""
    return max(bucket.width / width, bucket.height / height)
