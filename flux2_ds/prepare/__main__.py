"""Encode images and captions into WebDataset shards of latents and text embeddings.

    flux2-ds prepare --config recipes/h100x1.yaml
    deepspeed --num_gpus 8 --module flux2_ds.prepare --config recipes/h100x8.yaml

Rank 0 plans the shards. Every rank encodes its share of the captions, then of the images, so that
text encoder and VAE are never in memory together. Rank 0 writes the index. Starting again continues
after a stop and adds what is new: finished shards are never rewritten.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError

from flux2_ds.config.model_files import fingerprint, model_directory
from flux2_ds.config.model_spec import Spec, read_spec
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.recipe import Recipe
from flux2_ds.config.validate import check_recipe
from flux2_ds.data.index import Index
from flux2_ds.errors import UserError, run_root
from flux2_ds.prepare.folder import (
    check_contents,
    check_folder,
    contents,
    lock_folder,
)
from flux2_ds.prepare.plan import Usable, find_usable, plan_shards
from flux2_ds.run.environment import rank_and_world_size
from flux2_ds.run.logging import set_up_log
from flux2_ds.run.run_dir import prepare_logs_directory
from flux2_ds.run.watchdog import Watchdog

log = logging.getLogger("flux2_ds")


def main() -> None:
    """Entry point of `flux2_ds.prepare`, one call in each process."""
    recipe, _ = parse_recipe(recipe_parser("flux2_ds.prepare", "Encode images into shards."))
    check_recipe(recipe)
    folder = check_folder(recipe.data.shards)
    rank, world_size = rank_and_world_size(os.environ)
    logs = prepare_logs_directory(recipe)
    with (
        lock_folder(folder) if rank == 0 else nullcontext(),
        Watchdog(logs, rank, world_size, hang_timeout_s=recipe.launch.hang_timeout_s) as watchdog,
    ):
        set_up_log(logs, rank)
        watchdog.heartbeat(0, "looking for images")
        usable = find_usable(recipe) if rank == 0 else None  # before anyone waits for a model
        watchdog.heartbeat(0, "fetching the model")
        parts = ["vae", "text_encoder", "tokenizer", "scheduler"]
        directory = model_directory(recipe.model.path, recipe.model.revision, parts)
        spec = read_spec(directory, allow_distilled=True)
        prepare(recipe, directory, spec, watchdog.heartbeat, usable)


def prepare(
    recipe: Recipe,
    directory: Path,
    spec: Spec,
    heartbeat: Callable[[int, str], None] = lambda step, phase: None,
    usable: Usable | None = None,
) -> Index | None:
    """Write shards, index.json and report as one rank of all; returns the index on rank 0."""
    folder = Path(recipe.data.shards)
    own_contents = contents(recipe, fingerprint(directory))
    rank, _ = rank_and_world_size(os.environ)
    with full_disk_explained(folder):
        plan = None
        if rank == 0:
            heartbeat(0, "planning the shards")
            plan = plan_shards(recipe, usable or find_usable(recipe), spec, own_contents)

            if plan.jobs:
                log.info("loading the encoders of %s", recipe.model.path)

        # Here: nobody waits for torch to hear what is wrong with the data.
        from flux2_ds.distributed import broadcast_object, cpu_process_group
        from flux2_ds.prepare.encode import Encoding, encode
        from flux2_ds.prepare.report import finish

        heartbeat(0, "meeting the other processes")
        with cpu_process_group(recipe.launch.accelerator) as process:
            jobs = broadcast_object(plan.jobs if plan else None)
            check_contents(folder, own_contents)  # all ranks: the same folder, settings and model
            encoding = Encoding(recipe, directory, spec, process, heartbeat)
            started = time.monotonic()
            written, long_captions = encode(encoding, jobs, plan.manifests if plan else [])
            heartbeat(0, "finishing")
            index = None
            if plan:
                index = finish(
                    recipe, spec, plan, written, long_captions, time.monotonic() - started
                )
    return index


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Make a full disk a `UserError`; nothing that is finished is lost."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors names the cause in its message alone.
        full = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)}
        reason = next((each for each in full if each in str(error)), None)
        if reason is None:
            raise
        raise UserError(
            f"the disk of data.shards {folder} is full ({reason}). Free some space and "
            "start again: finished shards are kept."
        ) from error


if __name__ == "__main__":
    run_root(main)
