"""Read a rank's part of every global batch, ahead of the step.

The loader has no state but the step: iterating from step n gives what an uninterrupted run would
have got, whatever the number of ranks or restarts. Noise, the normal deviate behind t, the caption
drop, the text and the view of a sample are functions of (seed, position).
"""

from __future__ import annotations

import math
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_spec import PIXELS_PER_TOKEN
from flux2_ds.config.recipe import Preservation
from flux2_ds.data.index import Index
from flux2_ds.data.order import Order, Sample, ValidationOrder, random_words
from flux2_ds.data.shards import Fetch, ShardReader
from flux2_ds.data.storage import Blob, join
from flux2_ds.errors import UserError

_STEPS_READY = 2
_OPEN_SHARDS = 256
"""Tables of contents kept in memory: some 0.2 MB each with 256 samples. A table that is needed again is
one small read."""
_TEXTS_KEPT = 8
"""Shared captions kept in memory, so that one caption of all images is not read with each."""
_STREAM = 2  # keeps these random streams apart from those of data/order.py and training/step.py
_VARIANT_STREAM = 4
_PROMPT_STREAM = 5
_REFERENCE_STREAM = 6


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank sees.

    `latents` [B, 32, H/8, W/8] fp32, raw; `text` [B, 512, D]; `noise` [B, tokens, 128] fp32;
    `deviates` [B] fp32, standard normal, made into timesteps by `model/flow.py`. `masks`
    [B, H/16, W/16] in [0, 1] weights the loss, None weights nothing. `references`: raw latents
    [B, 32, h, w] of each sample's first reference image, of the second and so on. `sources`: each sample's
    source; `prompted`: whether its text is a prompt of `preservation`. Both are empty where nobody asks.
    """

    bucket: Bucket
    samples: list[Sample]
    latents: torch.Tensor
    text: torch.Tensor
    noise: torch.Tensor
    deviates: torch.Tensor
    masks: torch.Tensor | None = None
    references: Sequence[torch.Tensor] = ()
    sources: Sequence[str] = ()
    prompted: Sequence[bool] = ()


@dataclass(frozen=True)
class Share:
    """The places of a global batch that a rank serves, in micro-batches: a contiguous run of lanes."""

    rank: int
    world_size: int
    global_batch: int
    micro_batch: int

    def micro_batches(self) -> list[slice]:
        """The places of each micro-batch, in order."""
        own = self.global_batch // self.world_size
        first = self.rank * own
        return [
            slice(at, at + self.micro_batch) for at in range(first, first + own, self.micro_batch)
        ]


class Loader:
    """Reads samples of prepared shards in the order of `order`, from a folder or a URL.

    `num_workers` threads read samples, so many ahead of the step that all of them are busy. Besides
    tables of contents and shared captions, at most 2 × num_workers + 4 steps' samples are in memory. With
    `pinned` the batches are pinned: a copy to a GPU from other memory makes the step wait for the GPU.
    """

    def __init__(
        self,
        folder: str | Path,
        index: Index,
        order: Order | ValidationOrder,
        share: Share,
        *,
        seed: int,
        caption_dropout: float,
        empty_text: torch.Tensor,
        reference_dropout: float = 0.0,
        masked: bool = False,
        preservation: Preservation = Preservation(),  # noqa: B008
        prompts: Sequence[torch.Tensor] = (),
        num_workers: int = 4,
        pinned: bool = False,
        fetch: Fetch = Blob.view,
    ) -> None:
        self._folder, self._index, self._order, self._share = str(folder), index, order, share
        self._seed, self._masked, self._empty_text = seed, masked, empty_text
        self._caption_dropout, self._reference_dropout = caption_dropout, reference_dropout
        self._preservation, self._prompts = preservation, prompts
        self._threads, self._pinned, self._fetch = num_workers, pinned, fetch
        self._lock = threading.Lock()
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._texts: OrderedDict[str, torch.Tensor] = OrderedDict()

    def steps(self, first: int, last: int) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of every step in [first, last), read ahead by threads.

        An error while reading is raised here, at the step that it belongs to.
        """
        ready: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=_STEPS_READY)
        stopped = threading.Event()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="reader")

        def offer(item: list[MicroBatch] | BaseException) -> None:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                except queue.Full:
                    continue
                break

        def read_ahead() -> None:
            try:
                for step in self._steps(first, last, pool):
                    offer(step)
            except BaseException as error:  # once the pool is shut down, too
                offer(error)

        threading.Thread(target=read_ahead, name="loader", daemon=True).start()
        try:
            for _ in range(first, last):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            # Or the process would read all that has been asked for before it exits.
            pool.shutdown(wait=False, cancel_futures=True)

    def read(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of one step."""
        with ThreadPoolExecutor(1) as pool:
            return next(self._steps(step, step + 1, pool))

    def describe(self, sample: Sample) -> dict[str, Any]:
        """Where a sample comes from: its shard, row, position in the run and image."""
        source = self._reader(sample.shard).meta(sample.row).get("source")
        shard = self._index.shards[sample.shard].name
        return {"shard": shard, "row": sample.row, "position": sample.position, "source": source}

    def _steps(self, first: int, last: int, pool: ThreadPoolExecutor) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each step, while `pool` reads the samples that come after them."""
        places = self._share.micro_batches()
        own = slice(places[0].start, places[-1].stop)
        coming = (
            pool.submit(self._load, bucket, sample)
            for bucket, samples in (self._order.batch(step, own) for step in range(first, last))
            for sample in samples
        )
        under_way = deque(islice(coming, 2 * self._threads))
        for _ in range(first, last):
            batches = []
            for size in (place.stop - place.start for place in places):
                under_way.extend(islice(coming, size))
                loaded = [under_way.popleft().result() for _ in range(size)]
                batches.append(collate(loaded, self._pinned))
            yield batches

    def _load(self, bucket: Bucket, sample: Sample) -> Loaded:
        """One sample; called in a thread of its own."""
        drawn = draw(self._seed, sample.position, bucket.tokens)
        reader, row = self._reader(sample.shard), sample.row
        source, prompt = self._index.shards[sample.shard].source, None
        number, view = draw_variants(
            self._seed, sample.position, reader.texts(row), reader.views(row)
        )
        step = sample.position // self._share.global_batch
        if bucket.references and references_dropped(self._seed, step, self._reference_dropout):
            bucket = bucket.alone
        kept = self._preservation
        if self._prompts and kept.due(step) and source not in kept.sources:
            prompt = draw_prompt(self._seed, sample.position, len(self._prompts), kept.share)
        if prompt is not None:
            latent, text = reader.latent(row, view), self._prompts[prompt]
        elif drawn.drop < self._caption_dropout:
            latent, text = reader.latent(row, view), self._empty_text
        elif number == view == 0 and reader.own_text(row):
            latent, text = reader.sample(row)
        else:
            latent, text = reader.latent(row, view), self._text(reader, row, number)
        mask = self._mask(reader, row, view, bucket) if self._masked else None
        rows, columns = bucket.height // PIXELS_PER_TOKEN, bucket.width // PIXELS_PER_TOKEN
        for name, tensor, shape in (
            ("latent", latent, (32, 2 * rows, 2 * columns)),
            ("text", text, tuple(self._empty_text.shape)),
            ("mask", mask, (rows, columns)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise UserError(
                    f"shard {self._index.shards[sample.shard].name}, sample {row}: its {name} has "
                    f"the shape {tuple(tensor.shape)}, not {shape}. Prepare the shards again."
                )
        references = reader.references(row, view) if bucket.references else []
        prompted = prompt is not None
        return Loaded(bucket, sample, latent, text, drawn, mask, references, source, prompted)

    def _mask(self, reader: ShardReader, row: int, view: int, bucket: Bucket) -> torch.Tensor:
        """The mask of a sample; one without is 1 everywhere."""
        mask = reader.mask(row, view)
        if mask is None:
            return torch.ones(bucket.height // PIXELS_PER_TOKEN, bucket.width // PIXELS_PER_TOKEN)
        return mask

    def _text(self, reader: ShardReader, row: int, number: int) -> torch.Tensor:
        digest = reader.text_digest(row, number)
        with self._lock:
            text = self._texts.pop(digest, None)
        if text is None:
            text = reader.text(row, number)
        with self._lock:
            self._texts[digest] = text
            if len(self._texts) > _TEXTS_KEPT:
                self._texts.popitem(last=False)
        return text

    def _reader(self, number: int) -> ShardReader:
        with self._lock:
            reader = self._readers.pop(number, None)
        if reader is None:
            shard = self._index.shards[number]
            reader = ShardReader(join(self._folder, shard.name), shard, self._fetch)
        with self._lock:
            self._readers[number] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader


@dataclass(frozen=True)
class Loaded:
    """One sample: what was read of it, and its random numbers."""

    bucket: Bucket
    sample: Sample
    latent: torch.Tensor
    text: torch.Tensor
    drawn: Draw
    mask: torch.Tensor | None
    references: list[torch.Tensor]
    source: str = ""
    prompted: bool = False


def collate(loaded: list[Loaded], pinned: bool = False) -> MicroBatch:
    """Samples of one bucket as a micro-batch."""
    together = partial(stack, pinned=pinned)
    masks = [each.mask for each in loaded if each.mask is not None]
    return MicroBatch(
        bucket=loaded[0].bucket,
        samples=[each.sample for each in loaded],
        latents=together([each.latent for each in loaded]),
        text=together([each.text for each in loaded]),
        noise=together([each.drawn.noise for each in loaded]),
        deviates=together([torch.tensor(each.drawn.deviate) for each in loaded]),
        masks=together(masks) if masks else None,
        references=[
            together(list(each)) for each in zip(*(one.references for one in loaded), strict=True)
        ],
        sources=[each.source for each in loaded],
        prompted=[each.prompted for each in loaded],
    )


def stack(tensors: list[torch.Tensor], *, pinned: bool) -> torch.Tensor:
    """`torch.stack`, without the copy when there is only one and it may stay where it is."""
    if len(tensors) == 1 and not pinned:
        return tensors[0][None]
    shape = (len(tensors), *tensors[0].shape)
    return torch.stack(tensors, out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=pinned))


@dataclass(frozen=True)
class Draw:
    """The random numbers of one sample; `drop` is uniform in [0, 1)."""

    noise: torch.Tensor
    deviate: float
    drop: float


def draw(seed: int, position: int, tokens: int) -> Draw:
    """Noise [tokens, 128], the deviate behind t and the caption drop of the sample at `position`.

    Made of the generator's raw words, which numpy keeps from version to version, unlike its distributions.
    """
    bits = np.random.SFC64(np.random.SeedSequence((_STREAM, seed, position)))
    first, second = bits.random_raw(2).tolist()
    # 52 bits and a half one: never 0 or 1, where the normal distribution ends.
    deviate = NormalDist().inv_cdf(((first >> 12) + 0.5) * 2**-52)
    noise = torch.from_numpy(normals(bits, tokens * 128)).view(tokens, 128)
    return Draw(noise, deviate, (second >> 11) * 2**-53)


def draw_variants(seed: int, position: int, texts: int, views: int) -> tuple[int, int]:
    """Which of so many texts, and of so many views of its image, the sample at `position` gets."""
    if texts == views == 1:
        return 0, 0
    first, second = random_words(2, _VARIANT_STREAM, seed, position).tolist()
    return first % texts, second % views


def draw_prompt(seed: int, position: int, count: int, share: float) -> int | None:
    """Which of `count` prompts a `share` of the samples gets, the one at `position` among them; None: its caption."""
    chance, which = random_words(2, _PROMPT_STREAM, seed, position).tolist()
    return which % count if chance < share * 2**64 else None


def references_dropped(seed: int, step: int, share: float) -> bool:
    """Whether the samples of `step`, from 0, are trained without their references, as those of a `share` of the steps are:
    of all together, because without them the shapes are others."""
    return share > 0 and int(random_words(1, _REFERENCE_STREAM, seed, step)[0]) < share * 2**64


def normals(bits: np.random.BitGenerator, count: int) -> NDArray[np.float32]:
    """`count` standard normal numbers, an even number of them, by Box and Muller's transform.

    numpy's own float32 normals take five times as long, which was most of what a sample cost. The
    uniform numbers have 31 bits, so values reach ±6.6, as far as one in 10^10 goes.
    """
    words = bits.random_raw(count // 2).view(np.uint32)  # two numbers of 32 bits in each of 64
    words >>= 1
    uniform = words.view(np.int32).astype(np.float32)  # signed, which processors convert faster
    uniform += np.float32(0.5)
    uniform *= np.float32(2**-31)
    radius, angle = uniform.reshape(2, -1)
    np.log(radius, out=radius)
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle *= np.float32(2 * math.pi)
    pairs = np.empty((2, count // 2), np.float32)
    np.cos(angle, out=pairs[0])
    np.sin(angle, out=pairs[1])
    pairs *= radius
    return pairs.reshape(-1)
