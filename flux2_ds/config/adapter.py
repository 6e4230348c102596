"""Which linears an adapter changes, and by how much: the settings of `lora` on a model of some size."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple, TypeVar

from flux2_ds.config.model_spec import TARGETS, Spec, linear_shapes, target_modules
from flux2_ds.config.recipe import Lora, Recipe
from flux2_ds.errors import UserError, shown

ADAPTER_FIELDS = (
    "rank", "alpha", "rslora", "targets", "rank_pattern", "alpha_pattern", "factor", "decompose_both",
)  # fmt: skip
"""The settings of `lora` that decide an adapter's tensors and scales."""
ADAPTER_KINDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
"""Method -> its name in the field."""


class AdaptedLinear(NamedTuple):
    """W [rows, columns] with an update of rank r, multiplied by `scale`."""

    rows: int
    columns: int
    rank: int
    alpha: float
    scale: float
    """alpha / r; of rsLoRA alpha / √r (arXiv 2312.03732, equation 4)."""
    kronecker: Kronecker

    def tensors(self, method: str) -> list[int]:
        """Elements of the adapter's tensors."""
        low_rank = [self.rank * self.columns, self.rank * self.rows]
        if method == "lokr":
            return self.kronecker.tensors(self.rank)
        return {"lora": low_rank, "dora": [*low_rank, self.rows], "loha": 2 * low_rank}[method]

    def kept(self, method: str) -> int:
        """Elements for each token that the backward pass needs beside those of a LoRA."""
        if method == "lokr":
            (_, b), (c, _) = self.kronecker.shape
            return c * (b + self.rank * (not self.kronecker.full[1]))
        return self.rank**2 if method == "loha" else 0


class Kronecker(NamedTuple):
    """How a LoKr takes a linear apart: W1 [a, c] ⊗ W2 [b, d] for W [a·b, c·d]."""

    shape: tuple[tuple[int, int], tuple[int, int]]
    """((a, b), (c, d))."""
    full: tuple[bool, bool]
    """Whether W1 and W2 are full matrices, not products of rank r."""

    def tensors(self, rank: int) -> list[int]:
        """Elements of the tensors of W1 and W2."""
        sides = zip(*self.shape, strict=True)
        parts = [
            [m * n] if full else [m * rank, rank * n]
            for (m, n), full in zip(sides, self.full, strict=True)
        ]
        return parts[0] + parts[1]


def kronecker(rows: int, columns: int, rank: int, settings: Lora) -> Kronecker:
    """As LyCORIS and PEFT's LoKr do it."""
    (a, b), (c, d) = _divided(rows, settings.factor), _divided(columns, settings.factor)
    full = not settings.decompose_both or 2 * rank >= max(a, c), 2 * rank >= max(b, d)
    return Kronecker(((a, b), (c, d)), full)


@cache  # a model has few sizes, and many linears
def _divided(size: int, factor: int | None) -> tuple[int, int]:
    """`factor` and the other one of `size`; the largest divisor up to it and to √size, if it is none."""
    if factor is None or size % factor:
        highest = min(math.isqrt(size), factor or size)
        factor = next(m for m in range(highest, 0, -1) if size % m == 0)
    return factor, size // factor


def common_factor(what: str, shapes: Iterable[Sequence[tuple[int, int]]]) -> int | None:
    """The `lora.factor` that takes all linears of `what` apart into W1 and W2 of these shapes.
    Refuses a factor that cannot.
    """
    found = [((a, b), (c, d)) for (a, c), (b, d) in shapes]
    for factor in (None, *sorted({a for (a, _), _ in found if a > 1})):
        if all(_divided(m * n, factor) == (m, n) for sides in found for m, n in sides):
            return factor
    raise UserError(
        f"{what} takes its linears apart by several factors, which lora.factor cannot. Name another file."
    )


def adapted_linears(spec: Spec, settings: Lora) -> dict[str, AdaptedLinear]:
    """The linears that the settings adapt, by diffusers' names, in the order of the model's blocks.
    Refuses a name or pattern that matches none.
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
        rows, columns = shapes[name]
        parts = kronecker(rows, columns, rank, settings)
        found[name] = AdaptedLinear(rows, columns, rank, alpha, scale, parts)
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
    linears = adapted_linears(spec, recipe.lora).values()
    return [elements for linear in linears for elements in linear.tensors(recipe.method)]


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
