"""The rooms of the house: who imports whom. Read from the sources."""

import ast
from pathlib import Path

import pytest

import flux2_ds

ROOT = Path(flux2_ds.__file__).parents[1]
FLOORS = [
    {"errors", "ops"},
    {"config"},
    {"run", "model"},
    {"data", "distributed"},
    {"checkpoint"},
    {"engine", "prepare"},
    {"training"},
    {"train"},
    {"commands"},
    {"launcher"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OWNERS = {
    "deepspeed": {"engine", "distributed"},
    "triton": {"ops"},
    "wandb": {"run"},
}
HEAVY = {"torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "webdataset"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    module_name(path): path
    for package in ("flux2_ds", "launcher")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(module: str) -> set[str]:
    """Full names of everything a module imports, at its top or inside functions."""
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


def room(module: str) -> str:
    """`flux2_ds.data.order` is in `data`, `launcher.cli` in `launcher`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "flux2_ds" and len(parts) > 1 else parts[0]


def reached(module: str) -> set[str]:
    """Modules of the project that importing `module` imports, itself included."""
    seen: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        if name in FILES and name not in seen:
            seen.add(name)
            left += IMPORTS[name]
    return seen


def test_every_module_is_in_a_room():
    assert {room(module) for module in FILES} == {*FLOOR, "flux2_ds"}


@pytest.mark.parametrize("module", FILES)
def test_no_import_goes_up_or_in_a_circle(module):
    own = room(module)
    for name in IMPORTS[module] & FILES.keys() - {"flux2_ds"}:
        other = room(name)
        below = own == other or FLOOR[other] < FLOOR[own]
        assert below, f"{module} imports {name}, which is not below it"
        assert module not in reached(name), f"{module} and {name} import each other"


@pytest.mark.parametrize("module", [name for name in FILES if room(name) in ("config", "launcher")])
def test_config_and_launcher_reach_nothing_heavy(module):
    for name in reached(module):
        heavy = {package.split(".")[0] for package in IMPORTS[name]} & HEAVY
        assert not heavy, f"{module} reaches {name}, which imports {heavy}"


@pytest.mark.parametrize("package", OWNERS)
def test_packages_that_few_rooms_know(package):
    found = {
        room(module)
        for module, names in IMPORTS.items()
        if package in {n.split(".")[0] for n in names}
    }
    assert found == OWNERS[package]
