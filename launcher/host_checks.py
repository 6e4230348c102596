"""`python -m launcher.host_checks --config R`: what `doctor` asks of the host that this runs on.

Prints its findings as JSON. Imports no torch; what needs it is asked of flux2_ds.commands.probe.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import netrc
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from packaging.requirements import Requirement

from flux2_ds.config.memory import GIB, checkpoint_bytes
from flux2_ds.config.model_spec import RELEASED, Spec, spec_here
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.dataset import in_steps, read_data, run_checks
from flux2_ds.errors import UserError, run_root
from flux2_ds.run.run_dir import (
    checkpoint_steps,
    checkpoints_directory,
    existing_parent,
)
from launcher.doctor import Findings, last_line, run_probe


def main() -> None:
    """Check for the recipe of the arguments, and print JSON.

    `--processes` are this host's, `--all-processes` the run's; `--token` is a file that the launcher
    has put beside the run directory.
    """
    parser = recipe_parser("launcher.host_checks", "")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--all-processes", type=int, default=1)
    parser.add_argument("--token", type=str, default=None)
    parser.add_argument("--without-recipe", action="store_true")
    recipe, options = parse_recipe(parser)
    findings, builds_adam = Findings(), False
    check_packages(findings, without=("wandb",) if recipe.log.wandb == "disabled" else ())
    check_script(findings)
    check_machine(findings)
    if recipe.launch.accelerator == "cuda":
        check_gpus(findings, options.processes)
    if not options.without_recipe:
        check_recipe(findings, recipe, options.all_processes, options.token)
        with suppress(UserError):
            plan = make_plan(recipe, options.all_processes)
            builds_adam = plan.offloads("offload_optimizer")
    asked = run_probe(recipe.launch.accelerator, *["--cpu-adam"] * builds_adam)
    values, reason = last_line(asked.returncode, asked.stdout, asked.stderr)
    if values is None:
        findings.fail("torch", reason)
    else:
        findings.add(values)
    print(json.dumps(asdict(findings) | {"clock": time.time()}))


def check_packages(findings: Findings, without: tuple[str, ...] = ()) -> None:
    """Compare Python's and the packages' versions with the ranges that flux2-ds declares; those in
    `without` may be missing."""
    findings.facts["python"] = platform.python_version()
    wrong = []
    for line in importlib.metadata.requires("flux2-ds") or []:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            if needed.name not in without:
                wrong.append(f"{needed.name} is missing")
            continue
        findings.facts[needed.name] = version
        if not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name} is {version}, needs {needed.specifier}")
    if wrong:
        findings.fail("packages", "; ".join(wrong), "pip install -c constraints.txt .")
    else:
        shown = ("python", "torch", "deepspeed", "diffusers", "transformers", "peft")
        versions = ", ".join(f"{name} {findings.facts[name]}" for name in shown)
        findings.ok("packages", versions)


def check_script(findings: Findings) -> None:
    """Check whether the `deepspeed` that a user types takes `-m`."""
    beside = Path(sys.executable).with_name("deepspeed")
    path = Path(shutil.which("deepspeed") or beside)
    if not path.is_file():
        findings.fail("deepspeed", f"{path} is missing", "pip install -c constraints.txt .")
    elif "launcher.deepspeed_script" not in path.read_text(errors="replace"):
        findings.warn(
            "deepspeed",
            f"{path} is not this package's script and takes no -m",
            "write --module, or `pip install --force-reinstall --no-deps` flux2-ds again",
        )


def check_machine(findings: Findings) -> None:
    """Check shared memory, and lockable memory with InfiniBand."""
    shm = Path("/dev/shm")
    if shm.is_dir() and (free := shutil.disk_usage(shm).free / GIB) < 1:
        findings.warn(
            "/dev/shm",
            f"{free:.1f} GiB free, NCCL and data loading want more",
            "in a container: --shm-size=16g or --ipc=host",
        )
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Path("/dev/infiniband").is_dir() and limit != resource.RLIM_INFINITY:
        findings.warn(
            "infiniband",
            f"only {limit >> 10} KiB of memory may be locked; NCCL cannot use it so",
            "ulimit -l unlimited (for containers --ulimit memlock=-1)",
        )


def check_gpus(findings: Findings, processes: int) -> None:
    """Check number, driver and free memory, as nvidia-smi tells them."""
    if shutil.which("nvidia-smi") is None:
        findings.fail("gpus", "no nvidia-smi", "install the NVIDIA driver, or use accelerator cpu")
        return
    fields = "name,driver_version,memory.total,memory.used"
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        findings.fail("gpus", (asked.stdout + asked.stderr).strip(), "repair the driver")
        return
    cards = [[word.strip() for word in line.split(",")] for line in asked.stdout.splitlines()]
    kinds = f"{len(cards)} × {', '.join(sorted({card[0] for card in cards}))}"
    findings.facts |= {"gpus": kinds, "driver": cards[0][1]}
    text = f"{kinds}, driver {cards[0][1]}"
    if len(cards) < processes:
        findings.fail("gpus", f"{text}; {processes} processes need as many", "ask for fewer")
        return
    findings.ok("gpus", text)
    # A card that something else holds memory on: 1 GiB is more than any driver takes.
    busy = [
        f"GPU {number}: {card[3]} of {card[2]} MiB"
        for number, card in enumerate(cards)
        if card[3].isdecimal() and int(card[3]) > 1024
    ]
    if busy:
        findings.warn("gpu memory", f"in use: {'; '.join(busy)}", "end it: nvidia-smi names it")


def check_recipe(findings: Findings, recipe: Recipe, processes: int, token: str | None) -> None:
    """Check the plan, run directory, shards, model and W&B of the recipe, as seen from here."""

    def refuses(name: str, check: Any) -> Any:
        try:
            return check()
        except UserError as error:
            findings.fail(name, str(error))
            return None

    plan = refuses("recipe", lambda: make_plan(recipe, processes))
    if plan is not None:
        findings.ok("recipe", plan.lines()[1].removeprefix("batch").strip())
    model, before = Path(recipe.model.path), len(findings.lines)
    allowed = recipe.model.allow_distilled
    spec = refuses("model", lambda: spec_here(recipe.model.path, allow_distilled=allowed))
    directory = model if spec else None
    if spec is not None:
        findings.ok("model", f"{spec} in {model}")
    elif len(findings.lines) == before:  # the id of a model
        check_cache(findings, recipe)
        spec = RELEASED.get(recipe.model.path)
    data = refuses("shards", lambda: read_data(recipe))
    if data is not None:
        recipe = in_steps(recipe)
    check_disk(findings, recipe, spec, token)
    if data is not None:
        findings.facts["shards"] = data[0].digest
    for name, check in run_checks(recipe, data, spec, directory).items():
        before = len(findings.lines)
        refuses(name, check)
        if name == "shards" and data is not None and len(findings.lines) == before:
            findings.ok("shards", f"{data[0].samples} samples in {len(data[0].shards)} shards")
    if recipe.log.wandb == "online" and not (os.environ.get("WANDB_API_KEY") or has_netrc_key()):
        findings.warn("wandb", "online, but no key; it will stay offline", "wandb login")


def check_cache(findings: Findings, recipe: Recipe) -> None:
    """Check whether a hub id's files are on this host already."""
    name = recipe.model.path
    try:
        cached = try_to_load_from_cache(name, "model_index.json", revision=recipe.model.revision)
    except HFValidationError:
        findings.fail("model", f"{name} is neither a directory here nor a hub id", "model.path")
        return
    if isinstance(cached, str):
        findings.ok("model", f"{name} is in the hub's cache")
    else:
        findings.warn(
            "model",
            f"{name} is not on this host; the first start fetches it",
            f"hf download {name} (for a gated model after `hf auth login`)",
        )


def check_disk(findings: Findings, recipe: Recipe, spec: Spec | None, token: str | None) -> None:
    """Check whether run_dir is the launcher's, can be written, and has room for the checkpoints."""
    place = existing_parent(recipe)
    if token is not None and not Path(token).exists():
        findings.fail(
            "run_dir",
            f"{place} is not the directory that the launcher sees",
            "put run_dir on a file system that all hosts share",
        )
    elif not os.access(place, os.W_OK):
        findings.fail("run_dir", f"{place} cannot be written", "correct its owner, or run_dir")
    elif spec is not None:
        free, count = shutil.disk_usage(place).free / GIB, checkpoints_to_come(recipe)
        one = checkpoint_bytes(spec, recipe) / GIB
        plural = "" if count == 1 else "s"
        text = f"{free:.0f} GiB free in {place}, for {count} checkpoint{plural} of {one:.2g} GiB"
        if free < count * one:
            findings.warn("disk", text, "free some, keep fewer, or move run_dir")
        else:
            findings.ok("disk", text)


def checkpoints_to_come(recipe: Recipe) -> int:
    """Return the most checkpoints that the run will have at a time, one while it is written included,
    less those that it has."""
    settings, steps = recipe.checkpoint, recipe.steps
    for_good = steps // settings.keep_every if settings.keep_every else 0
    most = min(math.ceil(steps / settings.every), settings.keep_last + for_good + 1)
    there = len(checkpoint_steps(checkpoints_directory(recipe)))
    return max(1, most - there)


def has_netrc_key() -> bool:
    """Whether `wandb login` has left a key."""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False


if __name__ == "__main__":
    run_root(main)
