"""Saving while training, and going on from what was saved."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from flux2_ds.checkpoint import manager
from flux2_ds.checkpoint.background import BackgroundSave
from flux2_ds.checkpoint.manager import SaveError
from flux2_ds.checkpoint.tensor_store import TensorShard
from flux2_ds.config.model_files import base_digest, changed_files, file_digests
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.index import Index
from flux2_ds.distributed import Process, barrier, broadcast_from_rank0
from flux2_ds.engine.engine import Engine
from flux2_ds.engine.host_memory import HostBuffers
from flux2_ds.engine.optimizers import compatible
from flux2_ds.errors import UserError
from flux2_ds.run.environment import free_host_memory
from flux2_ds.run.logging import progress_bar
from flux2_ds.run.metrics import Metrics, check_metrics, metrics_digest
from flux2_ds.run.run_dir import checkpoints_directory, merged_files

log = logging.getLogger("flux2_ds")


class Checkpoints:
    """Saves what `engine` has trained, with `run_state`, and removes old checkpoints.

    `metrics` is None in all ranks but 0. `heartbeat` is called with (step, phase) at each tensor. `local_ranks`:
    how many share this host.
    """

    def __init__(
        self,
        engine: Engine,
        recipe: Recipe,
        process: Process,
        run_state: dict[str, Any],
        metrics: Metrics | None,
        heartbeat: Callable[[int, str], None],
        local_ranks: int = 1,
    ) -> None:
        self._engine, self._settings, self._process = engine, recipe.checkpoint, process
        self._root, self._run_state = checkpoints_directory(recipe), run_state
        self._run_dir = Path(recipe.run_dir)
        self._metrics, self._heartbeat = metrics, heartbeat
        self._local_ranks = local_ranks
        self._buffers: HostBuffers | None = None
        self._pending: BackgroundSave | None = None

    def save(self, step: int, *, last: bool, validation: Sequence[tuple[int, float]] = ()) -> float:
        """Save a checkpoint; returns the seconds for which training waited. Collective.

        It is complete on return, or with `checkpoint.background` later, but for the `last` of this start.
        `validation`: the step and loss of every evaluation until now.

        A run that goes on survives one that cannot be written: stopping would lose what it has trained.
        Raises SaveError at the last chance.
        """

        def followed(shard: TensorShard) -> TensorShard:
            self._heartbeat(step, "saving")
            bar.update()
            return shard

        began = time.perf_counter()
        self._heartbeat(step, "saving")
        self.wait(step)
        bar = progress_bar("saving", None, "tensor", delay=1)
        state, validation = self._engine.state, list(validation)
        what = (
            self._root,
            step,
            lambda: map(followed, state.tensor_shards()),
            {
                **self._run_state,
                **state.counters(),
                "validation": validation,
                "metrics": metrics_digest(self._run_dir) if self._process.is_rank0 else None,
            },
            self._process,
        )
        done = partial(self._done, step, validation)
        try:
            if self._settings.background and not last:
                buffers = self._buffers = self._buffers or self._new_buffers()
                self._pending = BackgroundSave(*what, buffers, done, sharded=state.sharded)
            else:
                path = manager.save(*what, sharded=state.sharded)
                if self._process.is_rank0:
                    done(path, None)
                barrier()
        except SaveError as error:
            if last:
                raise
            self._not_saved(str(error))
        finally:
            bar.close()
        waited = time.perf_counter() - began
        log.info("training waited %.2f s for the checkpoint of step %d", waited, step)
        return waited

    def wait(self, step: int) -> None:
        """Wait for the checkpoint that is being written, if there is one; each rank for its own part of it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.writing:
            log.info("waiting for %s, which is still being written", pending.path.name)
        pending.wait(lambda: self._heartbeat(step, "saving"))

    def _new_buffers(self) -> HostBuffers:
        # The other half is for the files on their way to the disk.
        return HostBuffers(free_host_memory() / 2 / self._local_ranks, self._process.device)

    def _not_saved(self, why: str) -> None:
        log.error("%s Training goes on, with the next attempt at the next checkpoint.", why)

    def _done(
        self, step: int, validation: list[tuple[int, float]], path: Path, failure: str | None
    ) -> None:
        """What rank 0 does once a checkpoint is complete, or cannot be written."""
        if failure is not None:
            self._not_saved(failure)
            return
        log.info("saved %s", path)
        if self._metrics is not None:
            self._metrics.saved(step, path)
        settings = self._settings
        try:
            best = manager.best_step(self._root, validation) if settings.keep_best else None
            if best is not None:
                log.info("best       step %d, held-out loss %.4f", best, dict(validation)[best])
            manager.remove_old(self._root, settings.keep_last, settings.keep_every, best)
        except (OSError, UserError) as error:
            log.warning("old checkpoints cannot be removed (%s); training goes on", error)


def note_base_files(
    run_state: dict[str, Any], recipe: Recipe, first_step: int, directory: Path
) -> None:
    """Put digests of the transformer's files into what checkpoints hold, once all are read: beside the
    training, because 64 GB take half a minute at 2 GB/s. What the checkpoint of `first_step` knows is not
    read again."""
    path = manager.checkpoint_path(checkpoints_directory(recipe), first_step)
    known = manager.Checkpoint(path, first_step).state().get("base_files") if first_step else None

    def read() -> None:
        try:
            run_state["base_files"] = file_digests(directory / "transformer", known)
        except OSError as error:
            log.warning("no digests of the base weights, because %s", error)

    run_state["base_files"] = None
    Thread(target=read, name="base files", daemon=True).start()


def changed_base_files(state: dict[str, Any], directory: Path) -> list[str]:
    """Files of the transformer that are not those of a checkpoint's state, in contents. Those that have
    another time of change are read in full."""
    before = state.get("base_files")
    if not before:
        return []
    return changed_files(before, file_digests(directory / "transformer", before))


def resume(
    engine: Engine, recipe: Recipe, index: Index, process: Process, model_directory: Path
) -> int:
    """Load the newest intact checkpoint, if there is one; returns the step to start from. Collective.

    Rank 0 chooses, so that all ranks load the same one. Refuses one that does not fit the recipe or the shards.
    """
    root = checkpoints_directory(recipe)
    step = 0
    if process.is_rank0:
        found, damaged = manager.newest(root)
        for path, damage in damaged.items():
            log.warning("%s is damaged: %s", path, damage)
            log.warning("going on from the one before; moved it to %s", manager.set_aside(path))
        step = found.step if found else 0
    step = broadcast_from_rank0(step, process.device)
    if step == 0:
        return 0
    chosen = manager.Checkpoint(manager.checkpoint_path(root, step), step)
    if not chosen.path.is_dir():
        raise UserError(
            f"rank {process.rank} does not see {chosen.path}, which rank 0 does. run_dir must be on a "
            "file system that all hosts share."
        )
    state = chosen.state()
    if process.is_rank0:
        check_metrics(Path(recipe.run_dir), state["metrics"])
        base = base_digest(model_directory, merged_files(recipe))
        files = changed_base_files(state, model_directory)
        if files or state["base"] != base:
            digests = [f"digest {base}, was {state['base']}"] * (state["base"] != base)
            what = f"({'; '.join([*digests, *(f'{name} differs' for name in files)])})"
            merged = " with lora.merge_first in it" * bool(recipe.lora.merge_first)
            if not recipe.accept_changes:
                raise UserError(
                    f"the transformer of model.path {recipe.model.path}{merged} is not the one that {chosen.path} "
                    f"was trained over {what}. Restore its files, give a new run_dir, or set accept_changes: true."
                )
            log.warning("accepted: another transformer in %s %s", recipe.model.path, what)
    before = state["recipe"]["optimizer"]["name"]
    if not compatible(before, recipe.optimizer.name):
        raise UserError(
            f"{chosen.path} was written with other optimizer settings: optimizer.name was {before}, is "
            f"{recipe.optimizer.name}, which cannot use its state. Go on with {before}, or give a new run_dir."
        )
    if state["index"] != index.digest:
        what = f"(index {index.digest}, was {state['index']})"
        if not recipe.accept_changes:
            raise UserError(
                f"data.shards {recipe.data.shards} are not the shards that {chosen.path} was trained on "
                f"{what}. Restore them, give a new run_dir, or set accept_changes: true."
            )
        log.warning("accepted: other shards in data.shards %s %s", recipe.data.shards, what)
    engine.state.load(chosen)
    log.info("continuing after step %d from %s", step, chosen.path)
    return step
