"""From positions to tensors: reads a process's part of every global batch, ahead of the step.

The loader has no state but the step: iterating from step n gives what an uninterrupted run would
have got, whatever the number of processes or restarts. Noise, the normal deviate behind t, and the
caption drop of a sample are functions of (seed, position).
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux2_ds.data.buckets import Bucket
from flux2_ds.data.index import Index
from flux2_ds.data.order import Order, Sample
from flux2_ds.data.shards import ShardReader
from flux2_ds.spec import PIXELS_PER_TOKEN

OPEN_SHARDS = 256
"""Shards kept open. Reading is sequential while own lanes × buckets × shuffle_window fit in it; beyond,
shards are opened again, which costs reading their tar headers."""
STEPS_AHEAD = 2
_STREAM = 2  # keeps these random streams apart from those of data/order.py


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one process sees.

    `latents` [B, 32, H/8, W/8] fp32, raw; `text` [B, 512, D]; `noise` [B, tokens, 128] fp32;
    `deviates` [B] fp32, standard normal, made into timesteps by `timesteps.py`. `masks`
    [B, H/16, W/16] in [0, 1] weights the loss, None weights nothing. `references`: raw latents
    [B, 32, h, w] of each sample's first reference image, of the second and so on.
    """

    bucket: Bucket
    samples: list[Sample]
    latents: torch.Tensor
    text: torch.Tensor
    noise: torch.Tensor
    deviates: torch.Tensor
    masks: torch.Tensor | None = None
    references: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class Share:
    """Which places of a global batch this process serves, in micro-batches.

    Process `rank` of `world` owns a contiguous run of lanes.
    """

    rank: int
    world: int
    global_batch: int
    micro_batch: int

    def micro_batches(self) -> list[slice]:
        """The places of each micro-batch, in order."""
        own = self.global_batch // self.world
        first = self.rank * own
        return [
            slice(at, at + self.micro_batch) for at in range(first, first + own, self.micro_batch)
        ]


class Loader:
    """Reads samples of prepared shards in the order of `order`."""

    def __init__(
        self,
        directory: Path,
        index: Index,
        order: Order,
        share: Share,
        *,
        seed: int,
        caption_dropout: float,
        empty_text: torch.Tensor,
        masked: bool = False,
    ) -> None:
        self._directory = directory
        self._index = index
        self._order = order
        self._share = share
        self._seed = seed
        self._caption_dropout = caption_dropout
        self._empty_text = empty_text
        self._masked = masked
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    def steps(self, first: int, last: int) -> Iterator[list[MicroBatch]]:
        """This process's micro-batches of every step in [first, last), read ahead by a thread.

        An error while reading is raised here, at the step that it belongs to.
        """
        ready: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=STEPS_AHEAD)
        stopped = threading.Event()

        def put(item: list[MicroBatch] | BaseException) -> None:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                except queue.Full:
                    continue
                break

        def read_ahead() -> None:
            try:
                for step in range(first, last):
                    if stopped.is_set():
                        return
                    put(self.read(step))
            except BaseException as error:
                put(error)

        threading.Thread(target=read_ahead, name="loader", daemon=True).start()
        try:
            for _ in range(first, last):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()

    def read(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of one step."""
        bucket, samples = self._order.batch(step)
        return [
            self._micro_batch(bucket, samples[places]) for places in self._share.micro_batches()
        ]

    def describe(self, sample: Sample) -> dict[str, Any]:
        """Where a sample comes from: its shard, row, position in the run and picture."""
        shard = self._index.shards[sample.shard].name
        reader = ShardReader(self._directory / shard)  # the thread that reads ahead has its own
        try:
            source = reader.meta(sample.row).get("source")
        finally:
            reader.close()
        return {"shard": shard, "row": sample.row, "position": sample.position, "source": source}

    def _micro_batch(self, bucket: Bucket, samples: list[Sample]) -> MicroBatch:
        draws = [draw(self._seed, sample.position, bucket.tokens) for sample in samples]
        return MicroBatch(
            bucket=bucket,
            samples=samples,
            latents=torch.stack([self._reader(s.shard).latent(s.row) for s in samples]),
            text=torch.stack([self._text(s, d.drop) for s, d in zip(samples, draws, strict=True)]),
            noise=torch.stack([d.noise for d in draws]),
            deviates=torch.tensor([d.deviate for d in draws]),
            masks=self._masks(bucket, samples) if self._masked else None,
            references=self._references(samples),
        )

    def _masks(self, bucket: Bucket, samples: list[Sample]) -> torch.Tensor:
        """Masks of the samples; a sample without one is trained on as a whole."""
        white = torch.ones(bucket.height // PIXELS_PER_TOKEN, bucket.width // PIXELS_PER_TOKEN)
        found = [self._reader(sample.shard).mask(sample.row) for sample in samples]
        return torch.stack([white if mask is None else mask for mask in found])

    def _references(self, samples: list[Sample]) -> list[torch.Tensor]:
        """The first references of all samples, the second and so on; they agree in number and size."""
        if not any(self._index.shards[sample.shard].references for sample in samples):
            return []
        found = [self._reader(sample.shard).references(sample.row) for sample in samples]
        return [torch.stack(each) for each in zip(*found, strict=True)]

    def _text(self, sample: Sample, drop: float) -> torch.Tensor:
        if drop < self._caption_dropout:
            return self._empty_text
        return self._reader(sample.shard).text(sample.row)

    def _reader(self, number: int) -> ShardReader:
        reader = self._readers.pop(number, None)
        if reader is None:
            shard = self._index.shards[number]
            reader = ShardReader(self._directory / shard.name, shard.dropped)
        self._readers[number] = reader
        if len(self._readers) > OPEN_SHARDS:
            self._readers.popitem(last=False)[1].close()
        return reader


@dataclass(frozen=True)
class Draw:
    """The random numbers of one sample; `drop` is uniform in [0, 1)."""

    noise: torch.Tensor
    deviate: float
    drop: float


def draw(seed: int, position: int, tokens: int) -> Draw:
    """Noise [tokens, 128], the deviate behind t and the caption drop of the sample at `position`.

    Drawn on the CPU by a counter-based generator of its own (Philox, 256 bits of key and counter), so
    they depend on nothing but the arguments.
    """
    generator = np.random.Generator(
        np.random.Philox(np.random.SeedSequence((_STREAM, seed, position)))
    )
    deviate, drop = generator.standard_normal(), generator.random()
    noise = generator.standard_normal((tokens, 128), dtype=np.float32)
    return Draw(torch.from_numpy(noise), deviate, drop)
