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
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from packaging.requirements import Requirement

from flux2_ds.config.buckets import resolutions
from flux2_ds.config.memory import GIB, base_bytes, checkpoint_bytes
from flux2_ds.config.model_spec import (
    PIXELS_PER_TOKEN,
    RELEASED,
    TEXT_TOKENS,
    TOKEN_CHANNELS,
    Spec,
    spec_here,
)
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Recipe, is_url
from flux2_ds.data.dataset import in_steps, read_data, run_checks
from flux2_ds.data.images import is_image
from flux2_ds.data.index import is_prepared
from flux2_ds.errors import UserError, counted, run_root
from flux2_ds.run.run_dir import (
    checkpoints_directory,
    existing_parent,
    nearest_existing,
    step_folders,
)
from launcher.doctor import Findings, last_line, run_probe
from launcher.hosts import Hosts, ask_nvidia_smi, check_cards

_TEXT_ENCODERS = {15360: 48.0e9, 12288: 16.4e9, 7680: 8.0e9}
"""Text width of a released model -> bytes of its encoder in bf16: Mistral Small 24B, Qwen3 8B, Qwen3 4B."""


def main() -> None:
    """Check for the recipe of the arguments, and print JSON.

    `--processes` are this host's, `--all-processes` the run's; `--token` is a file that the launcher
    has put beside the run directory. `--without-shards`: the launcher has seen that none are prepared.
    """
    parser = recipe_parser("launcher.host_checks", "")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--all-processes", type=int, default=1)
    parser.add_argument("--token", type=str, default=None)
    parser.add_argument("--without-recipe", action="store_true")
    parser.add_argument("--without-shards", action="store_true")
    recipe, options = parse_recipe(parser)
    findings, builds_adam = Findings(), False
    check_packages(findings, without=("wandb",) if recipe.log.wandb == "disabled" else ())
    check_script(findings)
    check_machine(findings)
    if recipe.launch.accelerator == "cuda":
        try:
            check_gpus(findings, options.processes)
            if not options.without_recipe:
                check_cards(recipe, Hosts(options.processes))
        except UserError as error:
            findings.fail("gpus", str(error))
    if not options.without_recipe:
        there = not options.without_shards
        check_recipe(findings, recipe, options.all_processes, options.token, prepared=there)
        with suppress(UserError):
            plan = make_plan(recipe, options.all_processes)
            builds_adam = plan.zero_stage == 3 and plan.offloads("offload_optimizer")
    try:
        asked = run_probe(recipe.launch.accelerator, *["--cpu-adam"] * builds_adam)
        values, reason = last_line(asked.returncode, asked.stdout, asked.stderr)
    except UserError as error:
        values, reason = None, str(error)
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
    asked = ask_nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    if asked.returncode != 0:
        findings.fail("gpus", (asked.stdout + asked.stderr).strip(), "repair the driver")
        return
    cards = [[word.strip() for word in line.split(",")] for line in asked.stdout.splitlines()]
    kinds = f"{len(cards)} × {', '.join(sorted({card[0] for card in cards}))}"
    findings.facts |= {"gpus": kinds, "driver": cards[0][1]}
    text = f"{kinds}, driver {cards[0][1]}"
    if len(cards) < processes:
        findings.fail("gpus", f"{text}; there are {processes} processes", "ask for fewer")
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


def check_recipe(
    findings: Findings, recipe: Recipe, processes: int, token: str | None, *, prepared: bool = True
) -> None:
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
    before, model = len(findings.lines), recipe.model
    spec = refuses(
        "model",
        lambda: spec_here(model.path, model.revision, allow_distilled=model.allow_distilled),
    )
    directory = Path(model.path) if Path(model.path).is_dir() else None
    fetched = True
    if spec is not None:
        where = directory or "the hub's cache"
        findings.ok("model", f"{spec} in {where}")
    elif len(findings.lines) == before:  # the id of a model
        fetched = check_cache(findings, recipe)
        spec = RELEASED.get(recipe.model.path)
    data = refuses("shards", lambda: read_data(recipe)) if prepared else None
    if data is not None:
        recipe = in_steps(recipe)
    check_disk(findings, recipe, spec, token, fetched=fetched)
    if data is not None:
        findings.facts["shards"] = data[0].digest
    for name, check in run_checks(recipe, data, spec, directory).items():
        before = len(findings.lines)
        refuses(name, check)
        if name == "shards" and data is not None and len(findings.lines) == before:
            findings.ok(
                "shards",
                f"{counted(data[0].samples, 'sample')} in {counted(len(data[0].shards), 'shard')}",
            )
    if recipe.log.wandb == "online" and not (os.environ.get("WANDB_API_KEY") or has_netrc_key()):
        findings.warn("wandb", "online, but no key; it will stay offline", "wandb login")


def check_cache(findings: Findings, recipe: Recipe) -> bool:
    """Check whether a hub id's files are on this host already; return it."""
    name = recipe.model.path
    try:
        cached = try_to_load_from_cache(name, "model_index.json", revision=recipe.model.revision)
    except HFValidationError:
        findings.fail("model", f"{name} is neither a directory here nor a hub id", "model.path")
        return True
    if isinstance(cached, str):
        findings.ok("model", f"{name} is in the hub's cache")
    else:
        findings.warn(
            "model",
            f"{name} is not on this host; the first start fetches it",
            f"hf download {name} --include model_index.json --include '*/*' (a gated model: after `hf auth login`)",
        )
    return isinstance(cached, str)


def check_disk(
    findings: Findings,
    recipe: Recipe,
    spec: Spec | None,
    token: str | None,
    *,
    fetched: bool = True,
) -> None:
    """Check whether run_dir is the launcher's, can be written, and has room for the checkpoints, with what else is
    to come on the same disk: a model that is not `fetched`, shards that are not prepared."""
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
        count, one = checkpoints_to_come(recipe), checkpoint_bytes(spec, recipe)
        plural = "" if count == 1 else "s"
        needs = [(place, count * one, f"{count} checkpoint{plural} of {one / GIB:.2g} GiB")]
        if not fetched:
            size = base_bytes(spec, None, 2) + _TEXT_ENCODERS[spec.text_width]
            needs.append((Path(HF_HUB_CACHE), size, f"a download of {size / GIB:.0f} GiB"))
        if not (is_url(recipe.data.shards) or is_prepared(recipe.data.shards)):
            images, sample = images_here(recipe), sample_bytes(recipe, spec)
            text = f"shards of {images} images, at most {images * sample / GIB:.2g} GiB"
            needs += [(Path(recipe.data.shards), images * sample, text)] * bool(images)
        check_room(findings, needs)


def check_room(findings: Findings, needs: list[tuple[Path, float, str]]) -> None:
    """Compare what is to be written, each with its place, bytes and name, with the free bytes of each disk."""
    disks: dict[int, list[tuple[Path, float, str]]] = {}
    for path, size, text in needs:
        place = nearest_existing(path)
        disks.setdefault(place.stat().st_dev, []).append((place, size, text))
    for on_disk in disks.values():
        place, free = on_disk[0][0], shutil.disk_usage(on_disk[0][0]).free
        text = (
            f"{free / GIB:.0f} GiB free in {place}, for {', '.join(text for _, _, text in on_disk)}"
        )
        if free < sum(size for _, size, _ in on_disk):
            findings.warn("disk", text, "free some, keep fewer checkpoints, or use another disk")
        else:
            findings.ok("disk", text)


def images_here(recipe: Recipe) -> int:
    """Return how many files are called like images in the folders of `data.images`; archives are not opened."""
    images = recipe.data.images
    folders = [images] if isinstance(images, str) else list(images.values())
    return sum(
        is_image(name)
        for folder in folders
        if not is_url(folder)
        for _, _, names in os.walk(folder)
        for name in names
    )


def sample_bytes(recipe: Recipe, spec: Spec) -> float:
    """Return the bytes of a sample in the largest bucket: a latent in fp32, a caption without its padding cut."""
    tokens = max(resolutions(recipe.data.resolution)) ** 2 / PIXELS_PER_TOKEN**2
    return 4 * tokens * TOKEN_CHANNELS + 2 * TEXT_TOKENS * spec.text_width


def checkpoints_to_come(recipe: Recipe) -> int:
    """Return the most checkpoints that the run will have at a time, one while it is written included,
    less those that it has."""
    settings, steps = recipe.checkpoint, recipe.steps
    for_good = steps // settings.keep_every if settings.keep_every else 0
    most = min(math.ceil(steps / settings.every), settings.keep_last + for_good + 1)
    there = len(step_folders(checkpoints_directory(recipe)))
    return max(1, most - there)


def has_netrc_key() -> bool:
    """Whether `wandb login` has left a key."""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False


if __name__ == "__main__":
    run_root(main)
