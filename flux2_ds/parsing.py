"""A recipe from a YAML file and the command line, by jsonargparse. Pure, no torch."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from jsonargparse import SUPPRESS, ArgumentParser, Namespace, set_parsing_settings

from flux2_ds.recipe import Recipe

set_parsing_settings(docstring_parse_attribute_docstrings=True)

PATHS = (
    "run_dir",
    "deepspeed",
    "model.path",
    "data.images",
    "data.shards",
    "data.more_shards",
    "data.cache",
    "preview.references",
    "launch.hostfile",
)
"""Settings that are a path, several, or paths by name; `~/`, which a shell expands neither in YAML nor after `=`, is
the user's home in them."""


def recipe_parser(prog: str, description: str) -> ArgumentParser:
    """A parser for `--config FILE` and a dotted option for every setting of `Recipe`.

    Commands add their own options to it. Unknown keys and wrong types are errors that name the
    setting and the value.
    """
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s --config RECIPE [--SETTING VALUE ...]",  # not its hundred settings
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="Recipe in YAML.")
    # DeepSpeed's launcher passes the local rank as an option; the environment has it too.
    parser.add_argument("--local_rank", type=int | None, default=None, help=SUPPRESS)
    parser.add_class_arguments(Recipe, None)
    return parser


def parse_recipe(parser: ArgumentParser, argv: list[str] | None = None) -> tuple[Recipe, Any]:
    """Parse `argv` (default: the command line) into a `Recipe` and the command's own options.

    Relative paths in a recipe are relative to the current directory, like those on the command
    line, and `~/` is the user's home. Errors end the process with code 2 and a message that names the setting.
    """
    options = parser.parse_args(argv if argv is not None else sys.argv[1:])
    _expand_home(options)
    names = [item.name for item in dataclasses.fields(Recipe)]
    values = parser.instantiate(options)
    return Recipe(**{name: values[name] for name in names}), options


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read one recipe file, with dotted overrides such as `["--steps=10"]`."""
    parser = recipe_parser("recipe", "")
    return parse_recipe(parser, ["--config", str(path), *(overrides or [])])[0]


def _expand_home(settings: Namespace) -> None:
    """Put the user's home for `~/` into the paths of a parsed recipe."""
    for name in PATHS:
        settings[name] = _expanded(settings[name])


def _expanded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _expanded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    return str(Path(value).expanduser()) if str(value).startswith("~/") else value
