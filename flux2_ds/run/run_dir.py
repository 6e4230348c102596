"""The run directory: what is in it, and when a run may continue in it. No torch."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import math
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from flux2_ds.config.adapter import merges
from flux2_ds.config.adapter_file import settings_of_file, with_file
from flux2_ds.config.model_spec import known_spec
from flux2_ds.config.plan import Plan
from flux2_ds.config.recipe import Lora, Recipe, recipe_values
from flux2_ds.config.settings import changes
from flux2_ds.errors import MALFORMED, OutageError, UserError
from flux2_ds.run.atomic import PARTIAL, atomic_write_text, no_follow

log = logging.getLogger("flux2_ds")

STATE_NAME = "state.json"
"""In a checkpoint: what is no tensor."""
RECIPE_NAME = "recipe.yaml"
_PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "flux2-ds")
INITIAL_ADAPTER = "initial_adapter.safetensors"
"""With `lora.init: pissa` or `olora`: what the adapter began as, which is not in the base."""
_BEFORE_A_RUN = {
    *(INITIAL_ADAPTER, ".lock", ".launcher.lock", "stop", "logs"),
    *("deepspeed.json", "versions.json", RECIPE_NAME),
}
"""What a start that was refused or killed may leave."""
Weights = Literal["trained", "ema"]
"""The trained weights, or their moving average."""
DOCTOR_TOKEN = ".doctor-"
"""So begins the name of a file that `doctor` lets the other hosts look for."""


def check_run_dir(recipe: Recipe) -> None:
    """Refuse a directory that holds another run, naming the settings that differ; or something else."""
    run_dir = Path(recipe.run_dir)
    found = entries(run_dir)
    for path in [*found, *entries(logs_directory(recipe)), *entries(checkpoints_directory(recipe))]:
        if path.is_symlink():
            raise UserError(
                f"{path} is a symbolic link, and training would write where it points. Put what it points "
                "to in its place, or give a new run_dir."
            )
    names = {path.name.removesuffix(PARTIAL) for path in found}
    if run_dir / RECIPE_NAME not in found:
        if all(name in _BEFORE_A_RUN or name.startswith(DOCTOR_TOKEN) for name in names):
            return
        raise UserError(
            f"run_dir {run_dir} exists and is not a run of flux2-ds (no {RECIPE_NAME} in it). "
            "Give a new directory."
        )
    changes = changed_settings(recipe)
    if changes and not recipe.accept_changes:
        raise UserError(
            f"run_dir {run_dir} holds a different run: {'; '.join(changes)}. Give a new run_dir, "
            "restore the settings, or set accept_changes: true to go on with the new ones."
        )


def changed_settings(recipe: Recipe) -> list[str]:
    """The settings, old and new, that make `recipe` another run than the one in its run_dir.

    A run without a checkpoint has trained nothing that would bind the next start.
    """
    stored = Path(recipe.run_dir) / RECIPE_NAME
    if newest_step(recipe) == 0 or stored not in entries(stored.parent):
        return []
    with _reading(stored):
        before = yaml.safe_load(stored.read_text())
        if missing := {item.name for item in fields(Recipe)} - before.keys():
            raise KeyError(min(missing))
        return changes(Recipe, before, recipe_values(recipe))


@contextmanager
def _reading(stored: Path) -> Iterator[None]:
    """Refuse a recipe of the run's own that cannot be read or is damaged."""
    try:
        yield
    except (OSError, yaml.YAMLError, *MALFORMED) as error:
        raise UserError(
            f"{stored} is damaged ({error!r}). Restore it, or give a new run_dir."
        ) from error


def write_run_dir(plan: Plan) -> None:
    """Write recipe, DeepSpeed config and versions."""
    run_dir = Path(plan.recipe.run_dir)
    files = {
        "deepspeed.json": json.dumps(plan.deepspeed, indent=1) + "\n",
        "versions.json": json.dumps(versions(), indent=1) + "\n",
        # Last: a directory without it holds no run.
        RECIPE_NAME: yaml.safe_dump(recipe_values(plan.recipe), sort_keys=False),
    }
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            atomic_write_text(run_dir / name, text)
    except OSError as error:
        raise OutageError(
            f"run_dir {run_dir} cannot be written ({error.strerror}). Free some space, correct its owner, or "
            "give another run_dir."
        ) from error


def export_path(
    recipe: Recipe, step: int, weights: Weights = "trained", reader: str | None = None
) -> Path:
    """Where the export of a checkpoint is: a file for an adapter, a directory for all weights.

    `reader`: the program that the file is for; by default that of the layout that every export has.
    """
    reader = reader or ("lycoris" if recipe.method in ("lokr", "loha") else "diffusers")
    run_dir = Path(recipe.run_dir)
    name = f"step_{step:08d}{'-ema' if weights == 'ema' else ''}"
    if recipe.method == "full":
        return run_dir / "export" / name / "transformer"
    return run_dir / "export" / f"{run_dir.resolve().name}-{name}-{reader}.safetensors"


def stop_file(recipe: Recipe) -> Path:
    """The file that asks a running training to save and stop."""
    return Path(recipe.run_dir) / "stop"


def newest_step(recipe: Recipe) -> int:
    """Step of the newest checkpoint; 0 without one."""
    return max(step_folders(checkpoints_directory(recipe)), default=0)


def validation_history(recipe: Recipe, step: int) -> list[tuple[int, float]]:
    """(step, loss) of the evaluations before the checkpoint of `step`, oldest first; none without one."""
    path = step_folders(checkpoints_directory(recipe)).get(step)
    if path is None:
        return []
    with _reading(path / STATE_NAME):
        state = json.loads((path / STATE_NAME).read_text())
        return [(int(at), float(loss)) for at, loss in state.get("validation", [])]


def stale(history: Sequence[tuple[int, float]], patience: int) -> bool:
    """Whether the last `patience` evaluations brought no new lowest loss."""
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in history]
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def is_finished(recipe: Recipe, step: int) -> bool:
    """Whether nothing is left to train after the checkpoint of `step`: it is the last one, or its losses are
    stale."""
    patience = recipe.validation.patience
    if step >= recipe.steps or patience is None:
        return step >= recipe.steps
    return stale(validation_history(recipe, step), patience)


def checkpoints_directory(recipe: Recipe) -> Path:
    """Where the run's checkpoints are."""
    return Path(recipe.run_dir) / "checkpoints"


def step_folders(root: Path) -> dict[int, Path]:
    """Directories of complete checkpoints, or of previews, by step, ascending; those of other names are not ours."""
    names = [(re.fullmatch(r"step_(\d{8,18})", path.name), path) for path in entries(root)]
    return dict(sorted((int(name[1]), path) for name, path in names if name))


def entries(folder: Path) -> list[Path]:
    """What is in a directory; nothing if there is none. Refuses one that cannot be read: a run would
    start over."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}). Correct its owner, or give another run_dir."
        ) from error


def existing_parent(recipe: Recipe) -> Path:
    """run_dir, or the nearest directory above it that there is."""
    return nearest_existing(Path(recipe.run_dir))


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that there is."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    return place


def logs_directory(recipe: Recipe) -> Path:
    """Where the logs and heartbeats of all ranks are; see watchdog.py."""
    return Path(recipe.run_dir) / "logs"


def prepare_logs_directory(recipe: Recipe) -> Path:
    """Where the logs and places of `prepare`'s processes are."""
    return Path(recipe.data.shards) / "logs"


def lock_run_dir(recipe: Recipe, name: str = ".lock") -> IO[str]:
    """Keep other trainings out of the run directory for as long as the returned file is open.

    Rank 0 holds the lock `name`, and `flux2-ds train` one of its own, because the trainer needs a while
    to start.
    """
    return lock_file(
        Path(recipe.run_dir) / name,
        f"another process is training in run_dir {recipe.run_dir}. Wait for it, stop it, or give another "
        "run_dir.",
        "do not train in it twice at a time",
    )


def is_training(recipe: Recipe) -> bool:
    """Whether rank 0 of a training holds the lock of run_dir, as far as the file system tells."""
    try:
        with (Path(recipe.run_dir) / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def trained_recipe(recipe: Recipe) -> Recipe:
    """`recipe` with the method and adapter settings that its run was trained with."""
    stored = Path(recipe.run_dir) / RECIPE_NAME
    if stored not in entries(stored.parent):
        raise UserError(f"run_dir {recipe.run_dir} holds no run. Train first, or correct run_dir.")
    with _reading(stored):
        return as_trained(recipe, yaml.safe_load(stored.read_text()), stored)


def with_adapter_file(recipe: Recipe) -> Recipe:
    """The recipe with what `lora.init_from` decides: as the run's own has it once there is a checkpoint, else
    as the file says. Refuses a setting that contradicts it.
    """
    path, stored = recipe.lora.init_from, Path(recipe.run_dir) / RECIPE_NAME
    if path is None or recipe.method == "full":
        return recipe
    spec = known_spec(recipe.model.path, recipe.model.revision)
    if newest_step(recipe) > 0 and stored in entries(stored.parent):
        with _reading(stored):
            found = Lora(**yaml.safe_load(stored.read_text())["lora"])
        if found.init_from != path:
            return recipe  # which is refused as another run
    else:
        found, kind, _ = settings_of_file("lora.init_from", path, spec)
        if kind != recipe.method:
            raise UserError(
                f"method is {recipe.method}, and lora.init_from {path} is a {kind}. Set method: {kind}."
            )
    return replace(recipe, lora=with_file(recipe.lora, found, spec))


def merged_files(recipe: Recipe) -> list[tuple[str, float]]:
    """The adapter files that are in the base of a run, and their strengths."""
    initial = [(str(Path(recipe.run_dir) / INITIAL_ADAPTER), -1.0)]
    return merges(recipe.lora) + initial * (
        recipe.method != "full" and recipe.lora.init != "gaussian"
    )


def as_trained(recipe: Recipe, values: dict[str, Any], source: Path) -> Recipe:
    """`recipe` with the method and adapter settings of another recipe's values, which `source` holds."""
    method, lora = values["method"], Lora(**values["lora"])
    if (method, lora) != (recipe.method, recipe.lora):
        log.warning("method and lora are those of %s; what else was given is ignored", source)
    return replace(recipe, method=method, lora=lora)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def lock_file(path: Path, taken: str, unsure: str) -> IO[str]:
    """Lock `path` for as long as the returned file is open.

    If another process has locked it, that is refused with `taken`. Where the file system has no locks,
    a warning ends with `unsure`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w", opener=no_follow)  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}). Correct its owner, or name another directory."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(taken) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s); %s", path, error, unsure)
    return file
