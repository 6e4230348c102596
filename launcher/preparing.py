"""`flux2-ds prepare`, here and over the machines of a hostfile."""

from __future__ import annotations

from flux2_ds.config.recipe import Recipe
from flux2_ds.data.index import INDEX_NAME
from flux2_ds.prepare.folder import check_folder, lock_folder
from flux2_ds.prepare.manifest import manifest_paths
from flux2_ds.run.run_dir import prepare_logs_directory
from launcher.hosts import Hosts
from launcher.supervise import Job, supervise

PREPARE = "flux2_ds.prepare"


def prepare_shards(recipe: Recipe, hosts: Hosts, arguments: list[str]) -> int:
    """Run `prepare` to its end, or until a signal ends all of it; return the exit code."""
    folder = check_folder(recipe.data.shards)
    with lock_folder(folder, ".launcher.lock"):
        lock_folder(folder).close()  # a `prepare` that was started by hand
        return supervise(
            prepare_job(recipe),
            recipe.launch,
            hosts,
            arguments,
            max_restarts=0,
            elastic=False,
            node=None,
        )


def prepare_job(recipe: Recipe) -> Job:
    """Return the job that prepares."""
    folder = check_folder(recipe.data.shards)
    index = folder / INDEX_NAME

    def written() -> int:
        return index.stat().st_mtime_ns if index.exists() else 0

    before = written()  # every start that is not refused writes the index anew
    return Job(
        PREPARE,
        prepare_logs_directory(recipe),
        None,
        lambda: len(manifest_paths(folder)),
        "{} shards",
        lambda: "" if written() != before else f"{index} has not been written",
        lambda processes: None,
    )
