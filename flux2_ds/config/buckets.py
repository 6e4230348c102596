"""Aspect-ratio buckets: the resolutions that images are cropped to, and those of their references."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from flux2_ds.config.model_spec import PIXELS_PER_TOKEN


@dataclass(frozen=True, order=True)
class Bucket:
    """One resolution, and those of the reference images: samples of one bucket can share a forward pass. Height and
    width in px, multiples of 16."""

    height: int
    width: int
    references: tuple[Bucket, ...] = ()

    @staticmethod
    def of(values: dict[str, Any]) -> Bucket:
        """A bucket from its JSON values."""
        references = tuple(map(Bucket.of, values["references"]))
        return Bucket(values["height"], values["width"], references)

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    @property
    def tokens(self) -> int:
        """Tokens of the image of one sample."""
        return (self.height // PIXELS_PER_TOKEN) * (self.width // PIXELS_PER_TOKEN)

    @property
    def all_tokens(self) -> int:
        """Tokens of the image and its references."""
        return self.tokens + sum(each.tokens for each in self.references)

    @property
    def alone(self) -> Bucket:
        """The image without its references."""
        return replace(self, references=())

    def __str__(self) -> str:
        references = ",".join(map(str, self.references))
        return f"{self.width}x{self.height}" + f" with references {references}" * bool(references)


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
