"""A recipe from a YAML file and the command line, by jsonargparse; the shipped files by name."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentParser, Namespace, set_parsing_settings

from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import UserError

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


RENAMED = {
    "activations": "activation_checkpointing (none for keep, full for recompute, 1 - x for a share x)",
    "transposed_base": "cache_transposed_base",
    "data.held_out": "data.validation_fraction",
    "data.readers": "data.num_workers",
    "evaluation": "validation",
    "objective.timesteps": "objective.timestep_sampling",
    "objective.mean": "objective.logit_mean",
    "objective.std": "objective.logit_std",
    "prepare.text_batch": "prepare.text_batch_size",
    "prepare.image_batch": "prepare.image_batch_size",
    "launch.hang_after": "launch.hang_timeout_s",
    "picture": "image",
    "prepare.processes": "launch.processes",
}
"""Settings that had another name once."""
GONE = {"launch.over": "ssh is the one transport"}
"""Settings that there are no more, and why."""


class RecipeParser(ArgumentParser):
    """A parser whose `--print_config` prints a recipe: the settings that every command takes."""

    def dump(self, cfg: Namespace, **options: Any) -> str:
        """The settings in YAML."""
        settings = cfg.clone()
        for name in vars(cfg).keys() - {item.name for item in dataclasses.fields(Recipe)}:
            settings.pop(name)
        text: str = super().dump(settings, **options)
        return text


def recipe_parser(prog: str, description: str) -> ArgumentParser:
    """A parser for `--config FILE` and a dotted option for every setting of `Recipe`.

    Commands add their own options to it. Unknown keys and wrong types are errors that name the
    setting and the value.
    """
    parser = RecipeParser(
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
    line, and `~/` is the user's home. Errors of jsonargparse end the process with code 2 and a message that names
    the setting.

    Raises:
        UserError: a file that is no recipe, or a setting without its value.
    """
    argv = sys.argv[1:] if argv is None else argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    for file in map(Path, finder.parse_known_args(argv)[0].config):
        if file.is_file():  # jsonargparse says if not
            _check_file(file)
    _refuse_renamed(
        (word[2:].partition("=")[0] for word in argv if word[:2] == "--"), "the command line"
    )
    options = parser.parse_args(argv)
    _refuse_empty(options, Recipe)
    _expand_home(options)
    names = [item.name for item in dataclasses.fields(Recipe)]
    values = parser.instantiate(options)
    return Recipe(**{name: values[name] for name in names}), options


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read one recipe file, with dotted overrides such as `["--steps=10"]`."""
    parser = recipe_parser("recipe", "")
    return parse_recipe(parser, ["--config", str(path), *(overrides or [])])[0]


def _check_file(path: Path) -> None:
    """Refuse what YAML would not read, or would read as something else than settings, each given once.

    Raises:
        UserError: naming the file, and the place.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path} is no YAML at line {line}: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {error}.") from error
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None else "holds no settings"
        raise UserError(f"{path} {what}. A recipe has lines such as `steps: 1000`.")
    settings = [(key.value, value) for key, value in root.value]
    inside = [
        (name, value.value) for name, value in settings if isinstance(value, yaml.MappingNode)
    ]
    nested = [f"{name}.{key.value}" for name, pairs in inside for key, _ in pairs]
    _refuse_renamed([name for name, _ in settings] + nested, str(path))
    nodes: list[yaml.Node] = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if lines.setdefault(str(key.value), line) != line:
                raise UserError(
                    f"{path} has {key.value} twice, at lines {lines[key.value]} and {line}. Put both into one."
                )
            nodes.append(value)


def _refuse_renamed(names: Iterable[str], where: str) -> None:
    for name in names:
        for old in (name, str(name).partition(".")[0]):
            if old in RENAMED:
                raise UserError(f"{old}, in {where}, is called {RENAMED[old]} now. Rename it.")
            if old in GONE:
                raise UserError(f"{old}, in {where}, is gone: {GONE[old]}. Leave it out.")


def _refuse_empty(settings: Any, kind: type, within: str = "") -> None:
    """Refuse null where a setting must have a value; jsonargparse lets it pass in files."""
    for name, hint in get_type_hints(kind).items():
        value, known = settings[name], f"{within}{name}"
        if value is None and type(None) not in get_args(hint):
            raise UserError(f"{known} is empty (null). Give its value, or remove the line.")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            _refuse_empty(value, hint, f"{known}.")


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


_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_directory(name: str) -> Path:
    """The directory of shipped files called `name` ("ds_configs" or "recipes")."""
    installed, checkout = _PACKAGE / name, _PACKAGE.parent / name
    return installed if installed.is_dir() else checkout
