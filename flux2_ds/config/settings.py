"""What stands beside a setting's type in `recipe.py`: its range, whether it is a path, and whether a run may
go on with another value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from flux2_ds.errors import UserError, shown


@dataclass(frozen=True)
class Range:
    """What a value must be; of a list or dict, each item. `rule` completes "it must be"."""

    rule: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Range:
    """From `low` on."""
    return Range(f"at least {low}", lambda v: v >= low)


def between(low: float, high: float) -> Range:
    """From `low` to `high`, both included."""
    return Range(f"between {low} and {high}", lambda v: low <= v <= high)


def multiple_of(step: int, high: int) -> Range:
    """`step`, 2·`step`, ... up to `high`."""
    return Range(f"a multiple of {step}, at most {high}", lambda v: 0 < v <= high and v % step == 0)


POSITIVE = Range("positive", lambda v: v > 0)
NOT_NEGATIVE = Range("0 or more", lambda v: v >= 0)
BELOW_ONE = Range("in [0, 1)", lambda v: 0 <= v < 1)
SEED = Range("between 0 and 2⁶⁴ - 1", lambda v: 0 <= v < 2**64)


@dataclass(frozen=True)
class MayChange:
    """A run may go on with another value of the setting, or of any in the section: what is computed stays the
    same. `if_`: only then, judged by the new values under their dotted names."""

    if_: Callable[[dict[str, Any]], bool] = lambda _: True


MAY_CHANGE = MayChange()
"""Without it a change needs `accept_changes`."""
PATH = "path"
"""A path, or several: `~/` is the user's home."""


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe."""

    name: str
    """Dotted."""
    owner: type
    field: dataclasses.Field[Any]
    hint: Any
    """Its type, without the marks."""
    marks: tuple[Any, ...]
    """Of the setting and its section."""

    @property
    def help(self) -> str:
        """What its docstring says."""
        return help_of(self.owner).get(self.field.name, "")

    @property
    def default(self) -> Any:
        """As YAML has it; `dataclasses.MISSING` of a setting that must be given."""
        make, value = self.field.default_factory, self.field.default
        value = value if make is dataclasses.MISSING else make()
        return list(value) if isinstance(value, tuple) else value


@cache
def help_of(kind: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, in one line."""
    params = parse_from_object(kind).params
    return {each.arg_name: " ".join((each.description or "").split()) for each in params}


@cache
def settings_of(kind: type) -> dict[str, Setting]:
    """The settings below a dataclass, by their dotted names."""
    return {setting.name: setting for setting in _walk(kind, "", ())}


def _walk(kind: type, prefix: str, outer: tuple[Any, ...]) -> Iterator[Setting]:
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, marks = hints[field.name], outer
        if get_origin(hint) is Annotated:
            hint, *own = get_args(hint)
            marks = (*outer, *own)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _walk(hint, f"{prefix}{field.name}.", marks)
        else:
            yield Setting(f"{prefix}{field.name}", kind, field, hint, marks)


def check_ranges(kind: type, recipe: Any) -> None:
    """Refuse a value outside its setting's range."""
    for setting in settings_of(kind).values():
        value = attrgetter(setting.name)(recipe)
        ranges = [mark for mark in setting.marks if isinstance(mark, Range)]
        if isinstance(value, dict):
            for name, each in value.items():
                _check_range(f"{setting.name}.{name}", each, ranges)
        elif value is not None:
            _check_range(setting.name, value, ranges)


def _check_range(name: str, value: Any, ranges: list[Range]) -> None:
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, float) and not math.isfinite(each):
            raise UserError(f"{name} is {value}; it must be a finite number.")
        if isinstance(each, int) and abs(each) >= 10**12 and SEED not in ranges:
            # No machine counts so far, and a date ends at 10¹³ s.
            raise UserError(f"{name} is {shown(str(each))}; it must be below 10¹².")
        for range_ in ranges:
            if not range_.holds(each):
                raise UserError(f"{name} is {value}; it must be {range_.rule}.")


def changes(kind: type, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings, old and new, with which a run of the recipe `before` may not go on as `now`; both as
    `recipe_values` gives them."""
    old, new = flat(before, kind), flat(now, kind)
    return [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and not _may_change(kind, name, new)
    ]


def _may_change(kind: type, name: str, new: dict[str, Any]) -> bool:
    setting = settings_of(kind).get(name)
    return setting is not None and any(
        mark.if_(new) for mark in setting.marks if isinstance(mark, MayChange)
    )


def flat(values: dict[str, Any], kind: type, prefix: str = "") -> dict[str, Any]:
    """Values of a dataclass, as `recipe_values` gives them, by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in settings_of(kind):
            found |= flat(value, kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
