"""Before step 1: one forward and backward pass for every length that the data has, on noise.

Compiled blocks are a graph for each kind of block and each number of tokens, so everything is compiled
here, with its progress shown, and not in the middle of the training. The longest comes first: a card
that is too small for it is found before the first step (at ZeRO-3, whose compiled blocks pass forward alone, for
its forward pass). Nothing of this reaches the training: no
gradient, no random number, no state of the optimizer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch._dynamo.utils import counters

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import GIB, Memory, not_yet_allocated, out_of_memory
from flux2_ds.config.model_spec import TEXT_TOKENS, TOKEN_CHANNELS
from flux2_ds.config.plan import Plan, compiles
from flux2_ds.data.index import Index, Shard
from flux2_ds.data.loader import MicroBatch
from flux2_ds.data.order import Sample
from flux2_ds.engine.engine import Engine
from flux2_ds.errors import UserError
from flux2_ds.run.watchdog import Watchdog
from flux2_ds.training.loss import FlowObjective

log = logging.getLogger("flux2_ds")

_VALIDATION = " for evaluation"


def warm_up(
    engine: Engine,
    objective: FlowObjective,
    index: Index,
    held_out: Index,
    plan: Plan,
    *,
    expected: Memory,
    text_dtype: torch.dtype,
    first_step: int,
    watchdog: Watchdog,
    stopping: Callable[[], bool],
) -> None:
    """Pass forward and backward once for each length in `index`, and forward for those in `held_out`; where
    nothing is compiled, the longest alone.

    `expected`: what the run takes; if it counts CUDA graphs, passes that come for the second time are
    recorded. What the first step will allocate is left free. `text_dtype`: of the shards' captions.
    `stopping`: whether to end early, collective.

    Raises:
        UserError: the card's memory is not enough.
    """
    recipe = plan.recipe
    every_length = compiles(recipe)
    room = not_yet_allocated(plan, expected, resumed=first_step > 0)
    trained, evaluated = lengths(index), lengths(held_out)
    passes = [(shards, "") for shards in trained]
    passes += [(shards, _VALIDATION) for shards in evaluated]
    if not every_length:
        passes = passes[:1]
    if expected.records:
        # Only now, because nothing else may use the memory of what is recorded.
        passes += [(shards, " as CUDA graphs") for shards in trained]
    device, on_card = objective.device, objective.device.type == "cuda"
    start, known = time.perf_counter(), compiled_graphs()
    for number, (shards, purpose) in enumerate(passes, start=1):
        if stopping():
            return
        names = ", ".join(dict.fromkeys(describe(shard) for shard in shards))
        watchdog.heartbeat(first_step + 1, f"warming up for {names}")
        before = time.perf_counter()
        batch = synthetic(
            recipe.batch.micro_size,
            index.text_width,
            shards[0].bucket,
            references=shards[0].reference_sizes,
            text_dtype=text_dtype,
        )
        try:
            reserved = torch.empty(int(room) if on_card else 0, dtype=torch.uint8, device=device)
            if purpose == _VALIDATION:
                with engine.evaluating(), torch.no_grad():
                    objective.loss(engine.forward, batch)
            else:
                engine.rehearse(partial(objective.loss, batch=batch))
            if on_card:
                torch.cuda.synchronize(device)
            del reserved
        except torch.OutOfMemoryError as error:
            what = f"{names} in micro-batches of {recipe.batch.micro_size}"
            message = out_of_memory(recipe, "step", what, error, expected.spare)
            raise UserError(message) from error
        log.info(
            "warm-up %d of %d: %s%s, %.0f s",
            number,
            len(passes),
            names,
            purpose,
            time.perf_counter() - before,
        )
    done = f"warm-up    {time.perf_counter() - start:.0f} s"
    if every_length:
        done += f", {compiled_graphs() - known} graphs compiled"
    if on_card:
        done += f", peak {torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB"
        if not expected.records:  # replaying allocates nothing, so that was the training's own peak
            torch.cuda.reset_peak_memory_stats(device)
    log.info(done)


def lengths(index: Index) -> list[list[Shard]]:
    """The shards by the number of their samples' tokens, the longest first."""
    found: dict[int, list[Shard]] = {}
    for shard in index.shards:
        found.setdefault(shard.tokens, []).append(shard)
    return [found[tokens] for tokens in sorted(found, reverse=True)]


def describe(shard: Shard) -> str:
    """The sizes of a shard's samples, for people."""
    several = shard.references == "several"
    references = "references of several sizes" if several else f"references {shard.references}"
    return f"{shard.bucket} with {references}" if shard.references else str(shard.bucket)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(counters["stats"]["unique_graphs"])


class Recompilations:
    """Says so when a step compiles what the warm-up has not."""

    def __init__(self) -> None:
        self._known = compiled_graphs()

    def check(self, step: int, bucket: Bucket) -> None:
        """Called after each step."""
        found = compiled_graphs()
        if found > self._known:
            log.warning(
                "step %d (%s) compiled %d graphs that the warm-up had not, %d in all",
                step,
                bucket,
                found - self._known,
                found,
            )
        self._known = found


def synthetic(
    size: int,
    text_width: int,
    bucket: Bucket,
    *,
    references: Sequence[Bucket] = (),
    text_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> MicroBatch:
    """A micro-batch of `size` samples of noise, in pinned host memory where the loader's would be."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator).to(dtype)
        return tensor.pin_memory() if torch.cuda.is_available() else tensor

    def latent(of: Bucket) -> torch.Tensor:
        return normal(size, TOKEN_CHANNELS // 4, of.height // 8, of.width // 8)

    return MicroBatch(
        bucket,
        [Sample(0, row, seed * size + row) for row in range(size)],
        latents=latent(bucket),
        text=normal(size, TEXT_TOKENS, text_width, dtype=text_dtype),
        noise=normal(size, bucket.tokens, TOKEN_CHANNELS),
        deviates=normal(size),
        references=[latent(each) for each in references],
    )
