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
from dataclasses import replace
from functools import partial

import torch

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import GIB, Memory, not_yet_allocated, out_of_memory
from flux2_ds.config.model_spec import TEXT_TOKENS, TOKEN_CHANNELS
from flux2_ds.config.plan import compiles
from flux2_ds.data.index import Index
from flux2_ds.data.loader import MicroBatch
from flux2_ds.data.order import Sample
from flux2_ds.errors import UserError
from flux2_ds.run.logging import progress_bar
from flux2_ds.training.build import Run
from flux2_ds.training.inputs import Inputs
from flux2_ds.training.progress import compiled_graphs

log = logging.getLogger("flux2_ds")

_VALIDATION = " for evaluation"


def warm_up(run: Run, inputs: Inputs, expected: Memory) -> None:
    """Pass forward and backward once for each length of the data, and forward for those of what is held out;
    where nothing is compiled, the longest alone. Ends early if the run is asked to stop. Collective.

    `expected`: what the run takes; if it counts CUDA graphs, passes that come for the second time are
    recorded. What the first step will allocate is left free. Refuses a card that is too small.
    """
    recipe = run.recipe
    every_length = compiles(recipe)
    room = not_yet_allocated(inputs.plan, expected, resumed=run.first_step > 0)
    trained = lengths(inputs.index, dropped=recipe.objective.reference_dropout > 0)
    evaluated = lengths(inputs.held_out)
    passes = [(buckets, "") for buckets in trained]
    passes += [(buckets, _VALIDATION) for buckets in evaluated]
    if not every_length:
        passes = passes[:1]
    if expected.records:
        # Only now, because nothing else may use the memory of what is recorded.
        passes += [(buckets, " as CUDA graphs") for buckets in trained]
    device, on_card = run.objective.device, run.objective.device.type == "cuda"
    start, known = time.perf_counter(), compiled_graphs()
    if every_length:
        log.info("warm-up    compiling the blocks in %d passes", len(passes))
    bar = progress_bar("compiling" if every_length else "warming up", len(passes), "pass")
    for number, (buckets, purpose) in enumerate(passes, start=1):
        if run.stop.any_rank(run.process)():
            bar.close()
            return
        names = ", ".join(map(str, buckets))
        bar.set_postfix_str(names)
        run.watchdog.heartbeat(run.first_step + 1, f"warming up for {names}")
        before = time.perf_counter()
        try:
            reserved = torch.empty(int(room) if on_card else 0, dtype=torch.uint8, device=device)
            make_pass(run, inputs, buckets[0], evaluating=purpose == _VALIDATION)
            if on_card:
                torch.cuda.synchronize(device)
            del reserved
        except torch.OutOfMemoryError as error:
            what = f"{names} in micro-batches of {recipe.batch.micro_size}"
            message = out_of_memory(recipe, "step", what, error, expected.spare)
            raise UserError(message) from error
        bar.update()
        log.info(
            "warm-up %d of %d: %s%s, %.0f s",
            number,
            len(passes),
            names,
            purpose,
            time.perf_counter() - before,
            extra={"console": bar.disable},
        )
    bar.close()
    done = f"warm-up    {time.perf_counter() - start:.0f} s"
    if every_length:
        done += f", {compiled_graphs() - known} graphs compiled"
    if on_card:
        done += f", peak {torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB"
        if not expected.records:  # replaying allocates nothing, so that was the training's own peak
            torch.cuda.reset_peak_memory_stats(device)
    log.info(done)


def make_pass(run: Run, inputs: Inputs, bucket: Bucket, *, evaluating: bool) -> None:
    """Pass a micro-batch of noise forward and backward, or only forward as the evaluation does."""
    recipe, engine, objective = run.recipe, run.engine, run.objective
    size, text = recipe.batch.micro_size, inputs.conditioning["empty_text"].dtype
    batch = synthetic(size, inputs.index.text_width, bucket, text_dtype=text)
    if not evaluating:
        if recipe.preservation.uses_base:
            batch = replace(batch, prompted=size * [True])
        engine.rehearse(partial(objective.loss, batch=batch))
        return
    with engine.evaluating(), torch.no_grad():
        objective.loss(engine.forward, batch)
        if recipe.validation.against_base:
            objective.loss(engine.forward_base, batch)


def lengths(index: Index, *, dropped: bool = False) -> list[list[Bucket]]:
    """The buckets by the number of their samples' tokens, the longest first; with `dropped` without their references, too."""
    found: dict[int, list[Bucket]] = {}
    buckets = list(index.bucket_counts())
    for bucket in dict.fromkeys([*buckets, *(each.alone for each in buckets if dropped)]):
        found.setdefault(bucket.all_tokens, []).append(bucket)
    return [found[tokens] for tokens in sorted(found, reverse=True)]


def synthetic(
    size: int,
    text_width: int,
    bucket: Bucket,
    *,
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
        references=[latent(each) for each in bucket.references],
    )
