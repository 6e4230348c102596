"""Which samples a global batch and a validation pass hold. Pure, no torch."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from flux2_ds.config.buckets import Bucket
from flux2_ds.data.index import Index

Indices = NDArray[np.int64]
_STREAM = 1  # keeps these random streams apart from those of data/loader.py
_BLOCK = 4096
"""Steps among which the buckets' turns are shuffled. Every block has its share of every bucket."""
_NAMED = 8
"""Buckets that are named one by one in warnings, at most."""
_WINDOWS = 2048
"""Shuffled windows kept: 32 KiB each with 8 shards of 256 samples."""


@dataclass(frozen=True)
class Sample:
    """One place in a global batch.

    `shard` indexes `Index.shards`, `row` the samples of that shard. `position` counts all samples
    ever served (step × global batch + place): noise and timestep are functions of it.
    """

    shard: int
    row: int
    position: int


@dataclass(frozen=True)
class _Line:
    """The shards of a bucket: numbers in the index, samples of each, samples served an epoch."""

    shards: Indices
    samples: Indices
    served: Indices
    total: int


class Order:
    """The sequence of global batches of one data set.

    `weights` gives the weight of each source; those that are not in it have 1. A bucket that does not fill a
    global batch of its own, beside others, is served in so many of the epochs that its samples count
    like all others.
    """

    def __init__(
        self,
        index: Index,
        global_batch: int,
        seed: int,
        window: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._seed = seed
        self._window = window
        self._global_batch = global_batch
        weights = weights or {}
        members: dict[Bucket, list[tuple[int, int, int]]] = {}
        for number, shard in enumerate(index.shards):
            served = math.ceil(weights.get(shard.source, 1) * shard.repeats * shard.samples - 1e-9)
            members.setdefault(shard.bucket, []).append((number, shard.samples, served))
        columns = {bucket: np.array(rows).T for bucket, rows in sorted(members.items())}
        self._lines = [_Line(c[0], c[1], c[2], int(c[2].sum())) for c in columns.values()]
        self._buckets = list(columns)
        totals = np.array([line.total for line in self._lines], dtype=np.int64)
        small = (totals < global_batch) & (len(totals) > 1)
        self._counts = np.where(small, 0, -(-totals // global_batch))
        """Global batches of each bucket in every epoch."""
        self._small = np.where(small, totals, 0)
        """Samples of each bucket that does not fill one."""
        # They take turns: their samples laid end to end, from a random place on.
        word = int(random_words(1, _STREAM, seed)[0])
        self._phase = (word % global_batch + np.cumsum(self._small) - self._small) % global_batch
        self.batches: dict[Bucket, float] = {
            bucket: int(count) or int(samples) / global_batch
            for bucket, count, samples in zip(self._buckets, self._counts, self._small, strict=True)
        }
        """Global batches of each bucket in an epoch, on average."""
        self.steps_per_epoch: float = sum(self.batches.values())
        """On average."""
        self._block_steps = _BLOCK
        # Caches only: each value is a function of its arguments.
        self._epoch_of = lru_cache(4)(self._find_epoch)
        self._blocks_of = lru_cache(2)(self._blocks)
        self._turns_of = lru_cache(2)(self._turns)
        self._shards_of = lru_cache(2 * len(totals))(self._shuffled_shards)
        self._window_of = lru_cache(_WINDOWS)(self._shuffled_window)

    def repeated(self, bucket: Bucket) -> int:
        """Places of `bucket` in an epoch that repeat a sample to fill the last batch."""
        number = self._buckets.index(bucket)
        places = int(self._counts[number]) * self._global_batch
        return max(0, places - self._lines[number].total)

    def warnings(self) -> list[str]:
        """What a user should know of buckets that do not fill a global batch, for people."""
        total = sum(line.total for line in self._lines)
        small = self._small[self._small > 0]
        if len(small) > _NAMED:
            return [
                f"{len(small)} buckets of {min(small)} to {max(small)} samples, {sum(small)} of {total} in all, have fewer "
                f"than batch.global_size {self._global_batch}: they take turns over the epochs, so that their images count "
                "like all others. Images and references of fewer sizes make fewer buckets"
            ]
        return [
            f"bucket {bucket} has {samples} of {total} samples ({samples / total:.1%}), and "
            f"batch.global_size is {self._global_batch}: it is served in one of "
            f"{self._global_batch / samples:.3g} epochs, so that its images count like all others"
            for bucket, samples in zip(self._buckets, self._small.tolist(), strict=True)
            if samples
        ]

    def batch(self, step: int, places: slice = slice(None)) -> tuple[Bucket, list[Sample]]:
        """The bucket and the samples of global batch `step` (from 0), in the order of the lanes.

        `places` restricts the samples to a part of the batch.
        """
        epoch = self._epoch_of(step)
        number, batch = self._turn(epoch, step - self.first_step(epoch))
        lanes = range(self._global_batch)[places]
        if self._small[number]:  # a sequence without end, of which an epoch takes a batch or none
            first = (int(self._done(epoch)[number]) + batch) * self._global_batch
            at = [divmod(first + lane, self._lines[number].total) for lane in lanes]
        else:
            at = [(epoch, lane * int(self._counts[number]) + batch) for lane in lanes]
        first = step * self._global_batch
        return self._buckets[number], [
            Sample(*self._sample(turn, number, place), first + lane)
            for lane, (turn, place) in zip(lanes, at, strict=True)
        ]

    def _done(self, epoch: int) -> Indices:
        """Global batches of each bucket before an epoch."""
        small: Indices = (epoch * self._small + self._phase) // self._global_batch
        return epoch * self._counts + small

    def first_step(self, epoch: int) -> int:
        """The step with which an epoch starts; a short one may have none."""
        return int(self._done(epoch).sum())

    def length(self, epochs: float) -> int:
        """Steps of so many epochs from the first on, of a part of one its share rounded; at least 1."""
        whole = int(epochs)
        first, end = self.first_step(whole), self.first_step(whole + 1)
        return max(1, first + round((epochs - whole) * (end - first)))

    def _find_epoch(self, step: int) -> int:
        """The epoch of a step; epochs without a step are passed over."""
        most = int((step + len(self._small) + 1) / self.steps_per_epoch) + 2
        return bisect.bisect_right(range(most), step, key=self.first_step) - 1

    def _blocks(self, epoch: int) -> Indices:
        """Global batches of each bucket before every block of an epoch, and at its end."""
        counts = self._done(epoch + 1) - self._done(epoch)
        blocks = -(-int(counts.sum()) // self._block_steps)
        ends: Indices = np.arange(blocks + 1)[:, None] * counts // blocks
        return ends

    def _turn(self, epoch: int, place: int) -> tuple[int, int]:
        """The bucket of an epoch's step, and which of its batches in the epoch it is."""
        starts = self._blocks_of(epoch).sum(axis=1)
        block = int(np.searchsorted(starts, place, side="right")) - 1
        buckets, batches = self._turns_of(epoch, block)
        at = place - int(starts[block])
        return int(buckets[at]), int(batches[at])

    def _turns(self, epoch: int, block: int) -> tuple[Indices, Indices]:
        """Bucket and batch of every step of a block."""
        done, end = self._blocks_of(epoch)[block : block + 2]
        counts = end - done
        turns = np.repeat(np.arange(len(counts)), counts)
        key = (self._seed, epoch, len(counts), *([block] if block else []))
        buckets = turns[_shuffled(len(turns), *key)]
        batches = np.empty_like(buckets)
        for number, first in enumerate(done):
            own = buckets == number
            batches[own] = first + np.arange(int(own.sum()))
        return buckets, batches

    def _sample(self, epoch: int, number: int, place: int) -> tuple[int, int]:
        """(shard, row) at a place of a bucket's sequence, which begins anew after its end."""
        _, starts = self._shards_of(epoch, number)
        place %= self._lines[number].total
        window = int(np.searchsorted(starts, place, side="right")) - 1
        shard, row = self._window_of(epoch, number, window)[place - int(starts[window])]
        return int(shard), int(row)

    def _shuffled_shards(self, epoch: int, number: int) -> tuple[Indices, Indices]:
        """A bucket's shards in the order of an epoch, and where each window of them starts."""
        line = self._lines[number]
        order = _shuffled(len(line.shards), self._seed, epoch, number, 0)
        ends = np.cumsum(line.served[order])
        starts = (ends - line.served[order])[:: self._window]
        return order, starts

    def _shuffled_window(self, epoch: int, number: int, window: int) -> Indices:
        """(shard, row) of the samples of a window, [n, 2]."""
        line, first = self._lines[number], window * self._window
        order, _ = self._shards_of(epoch, number)
        rows = np.concatenate([
            np.stack([np.full(served, shard), (epoch * served + np.arange(served)) % samples], axis=1)
            for shard, samples, served in (
                (line.shards[i], line.samples[i], line.served[i])
                for i in order[first : first + self._window]
            )
        ])  # fmt: skip
        shuffled: Indices = rows[_shuffled(len(rows), self._seed, epoch, number, 1 + first)]
        return shuffled


def _shuffled(count: int, *key: int) -> Indices:
    """A permutation of range(count) that depends on nothing but `key`."""
    return np.argsort(random_words(count, _STREAM, *key), kind="stable").astype(np.int64)


def random_words(count: int, *key: int) -> NDArray[np.uint64]:
    """Random numbers of 64 bits that depend on nothing but `key`, whose first is the stream."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


class ValidationOrder:
    """Which samples a validation sees, and in which forward passes: at most `most` of `index`, in
    passes of `width`.

    They lie at even distances over all shards, sorted by bucket, so that every bucket and source has its
    share. Each is seen once. A pass is of one bucket and as wide as the ranks' micro-batches together; the
    last one of a bucket is filled with repeats, which do not count, so that all ranks make the same passes
    of the same shapes.

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
