"""Recipes: YAML and dotted overrides in, clear errors out, every setting described."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flux2_ds.config import recipe as module
from flux2_ds.config.parse import (
    GONE,
    RENAMED,
    RENAMED_RECIPES,
    load_recipe,
    parse_recipe,
    recipe_lines,
    recipe_parser,
    shipped_recipes,
)
from flux2_ds.config.recipe import Recipe, recipe_values
from flux2_ds.config.settings import settings_of
from flux2_ds.errors import UserError

ALIAS_BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 9)) for n in range(97, 105)
)
MINIMAL = {
    "run_dir": "runs/a",
    "model": {"path": "models/klein"},
    "data": {"images": "photos", "shards": "shards"},
}


def write_recipe(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}, allow_unicode=True), encoding="utf-8")
    return path


PARSER = recipe_parser("test", "")


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(PARSER, list(argv))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


def test_the_users_home_stands_for_a_tilde_in_paths_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    data = {"images": {"a": "~/photos", "b": "x~/y"}, "shards": "~/s", "fixed_caption": "~/ cats"}
    path = write_recipe(
        tmp_path, model={"path": "~/m"}, data=data, preview={"references": ["~/r.png"]}
    )
    recipe = load_recipe(path, ["--run_dir=~/run", "--data.more_shards={web: ~/web}"])
    assert (recipe.model.path, recipe.run_dir) == ("/home/me/m", "/home/me/run")
    assert recipe.data.images == {"a": "/home/me/photos", "b": "x~/y"}
    assert recipe.data.more_shards == {"web": "/home/me/web"}
    assert (recipe.data.shards, recipe.data.fixed_caption) == ("/home/me/s", "~/ cats")
    assert recipe.preview.references == ["/home/me/r.png"]
    assert (recipe.deepspeed, recipe.launch.hostfile, recipe.data.cache) == ("zero2", None, None)


def test_minimal_recipe_takes_the_defaults(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path))
    assert recipe == Recipe(
        run_dir="runs/a",
        model=module.Model(path="models/klein"),
        data=module.Data(images="photos", shards="shards"),
    )


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001"])
def test_every_way_to_write_a_learning_rate_in_yaml(tmp_path, written):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text() + f"optimizer:\n  learning_rate: {written}\n")
    assert load_recipe(path).optimizer.learning_rate == 1e-4


def test_a_later_file_overrides_an_earlier_one_and_the_command_line_both(tmp_path):
    first = write_recipe(tmp_path, steps=7, batch={"global_size": 4, "micro_size": 2})
    second = tmp_path / "second.yaml"
    second.write_text("batch: {global_size: 6}\nseed: 1\n")
    recipe = load_recipe(first, ["--seed=2", "--config", str(second), "--lora.alpha", "4"])
    assert (recipe.steps, recipe.seed, recipe.lora.alpha) == (7, 2, 4.0)
    assert (recipe.batch.global_size, recipe.batch.micro_size) == (6, 2)


@pytest.mark.parametrize("value", ["zero3", {"zero_optimization": {"stage": 1}}])
def test_deepspeed_may_be_a_name_or_the_config_itself(tmp_path, value):
    assert load_recipe(write_recipe(tmp_path, deepspeed=value)).deepspeed == value


def test_option_of_a_command_or_of_deepspeeds_launcher_is_not_in_the_recipe(tmp_path):
    parser = recipe_parser("test", "")
    parser.add_argument("--step", type=int, default=None)
    arguments = ["--config", str(write_recipe(tmp_path)), "--step=3", "--local_rank=3"]
    recipe, options = parse_recipe(parser, arguments)
    assert options.step == 3
    assert recipe == load_recipe(write_recipe(tmp_path))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"setps": 3}, "setps"),
        ({"lora": {"rank": "many"}}, "lora.rank"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"data": {"images": "photos"}}, "data.shards"),
        ({"model": {}}, "model.path"),
        ({"launch": {"accelerator": "tpu"}}, "launch.accelerator is tpu; it must be cuda, cpu"),
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number"),
        ({"method": "loar"}, "Did you mean lora?"),
        ({"lora": {"rnak": 3}}, "Did you mean lora.rank?"),
        ({"data": 3}, "data is no section"),
        ({"preview": {"prompts": [{"a photo": "b"}]}}, "must be text. Put text with a colon"),
    ],
)
def test_wrong_file_is_refused_by_name(tmp_path, changes, named):
    assert named in refused("--config", str(write_recipe(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--lora.rank=many", "lora.rank"),
        ("--optimizer.schedule=step", "optimizer.schedule"),
        ("--accept_changes=perhaps", "accept_changes is perhaps; it must be true or false"),
        ("--lora.rnak=3", "no option --lora.rnak. Did you mean --lora.rank?"),
        ("--run_dir=a\udc80", "a character that no text may have"),
        (f"--data.shards=a/{'é' * 128}", "...; a path has 1 to 255 bytes between"),
        ("--data.shards=s3://me:x@bucket/shards", "data.shards is a URL with a user name"),
        ("--run_dir=", "run_dir is ''; a path has 1 to"),
        (f"--steps={'9' * 5000}", "... is no number for a setting"),
        ("--run_dir=runs\n/a", r"run_dir is runs\n/a; a path has"),
    ],
)
def test_wrong_override_is_refused_by_name(tmp_path, override, named):
    message = refused("--config", str(write_recipe(tmp_path)), override)
    assert named in message


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    assert str(path) in refused("--config", str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: 3\nmodel: {path: [", r"is no YAML at line [23]"),
        (b"text", "holds no settings"),
        (b"[]", "holds no settings"),
        (b"# steps: 3\n", "is empty"),
        ("name: für".encode("latin-1"), "is not UTF-8"),
        (b"steps: \0", "is no YAML"),
        (b'run_dir: "a\\0"', "has a.x00, a character that no text may have"),
        (b"steps: " + 5000 * b"9", r"has 9+\.\.\., which is no number"),
        (b"a: " + 101 * b"[", "is nested too deep"),
        (101 * b"- ", "is nested too deep"),
        (b"a: &a [1, *a]", "holds more than"),
        (ALIAS_BOMB, "holds more than 10000 values"),
        (b"#" * 70_000, "has more than 64 KiB"),
        (b"lora: {rank: 3}\nsteps: 4\nlora: {alpha: 3}\n", "has lora twice, at lines 1 and 3"),
        (b"data:\n  images: a\n  shards: b\n  images: c\n", "has images twice, at lines 2 and 4"),
        (b"data: {images: a, images: b}", "has images twice, at lines 1 and 1"),
        (b"lora:\n\trank: 4\n", "is no YAML at line 2: a tab. Indent with blanks"),
        (b"a: 1\nname: @cat\n", "is no YAML at line 2: put text that begins with @ in quotes"),
        (b"preview:\n  prompts:\n   - a: b: c\n", "is no YAML at line 3: .* colon in quotes"),
        (b"optimiser: {eps: 1}\n", "has optimiser at line 1, .* Did you mean optimizer?"),
        (b"steps: 3\nlora:\n  rnak: 3\n", "has lora.rnak at line 3, .* Did you mean lora.rank?"),
        (b"network_dim: 4\n", "has network_dim at line 1, which is no setting. docs/recipes.md"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"broken\.yaml {message}"):
        load_recipe(write_recipe(tmp_path), [f"--config={path}"])


def test_recipes_by_name_and_what_is_said_without_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("h100x8").run_dir == "runs/h100x8"
    (tmp_path / "h100x8").write_text("run_dir: mine\n")
    assert load_recipe("h100x1", ["--config=h100x8"]).run_dir == "mine"
    message = refused("--config", "recipes/h100x4.yaml")
    assert f"{tmp_path}/recipes/h100x4.yaml does not exist" in message
    assert "Did you mean h100x8?" in message
    assert all(name in refused() for name in ("give --config", *shipped_recipes()))
    assert len(recipe_lines()) == len(shipped_recipes()) + 1
    assert RENAMED_RECIPES.keys().isdisjoint(shipped_recipes())
    for old, new in RENAMED_RECIPES.items():
        message = refused("--config", f"recipes/{old}.yaml")
        assert f"is called {new} now" in message and new in shipped_recipes()


def test_a_recipe_is_utf8_whatever_the_locale(tmp_path):
    path = write_recipe(tmp_path, preview={"prompts": ["été 猫"]})
    program = (
        "import sys; from flux2_ds.config.parse import load_recipe\n"
        "print(ascii(load_recipe(sys.argv[1]).preview.prompts))"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    argv = [sys.executable, "-c", program, str(path)]
    root = Path(module.__file__).parents[2]
    done = subprocess.run(argv, capture_output=True, text=True, env=ascii_only, cwd=root)
    assert done.stdout == ascii(["été 猫"]) + "\n", done.stderr


def test_a_whole_number_may_have_an_exponent_and_a_list_be_one_text(tmp_path):
    path = write_recipe(tmp_path)
    words = ["--steps", "1e3", "--preview.prompts", "a cat: asleep", "--log.every=2e1"]
    recipe = load_recipe(path, words)
    assert (recipe.steps, recipe.log.every) == (1000, 20)
    assert recipe.preview.prompts == ["a cat: asleep"]


@pytest.mark.parametrize("name", ["steps", "lora", "lora.rank", "optimizer.schedule", "log.every"])
def test_a_setting_without_its_value_is_refused(tmp_path, name):
    section, _, field = name.rpartition(".")
    changes = {section: {field: None}} if section else {name: None}
    with pytest.raises(UserError, match=rf"^{name} is empty \(null\)"):
        load_recipe(write_recipe(tmp_path, **changes))
    load_recipe(write_recipe(tmp_path, lora={"alpha": None}))  # which may have none


def test_a_printed_recipe_has_no_option_of_the_command(tmp_path, capsys):
    parser = recipe_parser("test", "")
    parser.add_argument("--step", type=int, default=None)
    with pytest.raises(SystemExit):
        parse_recipe(
            parser, ["--config", str(write_recipe(tmp_path)), "--step=3", "--print_config"]
        )
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert load_recipe(again) == load_recipe(write_recipe(tmp_path))


@pytest.mark.parametrize("way", ["printed", "stored"])
def test_every_setting_round_trips_through_yaml(tmp_path, capsys, way):
    path = write_recipe(tmp_path, preview={"prompts": ["été: 猫", "#2", "no: 1"]})
    overrides = [
        "--optimizer.betas=[0.8,0.95]",
        "--deepspeed={zero_optimization: {stage: 1}}",
        "--optimizer.eps=1e-15",
        "--checkpoint.keep_every=100",
    ]
    recipe = load_recipe(path, overrides)
    if way == "printed":
        with pytest.raises(SystemExit) as caught:
            load_recipe(path, [*overrides, "--print_config"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
    else:
        text = yaml.safe_dump(recipe_values(recipe))
        assert yaml.safe_load(text) == recipe_values(recipe)
    again = tmp_path / "again.yaml"
    again.write_text(text, encoding="utf-8")
    assert load_recipe(again) == recipe


def test_help_describes_every_setting(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    help_text = " ".join(PARSER.format_help().split())
    for name, setting in settings_of(Recipe).items():
        assert len(setting.help) > 5
        described = rf"--{re.escape(name)} \S.{{0,100}}? {re.escape(setting.help)}"
        assert re.search(described, help_text), name


@pytest.mark.parametrize("old", [*RENAMED, *GONE])
@pytest.mark.parametrize("typed", [False, True])
def test_an_old_name_is_refused_with_the_new_one(tmp_path, old, typed):
    section, _, name = old.partition(".")
    changes = {} if typed else {section: {**MINIMAL.get(section, {}), name: 1} if name else 1}
    path = write_recipe(tmp_path, **changes)
    now = f"called {re.escape(RENAMED[old])} now" if old in RENAMED else f"gone: {GONE[old]}"
    with pytest.raises(UserError, match=f"^{old}, in .* is {now}"):
        load_recipe(path, [f"--{old}=1"] if typed else [])


LENGTHS = [
    # recipe, options, steps, epochs
    ({"steps": 9}, [], 9, None),
    ({"epochs": 2}, [], 1000, 2.0),
    ({"steps": 9}, ["--epochs", "3"], 1000, 3.0),
    ({"epochs": 3}, ["--steps=9"], 9, None),
    ({"steps": 9, "epochs": None}, [], 9, None),
    ({"steps": 9, "epochs": 3}, ["--epochs", "null"], 9, None),
]


@pytest.mark.parametrize(("recipe", "options", "steps", "epochs"), LENGTHS)
def test_the_length_that_is_given_last_counts(tmp_path, recipe, options, steps, epochs):
    found = load_recipe(write_recipe(tmp_path, **recipe), options)
    assert (found.steps, found.epochs) == (steps, epochs)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ({"steps": 9, "epochs": 3}, [], r"steps is 9 and epochs is 3, both in .*recipe.yaml\. Leave"),
        ({}, ["--steps", "9", "--epochs", "3"], "steps is 9 and epochs is 3, both in the command"),
        ({"validation": {"every": 9, "every_epochs": 3}}, [], "validation.every is 9 and validation"),
        ({"preview": {"every": 9, "every_epochs": 3}}, [], "preview.every is 9 and preview"),
    ],
)  # fmt: skip
def test_two_lengths_in_one_place_are_refused(tmp_path, recipe, options, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write_recipe(tmp_path, **recipe), options)
