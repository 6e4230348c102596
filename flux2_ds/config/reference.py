"""docs/recipes.md: every setting, from the dataclasses. `make docs` writes it."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from flux2_ds.config.parse import recipe_purposes
from flux2_ds.config.recipe import Recipe
from flux2_ds.config.settings import MayChange, Range, Setting, settings_of

_INTRO = """\
# Recipes

A recipe is a YAML file with what differs from the defaults below. `--config` takes a file or the name of a
shipped recipe; a second `--config` is laid over the first; every setting is also an option:
`--lora.rank 64`. `flux2-ds train --config R --print_config` prints a recipe with every default written out.

**\\*** A run may continue with another value of the setting. Any other change needs `accept_changes: true`.

(`make docs` writes this page from `flux2_ds/config/recipe.py` and `recipes/`.)

## Shipped recipes

| name | for |
|---|---|
"""
_WORDS = {bool: "true, false", int: "integer", float: "number", str: "text", type(None): "null"}


def page() -> str:
    """The page in Markdown."""
    text = _INTRO
    for name, purpose in recipe_purposes().items():
        text += f"| [`{name}`](../recipes/{name}.yaml) | {purpose} |\n"
    section = None
    for setting in sorted(settings_of(Recipe).values(), key=lambda s: "." in s.name):
        if setting.owner is not section:
            section = setting.owner
            name = setting.name.rpartition(".")[0]
            title = f"`{name}`" if name else "Top level"
            text += f"\n## {title}\n\n{' '.join(str(section.__doc__).split())}\n\n| setting | value | default | |\n|---|---|---|---|\n"
        text += f"| {' | '.join(_cell(value) for value in _row(setting))} |\n"
    return text


def _row(setting: Setting) -> tuple[str, str, str, str]:
    short = setting.name.rpartition(".")[2]
    star = "*" if any(isinstance(mark, MayChange) for mark in setting.marks) else ""
    ranges = [mark.rule for mark in setting.marks if isinstance(mark, Range)]
    return (
        f"`{short}`{star}",
        ", ".join([_words(setting.hint), *ranges]),
        _default(setting),
        setting.help,
    )


def _default(setting: Setting) -> str:
    if setting.default is dataclasses.MISSING:
        return "required"
    text = yaml.safe_dump(setting.default, default_flow_style=True, width=1000)
    shown = text.removesuffix("...\n")
    return f"`{shown.strip()}`"


def _words(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(each) for each in args)
    if origin in (list, tuple):
        return f"list of {_words(args[0])}"
    if origin is dict:
        return "values by name"
    return _WORDS[hint]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    Path("docs/recipes.md").write_text(page(), encoding="utf-8")
