"""Measure the loader against the raw read of the same bytes and a plain WebDataset pipeline.

    flux2-ds bench-data [--json] [--gb 1] [--rounds 3] [--model dev klein-4b] [--from disk http s3]

Writes shards of random samples of true sizes at 1024², reads them from the disk (dropped from the page
cache before each reading) and from servers on loopback, and simulates an index of 10^8 samples. Needs
no GPU; S3 needs moto, of the `dev` extra.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch
import webdataset
from safetensors.torch import load

from flux2_ds.commands.loopback import Server, served
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_spec import TEXT_TOKENS
from flux2_ds.data.index import Index, Part, Shard, index_json, parse_index
from flux2_ds.data.loader import Loader, Share
from flux2_ds.data.order import Order
from flux2_ds.data.shards import LATENT, TEXT, Record, View, unpack_text, write_shard
from flux2_ds.data.storage import Blob, join
from flux2_ds.errors import Arguments, UserError, run_root

BUCKET = Bucket(1024, 1024)
MODELS = {"dev": (15360, 160, 0.80), "klein-9b": (12288, 512, 0.24), "klein-4b": (7680, 512, 0.13)}
"""Text width, rows of a caption that are stored (dev's padding is not), and the seconds that a GPU takes for a
sample."""
_SAMPLES_PER_SHARD, _WAITED_STEPS, _SHARD_OF_INDEX = 16, 24, 256
_INDEX_SAMPLES = (10**6, 10**8)
Values = dict[str, object]


def main() -> None:
    """Entry point of `flux2-ds bench-data`."""
    parser = Arguments("flux2-ds bench-data", description="Measure the loader.")
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON")
    add("--gb", type=float, default=1.0, help="size of the shards of each model, in GB")
    add("--model", nargs="+", choices=MODELS, default=["dev", "klein-4b"])
    add("--from", nargs="+", choices=["disk", "http", "s3"], default=["disk", "http"], dest="kinds")
    add("--num-workers", type=int, default=4, help="data.num_workers of the loader")
    add("--rounds", type=int, default=3, help="readings of each, in turns; the best counts")
    add("--work", type=Path, help="folder on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    for name, value in (
        ("gb", options.gb),
        ("num-workers", options.num_workers),
        ("rounds", options.rounds),
    ):
        if not 0 < value < math.inf:
            raise UserError(f"--{name} is {value}; it must be more than 0.")
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: shards and server go with it
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    results: Values = {"machine": {"cpus": os.cpu_count(), "torch": torch.__version__}}

    def report(title: str, values: Values) -> None:
        results[title] = values
        if not options.json:
            print("\n".join([title, *(f"  {k:<34} {v}" for k, v in values.items())]), flush=True)

    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for model in options.model:
            text_width, rows, pace = MODELS[model]
            index = make_shards(Path(work) / model, text_width, rows, int(options.gb * 1e9))
            for kind in options.kinds:
                report(
                    f"{model} from {kind}", measure(kind, Path(work) / model, index, options, pace)
                )
    for samples in _INDEX_SAMPLES:
        report(f"index of {samples:,} samples", measure_index(samples))
    if options.json:
        print(json.dumps(results, indent=1))


def make_shards(folder: Path, text_width: int, rows: int, size: int) -> Index:
    """Shards of about `size` bytes of random samples, whose captions have `rows` rows and padding."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    latent = torch.randn(32, BUCKET.height // 8, BUCKET.width // 8)
    text = torch.randn(TEXT_TOKENS, text_width).bfloat16()
    samples = max(2, size // (latent.nbytes + text[:rows].nbytes))

    def text_of(caption: str) -> torch.Tensor:
        rolled = text.roll(int(caption))
        rolled[: TEXT_TOKENS - rows] = rolled[TEXT_TOKENS - rows]
        return rolled

    shards = []
    for first in range(0, samples, _SAMPLES_PER_SHARD):
        numbers = range(first, min(samples, first + _SAMPLES_PER_SHARD))
        records = (Record(f"{n}.jpg", (str(n),), (View(latent.roll(n)),)) for n in numbers)
        path = folder / f"{first:06d}.tar"
        shards.append(write_shard(path, BUCKET, records, text_of))
    return Index("dev", text_width, {}, {}, shards)


def measure(
    kind: str, folder: Path, index: Index, options: argparse.Namespace, pace: float
) -> Values:
    """Time the readings, and the wait for batches where a step takes `pace` seconds."""
    size, samples = sum(shard.size for shard in index.shards), index.samples
    with nullcontext() if kind == "disk" else served(kind, folder) as server:
        location = str(folder) if server is None else server.url

        def loader() -> Loader:
            order = Order(index, 1, seed=0, window=2)
            empty = torch.zeros(TEXT_TOKENS, index.text_width)
            return Loader(location, index, order, Share(0, 1, 1, 1), seed=0, caption_dropout=0.0,
                          empty_text=empty, num_workers=options.num_workers)  # fmt: skip

        readings: dict[str, Callable[[], int]] = {
            "raw read": lambda: read_raw(server, folder, index),
            "loader": lambda: sum(1 for _ in loader().steps(0, samples)),
        }
        if kind != "s3":  # WebDataset reads S3 through the AWS command line, which is not at hand
            readings["plain WebDataset"] = lambda: sum(1 for _ in plain_pipeline(location, index))

        def clocks() -> tuple[float, float, float]:
            """Seconds by the clock, of CPUs in this process, and of CPUs in the server."""
            cpu = psutil.Process(server.process.pid).cpu_times()[:2] if server else ()
            return time.perf_counter(), time.process_time(), sum(cpu)

        def timed(read: Callable[[], int]) -> list[float]:
            drop_from_page_cache(folder)
            before = clocks()
            count = read()
            if count != samples:
                raise RuntimeError(f"{count} samples read of {samples}")
            return [after - start for after, start in zip(clocks(), before, strict=True)]

        # In turns, the best of each: a machine is never quiet all the time.
        rounds = [{name: timed(readings[name]) for name in readings} for _ in range(options.rounds)]
        best = {name: min(each[name][0] for each in rounds) for name in readings}
        found: Values = {"MB a sample": round(size / samples / 1e6, 1)}
        found |= {f"{name}, MB/s": round(size / best[name] / 1e6) for name in readings}
        found["loader, samples/s"] = round(samples / best["loader"], 1)
        for name in sorted(readings.keys() - {"loader"}):
            found[f"loader / {name}"] = round(best[name] / best["loader"], 2)
        for name in readings:
            here, there = min(each[name][1:] for each in rounds)
            found[f"{name}, CPU ms a sample"] = round(1e3 * here / samples, 1)
            if server is not None:
                found[f"{name}, server's CPU ms"] = round(1e3 * there / samples, 1)
        drop_from_page_cache(folder)
        first, wait = waits(loader(), pace)
        found["time to first batch, s"] = round(first, 3)
        found[f"wait at {pace} s a step"] = f"{100 * wait / pace:.2f} %"
    return found


def drop_from_page_cache(folder: Path) -> None:
    """Make the next reading come from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_raw(server: Server | None, folder: Path, index: Index) -> int:
    """Read all shards one after the other and do nothing with them."""
    buffer = memoryview(bytearray(8 << 20))
    for shard in index.shards:
        if server is None:
            with (folder / shard.name).open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
        elif server.kind == "http":
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
            connection.request("GET", f"/{shard.name}")
            response = connection.getresponse()
            while response.readinto(buffer):
                pass
            connection.close()
        else:
            Blob(join(server.url, shard.name)).read()
    return index.samples


def plain_pipeline(location: str, index: Index) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What one writes without this loader: stream the tars, decode the tensors, in shard order."""
    urls = [join(location, shard.name) for shard in index.shards]
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        yield load(sample[LATENT])["latent"], unpack_text(load(sample[TEXT]))


def waits(loader: Loader, pace: float) -> tuple[float, float]:
    """Time to the first batch, and the mean wait of later steps that take `pace` seconds each."""
    started = time.perf_counter()
    steps = loader.steps(0, 1 + _WAITED_STEPS)
    next(steps)
    first, waited = time.perf_counter() - started, 0.0
    for _ in range(_WAITED_STEPS):
        time.sleep(pace)
        asked = time.perf_counter()
        next(steps)
        waited += time.perf_counter() - asked
    return first, waited / _WAITED_STEPS


def measure_index(samples: int) -> Values:
    """What an index of so many samples costs: memory, and time to the first and any later batch."""
    buckets = [Bucket(64 * (8 + n), 64 * (24 - n)) for n in range(17)]
    count = samples // _SHARD_OF_INDEX
    shards = [
        Shard(f"{number:08d}.tar", buckets[number % 17], _SHARD_OF_INDEX, 1 << 30,
              f"{number:064x}", "photos", [], toc=Part(1 << 30, 60_000, f"{number:032x}"))
        for number in range(count)
    ]  # fmt: skip
    content = index_json(Index("dev", 15360, {}, {}, shards)).encode()
    del shards
    process, clock = psutil.Process(), time.perf_counter
    before, started = process.memory_info().rss, clock()
    index = parse_index(content, "index.json")
    parsed = clock()
    order = Order(index, 64, seed=0, window=8)
    order.batch(0)
    first = clock()
    for step in islice(range(int(order.steps_per_epoch) // 2, 10**12, 977), 100):
        order.batch(step)
    hundred = clock()
    Order(index, 64, seed=0, window=8).batch(int(3.5 * order.steps_per_epoch))
    return {
        "shards": count,
        "index.json, MB": round(len(content) / 1e6),
        "load, s": round(parsed - started, 2),
        "order and first batch, s": round(first - parsed, 3),
        "resume at epoch 3.5, s": round(clock() - hundred, 3),
        "batch of 64 at any step, ms": round(10 * (hundred - first), 1),
        "memory, MB": round((process.memory_info().rss - before) / 1e6),
    }


if __name__ == "__main__":
    run_root(main)
