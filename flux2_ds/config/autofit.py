"""What would fit on a card: ZeRO stage × base weights × activation checkpointing, the fastest first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from flux2_ds.config.memory import TRANSPOSED, Memory, base_bytes, estimate
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.plan import Plan, compiles, make_plan
from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import UserError

_STAGES = (
    *("zero0", "zero1", "zero2", "zero2_offload"),
    *("zero3", "zero3_offload_optimizer", "zero3_offload"),
)
_Base = Literal["fp8", "nf4_fp8", "int8", "nf4"] | None
_BASES: tuple[_Base, ...] = (None, "fp8", "nf4_fp8", "int8", "nf4")
_ACTIVATIONS = [(share, False) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] + [(1.0, True)]
"""Share of checkpointed blocks, and whether their inputs wait in host memory."""

# TFLOP/s of an H100 in the frozen products, expansion and quantisation included, and in attention.
_PRODUCTS = {None: 700, "bf16": 700, "fp8": 1200, "nf4_fp8": 1000, "int8": 650, "nf4": 600}
_ATTENTION = 500
_HOST_LINK, _CARD_MEMORY = 25e9, 2.7e12  # bytes a second


@dataclass(frozen=True)
class Choice:
    """One way to run a recipe, and what it takes; `cost` orders the choices and is no prediction."""

    deepspeed: str
    base_weights: str | None
    activation_checkpointing: float
    offload_activations: bool
    memory: Memory
    cost: float


def choices(
    recipe: Recipe,
    spec: Spec,
    processes: int,
    image_tokens: int,
    card_bytes: float,
    host_bytes: float,
) -> list[Choice]:
    """All that fit with so many bytes of card and of host memory for each process, the fastest first."""
    found = []
    for deepspeed in _STAGES:
        for base in _BASES if recipe.method != "full" else (None,):
            changed = dataclasses.replace(
                recipe,
                deepspeed=deepspeed,
                base_weights=base,
                cache_transposed_base=recipe.cache_transposed_base
                and None,  # not every base can be
            )
            for share, offload in _ACTIVATIONS:
                offload = offload or recipe.offload_activations
                tried = dataclasses.replace(changed, offload_activations=offload)
                try:
                    plan = make_plan(tried, processes)
                except UserError:
                    continue  # a combination that does not exist
                memory = estimate(
                    spec, plan, image_tokens, spec.blocks - round(share * spec.blocks), card_bytes
                )
                if memory.fits(card_bytes, host_bytes):
                    cost = _cost(spec, plan, image_tokens, share, memory)
                    found.append(Choice(deepspeed, base, share, offload, memory, cost))
                    break  # with this stage and base nothing is faster
    return sorted(found, key=lambda choice: (choice.cost, _STAGES.index(choice.deepspeed)))


def _cost(spec: Spec, plan: Plan, image_tokens: int, again: float, memory: Memory) -> float:
    recipe = plan.recipe
    linear, attention = spec.forward_flops(image_tokens)
    passes = (3 if recipe.method == "full" else 2) + again
    seconds = passes * linear / (_PRODUCTS[recipe.base_weights] * 1e12)
    # Weights that are held transposed are not read and written once more.
    seconds -= 2 * memory.card.get(TRANSPOSED, 0) / _CARD_MEMORY
    seconds += (3.5 + again) * attention / (_ATTENTION * 1e12)
    if not compiles(recipe):
        seconds *= 1.35
    if "base weights" in memory.host:
        seconds += (2 + again) * base_bytes(spec, recipe.base_weights, 2) / _HOST_LINK
    moved = memory.host.get("optimizer", 0) + 2 * memory.host.get("activations", 0)
    return seconds + moved / _HOST_LINK
