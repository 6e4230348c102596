"""docs/recipes.md says what the recipe's fields say, and commands in the docs have options that exist."""

import re
from pathlib import Path

from flux2_ds.config.recipe import Recipe
from flux2_ds.config.reference import page
from flux2_ds.config.settings import settings_of
from launcher.cli import COMMANDS

ROOT = Path(__file__).parents[2]
HERE = ("prepare", "plan", "doctor", "train", "slurm", "bench")
"""Commands whose options are the launcher's, beside those of the recipe and their own file."""


def test_the_page_is_up_to_date() -> None:
    written = ROOT / "docs" / "recipes.md"
    assert written.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_commands_in_the_docs_have_options_that_exist() -> None:
    launcher = "".join(path.read_text() for path in (ROOT / "launcher").glob("*.py"))
    bench = (ROOT / "flux2_ds/config/bench_options.py").read_text()
    of_recipe = {*settings_of(Recipe), "config", "print_config"}
    checked = 0
    for file in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.yaml")):
        text = re.sub(r"\\\n", " ", file.read_text())
        for command, rest in re.findall(r"flux2-ds ([a-z-]+)((?: [^`\n#]*)?)", text):
            options = re.findall(r" --([a-zA-Z][\w.-]*)", rest)
            if not options:
                continue
            assert command in COMMANDS, f"{file.name}: flux2-ds {command}"
            own = ROOT / f"flux2_ds/commands/{command.replace('-', '_')}.py"
            known = own.read_text() if own.is_file() else ""
            takes_recipe = command in HERE or "recipe_parser" in known
            known += launcher * (command in HERE) + bench * (command == "bench")
            for name in options:
                found = f'"--{name}"' in known or (takes_recipe and name in of_recipe)
                assert found, f"{file.name}: flux2-ds {command} --{name}"
                checked += 1
    assert checked > 100
