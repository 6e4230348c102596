"""What would fit on a card: ZeRO stage × base weights and their placement × activation checkpointing, the fastest
first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flux2_ds.config.cards import Card, multiplies
from flux2_ds.config.memory import (
    TRANSPOSED,
    Memory,
    base_bytes,
    estimate,
    kept_blocks,
    streamed_bytes,
)
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.plan import Plan, compiles, make_plan
from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import UserError

_STAGES = (
    *("zero0", "zero1", "zero2", "zero2_offload"),
    *("zero3", "zero3_offload_optimizer", "zero3_offload"),
)
_Base = Literal["fp8", "nf4_fp8", "int8", "nf4", "nf4_int8"] | None
_BASES: tuple[_Base, ...] = (None, "fp8", "nf4_fp8", "int8", "nf4", "nf4_int8")
_ACTIVATIONS = [(share, False) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] + [(1.0, True)]
"""Share of checkpointed blocks, and whether their inputs wait in host memory."""

# TFLOP/s of an H100 in the frozen products, expansion and quantisation included, and in attention.
_PRODUCTS = {
    None: 700,
    "bf16": 700,
    "fp8": 1200,
    "int8": 650,
    "nf4": 600,
    "nf4_fp8": 1000,
    "nf4_int8": 560,
}
_TRAINED_FP8 = 950
"""The same of `compute: fp8`, by arithmetic: products at 1,400, and three operands in both orientations at 2.5 TB/s."""
_ATTENTION = 500
_CARD_MEMORY = 2.7e12  # bytes a second
_CPU_MEMORY, _NOT_PINNED = 51e9, 13e9  # of Adam on 16 cores, and of copies to an H200

LINKS = {"pcie3": 12.5e9, "pcie4": 25e9, "pcie5": 48e9, "nvlink": 290e9}
"""Bytes a second of `launch.link`. pcie5 was measured between an H200 and its host, older ones have half of the
next one's; nvlink is a block's all-gather by NVLink 4's nominal rate."""


CHOSEN = (
    *("deepspeed", "base_weights", "activation_checkpointing", "offload_activations"),
    *("cache_transposed_base", "base_placement", "base_resident"),
)
"""The settings in which choices differ."""


@dataclass(frozen=True)
class Room:
    """What a run has: so many processes, each with so many bytes of card and of host memory, and the image tokens
    of its longest sample. `card`: which one it is, where that is known."""

    processes: int
    image_tokens: int
    card_bytes: float
    host_bytes: float
    card: Card | None = None


@dataclass(frozen=True)
class Choice:
    """One way to run a recipe, and what it takes; `cost` orders the choices and is no prediction."""

    recipe: Recipe
    memory: Memory
    cost: float


def choices(recipe: Recipe, spec: Spec, room: Room) -> list[Choice]:
    """All that fit and that the card can multiply, the fastest first."""
    found = []
    bases = _BASES if recipe.method != "full" else (None,)
    if room.card is not None:
        bases = tuple(base for base in bases if multiplies(room.card, base))
    for deepspeed in _STAGES:
        for base in bases:
            changed = replace(
                recipe,
                deepspeed=deepspeed,
                base_weights=base,
                base_placement="gpu",
                base_resident=0.0,
                cache_transposed_base=recipe.cache_transposed_base
                and None,  # not every base can be
            )
            fitting = _fitting(changed, spec, room)
            if fitting is None and recipe.method != "full":
                elsewhere = [
                    _fitting(each, spec, room) for each in _placements(changed, (0.5, 0.0))
                ]
                fitting = min(filter(None, elsewhere), key=lambda c: c.cost, default=None)
            if fitting is not None:
                found.append(fitting)
    return sorted(found, key=lambda c: (c.cost, _STAGES.index(str(c.recipe.deepspeed))))


def place_base(recipe: Recipe, spec: Spec, room: Room) -> Recipe:
    """Decide `base_placement: auto`: on the card if it fits, or if nothing does; else where it costs least.

    Every process must be given the same numbers.
    """
    if recipe.base_placement != "auto":
        return recipe
    everywhere = replace(recipe, base_placement="gpu", base_resident=0.0)
    fitting = []
    for tried in (everywhere, *_placements(recipe, [share / 8 for share in range(8)])):
        try:
            plan = make_plan(tried, room.processes)
        except UserError:
            continue
        kept = kept_blocks(spec, plan, room.image_tokens, room.card_bytes)
        memory = estimate(spec, plan, room.image_tokens, kept, room.card_bytes)
        if memory.fits(room.card_bytes, room.host_bytes):
            if tried is everywhere:
                return everywhere
            cost = _cost(spec, plan, room.image_tokens, 1 - kept / spec.blocks, memory)
            fitting.append((cost, tried))
    return min(fitting, key=lambda each: each[0], default=(0, everywhere))[1]


def _placements(recipe: Recipe, shares: Sequence[float]) -> Iterator[Recipe]:
    for share in shares:
        for placement in ("sharded", "host"):
            yield replace(recipe, base_placement=placement, base_resident=share)


def _fitting(recipe: Recipe, spec: Spec, room: Room) -> Choice | None:
    """The recipe with the fewest checkpointed blocks that fits."""
    plan = None
    for share, offload in _ACTIVATIONS:
        offload = offload or recipe.offload_activations
        if plan is None or plan.recipe.offload_activations != offload:
            try:
                plan = make_plan(replace(recipe, offload_activations=offload), room.processes)
            except UserError:
                return None  # a combination that does not exist
        kept = spec.blocks - round(share * spec.blocks)
        memory = estimate(spec, plan, room.image_tokens, kept, room.card_bytes)
        if memory.fits(room.card_bytes, room.host_bytes):
            cost = _cost(spec, plan, room.image_tokens, share, memory)
            return Choice(replace(plan.recipe, activation_checkpointing=share), memory, cost)
    return None


def _cost(spec: Spec, plan: Plan, image_tokens: int, again: float, memory: Memory) -> float:
    recipe = plan.recipe
    linear, attention = spec.forward_flops(image_tokens)
    passes = (3 if recipe.method == "full" else 2) + again
    seconds = passes * linear / (_PRODUCTS[recipe.base_weights] * 1e12)
    if recipe.compute == "fp8":  # all blocks but two
        inner = (spec.blocks - 2) / spec.blocks
        seconds *= 1 - inner * (1 - _PRODUCTS[None] / _TRAINED_FP8)
    # Weights that are held transposed are not read and written once more.
    seconds -= 2 * memory.card.get(TRANSPOSED, 0) / _CARD_MEMORY
    seconds += (3.5 + again) * attention / (_ATTENTION * 1e12)
    if not compiles(recipe):
        seconds *= 1.35
    given = recipe.launch.link
    link = LINKS["pcie5" if given == "nvlink" else given]
    if recipe.base_placement != "gpu":  # a copy or an all-gather that goes on meanwhile
        between = LINKS[given] if plan.shard_group else link
        seconds = max(seconds, moved_bytes(plan, spec) / between)
    elif "base weights" in memory.host:
        seconds += (2 + again) * base_bytes(spec, recipe.base_weights, 2) / link
    seconds += 2 * memory.host.get("activations", 0) / link
    images = recipe.batch.micro_size * plan.accumulation
    return seconds + _offloaded_update(plan, memory, link) / images


def _offloaded_update(plan: Plan, memory: Memory, link: float) -> float:
    """Seconds a step of an optimizer in host memory: masters and moments pass through the card, and so do sums of
    gradients with each micro-batch; at stage 3 a CPU updates, and the weights come back in fp32, not pinned."""
    masters = memory.host.get("fp32 masters", 0.0)
    state = masters + memory.host.get("optimizer", 0.0)
    sums = masters * 2 * plan.accumulation if memory.host.get("gradients") else 0.0
    if plan.zero_stage == 3:
        return 28 / 12 * state / _CPU_MEMORY + masters / _NOT_PINNED + sums / link
    return (state + sums) / link


def moved_bytes(plan: Plan, spec: Spec) -> float:
    """Bytes of a streamed base that come to each card in a micro-batch: every block for each direction, but for
    the two that are still there when the direction turns."""
    streamed = streamed_bytes(plan.recipe, spec)
    passing = 2 * sum(streamed) - sum(streamed[:2]) - sum(streamed[-2:])
    return passing * (1 if plan.shard_group is None else 1 - 1 / plan.shard_group)
