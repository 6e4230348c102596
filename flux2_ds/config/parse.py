"""A recipe from a YAML file and the command line, by jsonargparse; the shipped files by name."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import SUPPRESS, ArgumentParser, Namespace

from flux2_ds.config.recipe import IN_EPOCHS, Recipe
from flux2_ds.config.settings import PATH, flat, settings_of
from flux2_ds.errors import USER_INFO, UserError, did_you_mean, shown

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
RENAMED_RECIPES = {
    "rtx4090": "gpu24gb-dev",
    "rtx4090-zero3-offload": "gpu24gb-dev-bf16",
    "rtx4090-klein9b": "gpu24gb-klein9b",
    "rtx4090-klein4b": "gpu24gb-klein4b",
    "rtx4090-klein4b-full": "gpu24gb-klein4b-full",
}
"""Shipped recipes that had another name once."""


_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 1 << 16, 10_000, 100
"""Of a recipe, whose reading must not take longer than a moment."""
_SECTIONS = {name.partition(".")[0]: name for name in reversed(settings_of(Recipe)) if "." in name}
"""Each section, and its first setting."""


class RecipeParser(ArgumentParser):
    """A parser whose `--print_config` prints a recipe: the settings that every command takes."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse in one line, in words that a setting's type has for people."""
        raise UserError(_in_one_line(message, self))

    def parse_path(self, path: Any, **options: Any) -> Namespace:
        """The settings in a file, which is UTF-8 whatever the locale."""
        text = Path(path).read_text(encoding="utf-8-sig")
        settings: Namespace = self.parse_string(text, Path(path).name, **options)
        return settings

    def format_help(self, *given: Any) -> str:
        """What `--help` prints. Reading the settings' docstrings would be a third of every other start."""
        for action in self._actions:
            if action.dest in settings_of(Recipe):
                action.help = settings_of(Recipe)[action.dest].help
        for name, group in (self.groups or {}).items():
            owner = settings_of(Recipe)[_SECTIONS.get(name, "seed")].owner
            group.title = _first_sentence(" ".join(str(owner.__doc__).split()))
        return str(super().format_help(*given))

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
    """
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if "\0" in word or (not word.isascii() and re.search("[\ud800-\udfff]", word)):
            raise UserError(f"{shown(word)} has a character that no text may have.")
        if re.search(r"(^|[=+-])\d{101,}$", word):
            raise UserError(f"{shown(word)} is no number for a setting.")
    argv = _with_files(argv)
    for word in argv:
        if word.startswith("--config="):
            _check_file(Path(word.removeprefix("--config=")))
    _refuse_renamed(
        (word[2:].partition("=")[0] for word in argv if word[:2] == "--"), "the command line"
    )
    options = parser.parse_args(argv)
    _refuse_empty(options)
    _choose_length(options, given_settings(argv))
    _expand_home(options)
    names = [item.name for item in dataclasses.fields(Recipe)]
    values = parser.instantiate(options)
    recipe = Recipe(**{name: values[name] for name in names})
    check_urls(recipe)  # before anything reads them, and says so
    return recipe, options


def given_settings(argv: list[str]) -> dict[str, str]:
    """Each setting that `argv`, as `_with_files` gives it, or one of its files has, and where it is given
    last: the file's name, or "the command line". Those that are given last come last."""
    given: dict[str, str] = {}
    for word in argv:
        name, _, value = word.partition("=")
        names, where = [name[2:]] if name.startswith("--") else [], "the command line"
        if name == "--config":
            with Path(value).open(encoding="utf-8-sig") as file:
                names, where = list(flat(yaml.safe_load(file), Recipe)), value
        for setting in names:
            if setting in settings_of(Recipe):
                given.pop(setting, None)
                given[setting] = where
    return given


def origin_lines(argv: list[str]) -> list[str]:
    """Which settings each file and the command line decide, for people; none where all are of one place."""
    given = given_settings(_with_files(argv))
    for pair in IN_EPOCHS.items():
        if set(pair) <= given.keys():  # the earlier one does not count
            del given[min(pair, key=list(given).index)]
    places: dict[str, list[str]] = {}
    for setting, where in given.items():
        places.setdefault(where, []).append(setting)
    if len(places) < 2:
        return []
    first, *later = places
    lines = [f"settings   {', '.join(places[where])}: {where}" for where in later]
    return [*lines, f"settings   all others: {first}"]


def _choose_length(options: Namespace, given: dict[str, str]) -> None:
    """Of a setting in epochs and the same one in steps keep the one that is given last; both in one place are refused."""
    order = list(given)
    for epochs, steps in IN_EPOCHS.items():
        if {epochs, steps} - given.keys() or None in (options[epochs], options[steps]):
            continue
        if given[epochs] == given[steps]:
            raise UserError(
                f"{steps} is {options[steps]} and {epochs} is {options[epochs]:g}, both in {given[steps]}. "
                "Leave out one of them."
            )
        earlier = min(epochs, steps, key=order.index)
        options[earlier] = settings_of(Recipe)[earlier].default


def _with_files(argv: list[str]) -> list[str]:
    """Put `--config=FILE` for each `--config NAME`, before all settings, which override it."""
    files, others, words = [], [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or (value := next(words, ""))):
            files.append(f"--config={find_recipe(value)}")
        else:
            others.append(word)
    others = [_readable(name, word) for name, word in pairwise(["", *others])]
    if (
        not files
        and not any(word.startswith("--model.path") for word in others)
        and not ({"-h", "--help"} & set(others))
    ):
        raise UserError(
            f"no recipe: give --config FILE, or a shipped one by its name: {', '.join(shipped_recipes())}."
        )
    return files + others


def _readable(option: str, word: str) -> str:
    """`1e3` for a whole number, and one text for a list of them, as jsonargparse reads them."""
    name, equals, value = word.partition("=") if word.startswith("--") else (option, "", word)
    setting = settings_of(Recipe).get(name.removeprefix("--"))
    if setting is None or (word.startswith("--") and not equals):
        return word
    if re.fullmatch(r"\d+(\.\d*)?[eE]\d{1,2}", value) and setting.hint in (int, int | None):
        number = float(value)
        value = str(int(number)) if number.is_integer() else value
    elif setting.hint == list[str] and not value.startswith("["):
        value = json.dumps([value])
    return f"{name}={value}" if equals else value


def find_recipe(name: str) -> Path:
    """The file that `--config` means: one of the user's, or a shipped one by its name."""
    if max(len(part.encode()) for part in name.split("/")) > 255 or not name.isprintable():
        raise UserError(f"--config {shown(name)} is no path.")
    path, shipped = Path(name).expanduser(), shipped_recipes()
    if path.is_file():
        return path
    if name in shipped:
        return shipped[name]
    if path.stem in RENAMED_RECIPES:
        raise UserError(f"--config {name} is called {RENAMED_RECIPES[path.stem]} now.")
    what = (
        "is a directory" if path.is_dir() else "is no file" if path.exists() else "does not exist"
    )
    near = did_you_mean(path.stem, shipped)
    raise UserError(
        f"--config {shown(name)}: {path.absolute()} {what}. By name there are {', '.join(shipped)}.{near}"
    )


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    return {path.stem: path for path in sorted(shipped_directory("recipes").glob("*.yaml"))}


def recipe_purposes() -> dict[str, str]:
    """What each shipped recipe is for: the first sentence of its file."""
    purposes = {}
    for name, path in shipped_recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = takewhile(lambda line: line.startswith("# "), lines)
        purposes[name] = _first_sentence(" ".join(line.removeprefix("# ") for line in comment))
    return purposes


def recipe_lines() -> list[str]:
    """The shipped recipes, for people."""
    lines = [f"{name:24} {purpose}" for name, purpose in recipe_purposes().items()]
    return [*lines, f"The files are in {shipped_directory('recipes')}."]


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


_WORDS = {
    "Expected a <class 'int'>": "it must be a whole number",
    "Expected a <class 'float'>": "it must be a number",
    "Expected a <class 'bool'>": "it must be true or false",
    "Expected a <class 'str'>": "it must be text",
    "Expected a <class 'list'>": "it must be a list",
    "Expected a <class 'dict'>": "it must be names with values",
    "Expected a <class 'NoneType'>": "it must be null",
}


def _in_one_line(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message without Python's words, and what may have been meant."""
    for python, words in _WORDS.items():
        message = message.replace(python, words)
    message = re.sub(
        r"Expected a typing\.Literal\[(.*?)\]",
        lambda found: f"it must be {found[1].replace(chr(39), '')}",
        message,
    )
    line = " ".join(message.split())
    value = re.search(r'Parser key "(.*?)":? .*(?:Got|Given) value: (.*)', line)
    rules = re.findall(r"it must be (.*?)(?= - |\. Got| Given|$)", line)
    if value and rules:
        line = f"{value[1]} is {shown(value[2])}; it must be {' or '.join(rules)}."
        line += did_you_mean(value[2], " ".join(rules).replace(",", "").split())
        line += " Put text with a colon in quotes." * (rules == ["text"] and value[2][0] == "{")
    if missing := re.search(r"arguments are required: (.*)", line):
        line = (
            f"not given: {missing[1]}. A preset such as character.yaml, or a file of your own, adds to the recipe of a "
            "card, which comes before it: --config gpu24gb-klein4b --config character."
        )
    known = [name for name in parser._option_string_actions if name.startswith("--")]
    if found := re.search(r"unrecognized arguments: --([\w.]+)", line):
        line = f"there is no option --{found[1]}.{did_you_mean(f'--{found[1]}', known)}"
    elif found := re.search(r"(?:Group '(\w+)' does|does) not accept option '([\w.]+)'", line):
        name = f"{found[1]}.{found[2]}" if found[1] else found[2]
        line = f"there is no setting {name}.{did_you_mean(name, settings_of(Recipe))}"
    return line if len(line) < 900 else f"{line[:900]}..."


_parser = cache(recipe_parser)  # which takes as long to make as to use


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read one recipe file, with dotted overrides such as `["--steps=10"]`."""
    return parse_recipe(_parser("recipe", ""), ["--config", str(path), *overrides])[0]


def _check_file(path: Path) -> None:
    """Refuse what YAML would not read, or would read as something else than settings, each given once."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1).decode("utf-8-sig")
        if len(text) > _MAX_BYTES:
            raise UserError(f"{path} has more than {_MAX_BYTES >> 10} KiB. A recipe has some.")
        depth = max(accumulate(((c in "[{") - (c in "]}") for c in text), initial=0))
        if depth > _MAX_DEPTH or re.search(rf"([-?:][ \t]+){{{_MAX_DEPTH}}}", text):
            raise UserError(f"{path} is nested too deep.")
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path} is no YAML at {_what_is_wrong(error, text)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None else "holds no settings"
        raise UserError(f"{path} {what}. A recipe has lines such as `steps: 1000`.")
    _check_nodes(root, path)
    settings = [(key.value, value) for key, value in root.value]
    for name, value in settings:
        if name in _SECTIONS and not isinstance(value, yaml.MappingNode):
            what = "is empty (null)" if value.tag.endswith(":null") else "is no section"
            raise UserError(
                f"{name} {what} ({path}). It holds settings, such as {_SECTIONS[name]}."
            )
    inside = [
        (name, value.value) for name, value in settings if isinstance(value, yaml.MappingNode)
    ]
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
    for name, pairs in inside:
        if name in _SECTIONS:
            lines |= {f"{name}.{key.value}": key.start_mark.line + 1 for key, _ in pairs}
    _refuse_renamed(lines, str(path))
    known = [*_SECTIONS, *settings_of(Recipe)]
    for name, line in lines.items():
        if name not in known:
            near = did_you_mean(name, known) or " docs/recipes.md has all of them."
            raise UserError(f"{path} has {shown(name)} at line {line}, which is no setting.{near}")


def _what_is_wrong(error: yaml.MarkedYAMLError, text: str) -> str:
    """Where YAML stops reading, why, and what to do where that is mostly the same."""
    mark = error.problem_mark
    if mark is None:
        return f"line 1: {error.problem}."
    at = f"line {mark.line + 1}: "
    character = text.splitlines()[mark.line : mark.line + 1]
    sign = character[0][mark.column : mark.column + 1] if character else ""
    if "cannot start any token" in str(error.problem):
        tab = sign == "\t"
        return at + (
            "a tab. Indent with blanks." if tab else f"put text that begins with {sign} in quotes."
        )
    hint = " Put text with a colon in quotes; what stands side by side is indented alike."
    return f"{at}{error.problem}.{hint * ('mapping values' in str(error.problem))}"


def _check_nodes(root: yaml.Node, path: Path) -> None:
    """Refuse a name given twice, and aliases that make too much."""
    nodes, count = [root], 0
    while nodes:
        node, count = nodes.pop(), count + 1
        if count > _MAX_VALUES:
            raise UserError(f"{path} holds more than {_MAX_VALUES} values.")
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.ScalarNode):
            if "\0" in node.value or re.search("[\ud800-\udfff]", node.value):
                raise UserError(
                    f"{path} has {shown(node.value)}, a character that no text may have."
                )
            if node.tag.endswith(":int") and len(node.value) > 100:
                raise UserError(
                    f"{path} has {shown(node.value)}, which is no number for a setting."
                )
        lines: dict[str, int] = {}
        for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(
                    f"{path} has something else than a name before the colon at line {line}."
                )
            if key.value in lines:
                raise UserError(
                    f"{path} has {shown(key.value)} twice, at lines {lines[key.value]} and {line}. Put both into one."
                )
            lines[key.value] = line
            nodes.append(value)


def _refuse_renamed(names: Iterable[str], where: str) -> None:
    for name in names:
        for old in (name, str(name).partition(".")[0]):
            if old in RENAMED:
                raise UserError(f"{old}, in {where}, is called {RENAMED[old]} now. Rename it.")
            if old in GONE:
                raise UserError(f"{old}, in {where}, is gone: {GONE[old]}. Leave it out.")


def _refuse_empty(settings: Namespace) -> None:
    """Refuse null where a setting must have a value; jsonargparse lets it pass in files."""
    for name, setting in settings_of(Recipe).items():
        if settings[name] is None and type(None) not in get_args(setting.hint):
            raise UserError(f"{name} is empty (null). Give its value, or remove the line.")


def _expand_home(settings: Namespace) -> None:
    """Put the user's home for `~/` into the paths of a parsed recipe; refuse what no file can be called."""
    for name, setting in settings_of(Recipe).items():
        if PATH in setting.marks:
            settings[name] = _expanded(name, settings[name])


def _expanded(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expanded(f"{name}.{key}", each) for key, each in value.items()}
    if isinstance(value, list):
        return [_expanded(name, each) for each in value]
    if not isinstance(value, str):
        return value
    path = str(Path(value).expanduser()) if value.startswith("~/") else value
    longest = max(len(part.encode()) for part in path.split("/"))
    if not path or len(path) > 4000 or longest > 255 or re.search(r"[\x00-\x1f\x7f]", path):
        raise UserError(
            f"{name} is {shown(value)}; a path has 1 to 255 bytes between two slashes, at most 4000 in all, and no "
            "line ends or other control characters."
        )
    return path


def check_urls(recipe: Recipe) -> None:
    """Refuse passwords, user names of web servers, and queries; `sftp://me@host` has none."""
    data = recipe.data
    images = {"": data.images} if isinstance(data.images, str) else data.images
    named = {
        "model.path": recipe.model.path,
        "data.shards": data.shards,
        **{f"data.images.{name}".rstrip("."): location for name, location in images.items()},
        **{f"data.more_shards.{name}": location for name, location in data.more_shards.items()},
    }
    for name, location in named.items():
        if USER_INFO.search(location):
            raise UserError(
                f"{name} is a URL with a user name or a password in it, and logs, recipe.yaml and W&B would "
                "show it. Take it out and give credentials as docs/data.md says under Reading."
            )
        # In other stores' names a ? may stand for any character.
        if re.search(r"https?://[^?#;]*[?#;]|://[^?#;]*[?#;][^/]*=", location, re.IGNORECASE):
            raise UserError(
                f"{name} is a URL with a query (?...), a fragment (#) or parameters (;), such as signed URLs have; logs, recipe.yaml and W&B "
                "would show it, and it does not name a folder or a .tar. Take it out and give credentials as "
                "docs/data.md says under Reading."
            )


_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_directory(name: str) -> Path:
    """The directory of shipped files called `name` ("ds_configs" or "recipes")."""
    installed, checkout = _PACKAGE / name, _PACKAGE.parent / name
    return installed if installed.is_dir() else checkout
