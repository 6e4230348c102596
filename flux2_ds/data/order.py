"""Which samples make up which global batch: a pure function of (index, seed, step). No torch.

An epoch, for each bucket: shuffle the shards; shuffle the samples within windows of shards; cut the
sequence into as many *lanes* as a global batch has samples. Batch b takes the b-th sample of every
lane, so a process, which owns some of the lanes, reads its shards nearly sequentially, and the
batches do not depend on the number of processes. The buckets take turns in a shuffled order, each
serving its batches in sequence: every process is in the same bucket at the same step.

Remainder: no sample is left out of an epoch. A bucket that does not divide into global batches
continues with its own beginning until it does: fewer than one global batch of places a bucket and
epoch are repetitions, with fresh noise and timestep.

The shuffles sort Philox words instead of calling a numpy shuffle: NumPy keeps the stream of a bit
generator stable across releases, but not that of the methods built on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from flux2_ds.data.buckets import Bucket
from flux2_ds.data.index import Index

Indices = NDArray[np.int64]
_STREAM = 1  # keeps these random streams apart from those of data/loader.py


@dataclass(frozen=True)
class Sample:
    """One place in a global batch.

    `shard` indexes `Index.shards`, `row` the samples of that shard. `position` counts all samples
    ever served (step × global batch + place): noise and timestep are functions of it.
    """

    shard: int
    row: int
    position: int


class Order:
    """The sequence of global batches of one data set."""

    def __init__(self, index: Index, global_batch: int, seed: int, window: int) -> None:
        self._seed = seed
        self._window = window
        self._global_batch = global_batch
        self._buckets = index.bucket_counts()
        self._shards: dict[Bucket, list[tuple[int, int]]] = {name: [] for name in self._buckets}
        for number, shard in enumerate(index.shards):
            self._shards[shard.bucket].append((number, shard.samples))
        self.batches = {name: -(-count // global_batch) for name, count in self._buckets.items()}
        """Global batches of each bucket in an epoch."""
        self.steps_per_epoch = sum(self.batches.values())
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)

    def repeated(self, bucket: Bucket) -> int:
        """Places of `bucket` in an epoch that repeat a sample to fill the last batch."""
        return self.batches[bucket] * self._global_batch - self._buckets[bucket]

    def batch(self, step: int) -> tuple[Bucket, list[Sample]]:
        """The bucket and the samples of global batch `step` (from 0), in the order of the lanes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        bucket, lanes = self._epoch(epoch)[place]
        first = step * self._global_batch
        return bucket, [
            Sample(int(shard), int(row), first + lane) for lane, (shard, row) in enumerate(lanes)
        ]

    def _build_epoch(self, epoch: int) -> list[tuple[Bucket, Indices]]:
        queues = {}
        for number, (bucket, count) in enumerate(self.batches.items()):
            sequence = self._sequence(bucket, epoch, number)
            lanes = np.resize(sequence, (self._global_batch, count, 2))
            queues[bucket] = iter(lanes.swapaxes(0, 1))
        turns = [bucket for bucket, count in self.batches.items() for _ in range(count)]
        shuffled = _shuffled(len(turns), self._seed, epoch, len(self.batches))
        return [(turns[i], next(queues[turns[i]])) for i in shuffled]

    def _sequence(self, bucket: Bucket, epoch: int, number: int) -> Indices:
        """(shard, row) of all samples of a bucket, [n, 2], shuffled for this epoch."""
        shards = self._shards[bucket]
        order = _shuffled(len(shards), self._seed, epoch, number, 0)
        windows = []
        for start in range(0, len(order), self._window):
            chosen = [shards[i] for i in order[start : start + self._window]]
            rows = np.concatenate(
                [np.stack([np.full(n, s), np.arange(n)], axis=1) for s, n in chosen]
            )
            windows.append(rows[_shuffled(len(rows), self._seed, epoch, number, 1 + start)])
        return np.concatenate(windows)


def _shuffled(count: int, *key: int) -> Indices:
    """A permutation of range(count) that depends on nothing but `key`."""
    words = np.random.Philox(np.random.SeedSequence((_STREAM, *key))).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)
