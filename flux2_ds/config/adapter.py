"""Which linears an adapter changes, and by how much: the settings of `lora` on a model of some size."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple, TypeVar

from flux2_ds.config.model_spec import TARGETS, Spec, linear_shapes, target_modules
from flux2_ds.config.recipe import Lora, Recipe
from flux2_ds.errors import UserError, shown

ADAPTER_FIELDS = ("rank", "alpha", "rslora", "targets", "rank_pattern", "alpha_pattern")
"""The settings of `lora` that decide an adapter's tensors and scales."""


class AdaptedLinear(NamedTuple):
    """W [rows, columns] with an update of rank r, multiplied by `scale`."""

    rows: int
    columns: int
    rank: int
    alpha: float
    scale: float
    """alpha / r; of rsLoRA alpha / √r (arXiv 2312.03732, equation 4)."""

    def tensors(self, *, dora: bool) -> list[int]:
        """Elements of A, B and a DoRA's magnitudes."""
        return [self.rank * self.columns, self.rank * self.rows] + [self.rows] * dora


def adapted_linears(spec: Spec, settings: Lora) -> dict[str, AdaptedLinear]:
    """The linears that the settings adapt, by diffusers' names, in the order of the model's blocks.

    Raises:
        UserError: a name or pattern that matches no linear, or is no regular expression.
    """
    shapes, targets = linear_shapes(spec), settings.targets
    if isinstance(targets, str) and targets in TARGETS:
        names: Iterable[str] = target_modules(spec, targets)
    else:
        asked = [targets] if isinstance(targets, str) else targets
        if not asked:
            raise UserError("lora.targets is []; it must name a linear or more.")
        chosen = {name for each in asked for name in _matches("lora.targets", each, shapes)}
        names = [name for name in shapes if name in chosen]
    ranks = _by_pattern("lora.rank_pattern", settings.rank_pattern, names)
    alphas = _by_pattern("lora.alpha_pattern", settings.alpha_pattern, names)
    found = {}
    for name in names:
        rank = ranks.get(name, settings.rank)
        alpha = alphas.get(name, rank if settings.alpha is None else settings.alpha)
        scale = alpha / (math.sqrt(rank) if settings.rslora else rank)
        found[name] = AdaptedLinear(*shapes[name], rank, alpha, scale)
    return found


_Number = TypeVar("_Number", int, float)


def _by_pattern(
    setting: str, patterns: dict[str, _Number], names: Iterable[str]
) -> dict[str, _Number]:
    """Each name's value of the first pattern that matches it, as in PEFT."""
    values: dict[str, _Number] = {}
    for pattern, value in patterns.items():
        for name in _matches(setting, pattern, names):
            values.setdefault(name, value)
    return values


def _matches(setting: str, pattern: str, names: Iterable[str]) -> list[str]:
    """The names that end in what `pattern` matches, from a dot or their start on."""
    try:
        found = [name for name in names if re.fullmatch(rf"(.*\.)?({pattern})", name)]
    except re.error as error:
        raise UserError(
            f"{setting}: {shown(pattern)} is no regular expression ({error})."
        ) from error
    if not found:
        some = sorted({re.sub(r".*blocks\.\d+\.", "", name) for name in names})
        sets = f"one of {', '.join(TARGETS)}, or " if setting == "lora.targets" else ""
        raise UserError(
            f"{setting}: {shown(pattern)} matches no linear. Give {sets}an expression for the end of names such "
            f"as {next(iter(names))}; the linears: {', '.join(some)}."
        )
    return found


def adapter_tensors(spec: Spec, recipe: Recipe) -> list[int]:
    """Elements of each of the adapter's tensors."""
    dora = recipe.method == "dora"
    linears = adapted_linears(spec, recipe.lora).values()
    return [elements for linear in linears for elements in linear.tensors(dora=dora)]


def adapter_line(spec: Spec, recipe: Recipe) -> str:
    """How many linears are adapted, with which ranks, for people."""
    linears = adapted_linears(spec, recipe.lora)
    ranks = Counter(linear.rank for linear in linears.values())
    of_rank = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(ranks.items()))
    return f"{sum(adapter_tensors(spec, recipe)):,} parameters in {len(linears)} linears: {of_rank}"


def of_rank(settings: Lora, rank: Callable[[int], int]) -> Lora:
    """The settings of an adapter of other ranks, whose factors have the scale in them."""
    ranks = {pattern: rank(each) for pattern, each in settings.rank_pattern.items()}
    return replace(
        settings,
        rank=rank(settings.rank),
        rank_pattern=ranks,
        alpha=None,
        alpha_pattern={},
        rslora=False,
    )


def merges(settings: Lora) -> list[tuple[str, float]]:
    """The files of `merge_first` with their strengths."""
    strengths = settings.merge_strengths or [1.0] * len(settings.merge_first)
    return list(zip(settings.merge_first, strengths, strict=True))


def targets_line(targets: str | list[str]) -> str:
    """The targets, for people."""
    if isinstance(targets, str) or len(targets) > 6:
        return targets if isinstance(targets, str) else f"{len(targets)} linears by name"
    return ", ".join(targets)
