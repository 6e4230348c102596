"""The shape of the code: who imports what, and how large files are. Read from the sources."""

import ast
from pathlib import Path

import pytest

import flux2_ds

ROOT = Path(flux2_ds.__file__).parents[1]
MAX_LINES = 400
ROOTS = {
    "flux2_ds.train",
    "flux2_ds.bench_data",
    "flux2_ds.prepare.__main__",
    "flux2_ds.export",
    "flux2_ds.sample",
    "flux2_ds.inspection",
    "flux2_ds.probe",
    "flux2_ds.bench",
    "flux2_ds.quality",
}
LIGHT = {
    *(
        f"flux2_ds.{name}"
        for name in (
            "recipe",
            "parsing",
            "plan",
            "swapping",
            "spec",
            "targets",
            "sizes",
            "memory",
            "choices",
            "ranges",
            "ignored",
            "ranks",
            "shipped",
            "errors",
            "rundir",
            "lookout",
            "logs",
            "metrics",
            "whole",
            "locks",
        )
    ),
    *(f"flux2_ds.data.{name}" for name in ("buckets", "index", "order", "sweep")),
}
HEAVY = {"torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "webdataset"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for package in ("flux2_ds", "launcher")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(module: str) -> set[str]:
    """Full names of everything a module imports, at its top or inside functions.

    `from a import b` counts as `a.b` if that is a module of the project, else as `a`.
    """
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in FILES else str(node.module))
    return names


IMPORTS = {module: imported(module) for module in FILES}


def packages(module: str) -> set[str]:
    """First parts of the names that a module imports."""
    return {name.split(".")[0] for name in IMPORTS[module]}


def reached(module: str) -> set[str]:
    """Modules of the project that importing `module` imports, packages' `__init__` included."""
    seen: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        if name in FILES and name not in seen:
            seen.add(name)
            left += [*IMPORTS[name], *(name[:at] for at, c in enumerate(name) if c == ".")]
    return seen


def test_the_sources_were_found():
    assert len(FILES) > 25
    assert FILES.keys() >= ROOTS | LIGHT | {"launcher.cli", "flux2_ds.model.transformer"}
    assert IMPORTS["flux2_ds.plan"] >= {"json", "flux2_ds.recipe", "flux2_ds.ranges"}
    assert packages("flux2_ds.engine") >= {"torch", "deepspeed"}


def test_light_modules_import_nothing_heavy():
    for module in LIGHT | {name for name in FILES if name.split(".")[0] == "launcher"}:
        for name in reached(module):
            assert not packages(name) & HEAVY, f"{module} imports {name}, which imports that"


@pytest.mark.parametrize(("one", "other"), [("data", "model"), ("model", "data")])
def test_data_and_model_do_not_know_each_other(one, other):
    own = [name for name in FILES if name.startswith(f"flux2_ds.{one}.")]
    assert len(own) >= 4
    for module in own:
        known = {name for name in reached(module) if name.startswith(f"flux2_ds.{other}.")}
        assert not known, f"{module} reaches {known}"


@pytest.mark.parametrize(
    ("package", "owners"),
    [("deepspeed", ("engine", "dividing", "processes")), ("wandb", ("metrics",))],
)
def test_packages_that_few_files_know(package, owners):
    known = {name for name in FILES if package in packages(name)}
    assert known == {f"flux2_ds.{owner}" for owner in owners}


def test_roots_are_imported_by_nobody_and_the_launcher_not_by_the_library():
    for module in FILES:
        assert not IMPORTS[module] & ROOTS, module
        assert not (module.startswith("flux2_ds") and "launcher" in packages(module)), module


def test_no_import_goes_in_a_circle():
    for module in FILES:
        for name in IMPORTS[module] & FILES.keys():
            assert module not in reached(name) or module == name.rpartition(".")[0], (module, name)


def test_modules_have_telling_names_and_are_not_too_long():
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [module for module in FILES if vague & set(module.split("."))]
    lengths = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert {module: lines for module, lines in lengths.items() if lines > MAX_LINES} == {}
