"""NVIDIA's cards: what each generation cannot multiply, memory and peaks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flux2_ds.config.recipe import Recipe


@dataclass(frozen=True)
class Card:
    """One GPU. `capability`: CUDA's compute capability; `gib`: its memory, where that is known."""

    name: str
    capability: tuple[int, int]
    gib: float = 0.0


_CARDS: dict[str, tuple[float, tuple[int, int], dict[str, float]]] = {
    "T4": (15.0, (7, 5), {}),
    "A100 40GB": (40.0, (8, 0), {"bf16": 312.0, "int8": 624.0}),
    "A100 80GB": (80.0, (8, 0), {"bf16": 312.0, "int8": 624.0}),
    "RTX 3090": (24.0, (8, 6), {"bf16": 71.0, "int8": 284.0}),
    "L40S": (44.9, (8, 9), {"bf16": 362.0, "fp8": 733.0, "int8": 733.0}),
    "RTX 4090": (23.9, (8, 9), {"bf16": 165.2, "fp8": 330.3, "int8": 660.6}),
    "H100 PCIe": (79.6, (9, 0), {"bf16": 756.0, "fp8": 1513.0, "int8": 1513.0}),
    "H100 NVL": (93.5, (9, 0), {"bf16": 835.0, "fp8": 1671.0, "int8": 1671.0}),
    "H100": (79.6, (9, 0), {"bf16": 989.5, "fp8": 1979.0, "int8": 1979.0}),
    "H200": (140.4, (9, 0), {"bf16": 989.5, "fp8": 1979.0, "int8": 1979.0}),
    "B200": (178.0, (10, 0), {"bf16": 2250.0, "fp8": 4500.0, "int8": 4500.0}),
    "RTX 5090": (31.8, (12, 0), {"bf16": 209.5, "fp8": 419.0, "int8": 838.0}),
}
"""Name -> memory in GiB, compute capability, and TFLOP/s of dense products with sums in fp32 (of int8 in int32) by
NVIDIA's data sheets. The first of which all words are in a card's name."""
CARD_NAMES = tuple(_CARDS)
_AMPERE, _ADA = (8, 0), (8, 9)
_NAMES = {_AMPERE: "Ampere", _ADA: "Ada, Hopper"}
_BASES = dict.fromkeys(("fp8", "nf4_fp8"), _ADA) | dict.fromkeys(
    ("int8", "nf4", "nf4_int8"), _AMPERE
)


def card_named(text: str) -> Card | None:
    """The card of a name such as RTX 3090, or NVIDIA A100-SXM4-80GB as its driver says; None if it is unknown."""
    key = _key(text)
    return Card(key, _CARDS[key][1], _CARDS[key][0]) if key else None


def peak_tflops(name: str, product: str) -> float | None:
    """Dense TFLOP/s of a card in bf16, fp8 or int8."""
    key = _key(name)
    return _CARDS[key][2].get(product) if key else None


def _key(text: str) -> str | None:
    words = set(re.split(r"[\s-]+", text.upper()))
    return next((name for name in _CARDS if words.issuperset(name.upper().split())), None)


def card_problem(recipe: Recipe, card: Card) -> str | None:
    """What of the recipe this card cannot compute, and what works on it instead."""
    base, other = recipe.base_weights, "remove base_weights"
    if multiplies(card, "int8"):
        other = f"set base_weights: {'nf4_int8' if base == 'nf4_fp8' else 'int8'}, or {other}"
    needs = (
        (recipe.precision == "bf16", "precision", _AMPERE, "set precision: fp16 and deepspeed: zero1"),
        (recipe.attention in ("cudnn", "flash", "flash_attn"), "attention", _AMPERE, "set attention: auto"),
        (recipe.compute == "fp8", "compute", _ADA, "remove compute"),
        (base is not None, "base_weights", _BASES.get(str(base), (0, 0)), other),
    )  # fmt: skip
    for uses, setting, needed, remedy in needs:
        if uses and card.capability < needed:
            return (
                f"{setting} is {getattr(recipe, setting)}, which needs {_NAMES[needed]} or newer; the GPU is "
                f"{card.name}. Use another GPU, or {remedy}."
            )
    return None


def multiplies(card: Card, base_weights: str | None) -> bool:
    """Whether the card can compute with a base held so."""
    return card.capability >= _BASES.get(str(base_weights), (0, 0))
