"""Which samples an evaluation sees, and in which forward passes. Pure, no torch.

The samples lie at even distances over all shards, sorted by bucket, so that every bucket and source has its
share. Each is seen once. A pass is of one bucket and as wide as the processes' micro-batches together; the
last one of a bucket is filled up with repeats, which do not count, so that all processes make the same
passes of the same shapes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flux2_ds.data.buckets import Bucket
from flux2_ds.data.index import Index
from flux2_ds.data.order import Sample


class Sweep:
    """At most `most` samples of `index`, in passes of `width`.

    The samples are the same whatever the width, and so are their positions, 0 to `count` - 1; repeats have
    the position `count`.
    """

    def __init__(self, index: Index, most: int, width: int) -> None:
        shards = sorted(range(len(index.shards)), key=lambda n: (index.shards[n].bucket, n))
        ends = np.cumsum([index.shards[number].samples for number in shards])
        self.count = min(most, index.samples)
        """Samples that count."""
        chosen: dict[Bucket, list[Sample]] = {}
        for position in range(self.count):
            place = position * index.samples // self.count
            at = int(np.searchsorted(ends, place, side="right"))
            shard = index.shards[shards[at]]
            row = place - int(ends[at]) + shard.samples
            chosen.setdefault(shard.bucket, []).append(Sample(shards[at], row, position))
        self._passes: list[tuple[Bucket, list[Sample]]] = []
        for bucket, samples in chosen.items():
            samples += -len(samples) % width * [replace(samples[0], position=self.count)]
            self._passes += [
                (bucket, samples[start : start + width]) for start in range(0, len(samples), width)
            ]

    def __len__(self) -> int:
        """Passes."""
        return len(self._passes)

    def batch(self, step: int, places: slice = slice(None)) -> tuple[Bucket, list[Sample]]:
        """Bucket and samples of a pass, as `Order.batch` gives them of a global batch."""
        bucket, samples = self._passes[step]
        return bucket, samples[places]
