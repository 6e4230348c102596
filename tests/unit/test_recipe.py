"""Recipes: YAML and dotted overrides in, clear errors out, every setting described."""

import ast
import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest
import yaml

from flux2_ds import recipe as module
from flux2_ds.recipe import Recipe, load_recipe, parse_recipe, recipe_parser, recipe_values

MINIMAL = {
    "run_dir": "runs/a",
    "model": {"path": "models/klein"},
    "data": {"images": "photos", "shards": "shards"},
}


def write_recipe(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}, allow_unicode=True), encoding="utf-8")
    return path


def settings(kind: type, prefix: str = "") -> list[tuple[str, type, str]]:
    """(dotted name, class, field) of every setting below a dataclass."""
    hints = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            found += settings(hints[field.name], f"{prefix}{field.name}.")
        else:
            found.append((f"{prefix}{field.name}", kind, field.name))
    return found


SETTINGS = settings(Recipe)


def descriptions() -> dict[tuple[str, str], str]:
    """The string below each field, read from the source: (class, field) -> text on one line."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[node.name, field.target.id] = " ".join(text.value.value.split())
    return found


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a parser says while it ends the process with code 2."""
    with pytest.raises(SystemExit) as caught:
        parse_recipe(recipe_parser("test", ""), list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_minimal_recipe_takes_the_defaults(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path))
    assert recipe == Recipe(
        run_dir="runs/a",
        model=module.Model(path="models/klein"),
        data=module.Data(images="photos", shards="shards"),
    )


def test_values_of_the_file_and_of_the_command_line(tmp_path):
    path = write_recipe(tmp_path, steps=7, lora={"rank": 8, "alpha": 4})
    recipe = load_recipe(path, ["--lora.rank=16", "--optimizer.learning_rate", "3e-5"])
    assert recipe.steps == 7
    assert (recipe.lora.rank, recipe.lora.alpha) == (16, 4.0)
    assert recipe.optimizer.learning_rate == 3e-5


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001"])
def test_every_way_to_write_a_learning_rate_in_yaml(tmp_path, written):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text() + f"optimizer:\n  learning_rate: {written}\n")
    assert load_recipe(path).optimizer.learning_rate == 1e-4


def test_a_later_file_overrides_an_earlier_one(tmp_path):
    first = write_recipe(tmp_path, steps=7, batch={"global_size": 4, "micro_size": 2})
    second = tmp_path / "second.yaml"
    second.write_text("batch: {global_size: 6}\n")
    recipe = load_recipe(first, ["--config", str(second)])
    assert recipe.steps == 7
    assert (recipe.batch.global_size, recipe.batch.micro_size) == (6, 2)


def test_deepspeed_may_be_a_name_or_the_config_itself(tmp_path):
    assert load_recipe(write_recipe(tmp_path, deepspeed="zero3")).deepspeed == "zero3"
    config = {"zero_optimization": {"stage": 1}}
    assert load_recipe(write_recipe(tmp_path, deepspeed=config)).deepspeed == config


def test_option_of_a_command_is_not_in_the_recipe(tmp_path):
    parser = recipe_parser("test", "")
    parser.add_argument("--step", type=int, default=None)
    recipe, options = parse_recipe(parser, ["--config", str(write_recipe(tmp_path)), "--step=3"])
    assert options.step == 3
    assert not hasattr(recipe, "step")


def test_local_rank_of_a_launcher_is_accepted(tmp_path):
    load_recipe(write_recipe(tmp_path), ["--local_rank=3"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora": {"rnak": 3}}, "rnak"),
        ({"setps": 3}, "setps"),
        ({"lora": {"rank": "many"}}, "lora.rank"),
        ({"steps": 1.5}, "steps"),
        ({"method": "qlora"}, "method"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"data": {"images": "photos"}}, "data.shards"),
        ({"model": {}}, "model.path"),
        ({"launch": {"accelerator": "tpu"}}, "launch.accelerator"),
    ],
)
def test_wrong_file_is_refused_by_name(tmp_path, capsys, changes, named):
    assert named in refused(capsys, "--config", str(write_recipe(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--lora.rnak=3", "lora.rnak"),
        ("--lora.rank=many", "lora.rank"),
        ("--optimizer.schedule=step", "optimizer.schedule"),
        ("--accept_changes=perhaps", "accept_changes"),
    ],
)
def test_wrong_override_is_refused_by_name(tmp_path, capsys, override, named):
    message = refused(capsys, "--config", str(write_recipe(tmp_path)), override)
    assert named in message.split("error:")[1]


def test_missing_file_is_named(tmp_path, capsys):
    assert "absent.yaml" in refused(capsys, "--config", str(tmp_path / "absent.yaml"))


def test_broken_yaml_is_refused(tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_text("model: {path: [")
    assert "config" in refused(capsys, "--config", str(path)).split("error:")[1]


def test_printed_config_parses_back_to_the_same_recipe(tmp_path, capsys):
    path = write_recipe(tmp_path, steps=7, preview={"prompts": ["été: 猫", "#2"]})
    overrides = ["--optimizer.betas=[0.8,0.95]", "--deepspeed={zero_optimization: {stage: 1}}"]
    with pytest.raises(SystemExit) as caught:
        load_recipe(path, [*overrides, "--print_config"])
    assert caught.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(printed) == load_recipe(path, overrides)


def test_values_hold_every_setting(tmp_path):
    values = recipe_values(load_recipe(write_recipe(tmp_path)))
    flat = {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in values.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    assert flat == {name for name, _, _ in SETTINGS}


def test_values_round_trip_through_yaml(tmp_path):
    overrides = [
        "--optimizer.betas=[0.8,0.95]",
        "--deepspeed={zero_optimization: {stage: 1}}",
        "--optimizer.eps=1e-15",
        "--checkpoint.keep_every=100",
    ]
    recipe = load_recipe(write_recipe(tmp_path, preview={"prompts": ["猫", "no: 1"]}), overrides)
    text = yaml.safe_dump(recipe_values(recipe))
    assert yaml.safe_load(text) == recipe_values(recipe)
    stored = tmp_path / "stored.yaml"
    stored.write_text(text)
    assert load_recipe(stored) == recipe


@pytest.fixture(scope="module")
def help_text() -> str:
    """`--help` on one line, in a wide terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "1000")
        return " ".join(recipe_parser("test", "").format_help().split())


@pytest.mark.parametrize(("name", "kind", "field"), SETTINGS, ids=[name for name, _, _ in SETTINGS])
def test_help_describes_every_setting(help_text, name, kind, field):
    description = descriptions()[kind.__name__, field]
    assert len(description) > 5
    assert re.search(rf"--{re.escape(name)} \S.{{0,100}}? {re.escape(description)}", help_text)


def test_there_are_settings():
    assert len(SETTINGS) > 40
