"""A run's checkpoints: named tensors in safetensors, state in JSON, complete or not there at all.

step_00000040/               state.json, weights.safetensors, exp_avg.safetensors, ...
.step_00000050.partial/      being written; .removed while it is being removed
step_00000030.damaged/       set aside at a resume
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flux2_ds.checkpoint.tensor_store import File, TensorShard, TensorStore, files_of, write
from flux2_ds.distributed import Process, all_gather_object
from flux2_ds.errors import MALFORMED, UserError
from flux2_ds.run.run_dir import STATE_NAME, step_folders

_READERS = 8


class SaveError(UserError):
    """A checkpoint could not be written by one of the ranks. Earlier ones are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The contents of state.json."""
        value: dict[str, Any] = json.loads((self.path / STATE_NAME).read_text())
        return value

    def kinds(self) -> list[str]:
        """What is stored: weights, EMA, and the states of the optimizer that trained them."""
        return sorted({_kind(name) for name in self.state()["files"]})

    def store(self, kind: str) -> TensorStore:
        """The tensors of one kind, to be read one by one or in shards. Refuses a kind that is absent."""
        files = [self.path / name for name in self.state()["files"] if _kind(name) == kind]
        if not files:
            raise UserError(
                f"{self.path} holds no {kind}, only {', '.join(self.kinds())}. It was written with "
                "other optimizer settings; go on with those, or give a new run_dir."
            )
        return TensorStore(files)

    def tensors(self, kind: str) -> dict[str, torch.Tensor]:
        """Full tensors by parameter name, all at once."""
        store = self.store(kind)
        return {name: store.tensor(name) for name in store.shapes}


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return root / f"step_{step:08d}"


def find(root: Path) -> list[Checkpoint]:
    """Checkpoints by ascending step."""
    return [Checkpoint(path, step) for step, path in step_folders(root).items()]


def newest(root: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest intact checkpoint, and what is wrong with each newer one that was passed over.

    Refuses if there are checkpoints but none is intact.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(find(root)):
        damage = verify(checkpoint)
        if damage is None:
            return checkpoint, damaged
        damaged[checkpoint.path] = damage
    if damaged:
        list_of = "; ".join(f"{path}: {damage}" for path, damage in damaged.items())
        raise UserError(
            f"no intact checkpoint is left ({list_of}). Restore one, or remove the damaged "
            "directories to start from the beginning."
        )
    return None, {}


def verify(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files, or None. Refuses files that are there and cannot be read."""

    def damage(name: str) -> str | None:
        facts, file = files[name], checkpoint.path / name
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
        if _sha256(file) != facts["sha256"]:
            return f"{name} does not have its sha256"
        return None

    try:
        state = checkpoint.state()
        if state.pop("sha256") != _digest(state):
            return f"{STATE_NAME} does not have its sha256"
        if state["step"] != checkpoint.step:
            return f"{STATE_NAME} is of step {state['step']}"
        files = state["files"]
        with ThreadPoolExecutor(_READERS) as readers:  # the other ranks wait
            return next(filter(None, readers.map(damage, files)), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}). Correct its owner or its disk, or give "
            "another run_dir."
        ) from error
    except MALFORMED as error:
        return f"{STATE_NAME} cannot be read ({error!r})"


def save(
    root: Path,
    step: int,
    tensor_shards: Callable[[], Iterable[TensorShard]],
    state: dict[str, Any],
    process: Process,
    *,
    sharded: bool,
) -> Path:
    """Write the checkpoint of `step`. Collective.

    `tensor_shards` is collective, too: called in every rank, it gives what that one writes. `sharded`:
    several ranks write. If one cannot, all raise a `SaveError`.
    """
    path = checkpoint_path(root, step)
    partial = partial_path(path)

    def rank0(action: Callable[[], None]) -> None:
        together(path, process, action if process.is_rank0 else lambda: None)

    rank0(lambda: begin(root, partial))
    rank = process.rank if sharded else None
    written = together(path, process, lambda: write_files(partial, files_of(tensor_shards(), rank)))
    files = {name: facts for one in written for name, facts in one.items()}
    rank0(lambda: finish(partial, path, {**state, "step": step, "files": files}))
    return path


def together(path: Path, process: Process, action: Callable[[], Any]) -> list[Any]:
    """The results of all ranks, by rank, once all have come this far. Collective.
    Refuses, and removes what is written of `path`, if one cannot.
    """
    result, failure = None, None
    try:
        result = action()
    except OSError as error:
        failure = str(error)
    outcomes = all_gather_object((result, failure))
    for rank, (_, why) in enumerate(outcomes):
        if why is not None:
            if process.is_rank0:
                shutil.rmtree(partial_path(path), ignore_errors=True)
            raise SaveError(not_written(path, why, rank))
    return [result for result, _ in outcomes]


def not_written(path: Path, why: str, rank: int) -> str:
    """Say that a checkpoint cannot be written."""
    return (
        f"the checkpoint of step {int(path.name.removeprefix('step_'))} cannot be written to {path.parent}: {why} (rank {rank}). "
        "Make room there, or correct its permissions. Earlier checkpoints are untouched."
    )


def partial_path(path: Path) -> Path:
    """Where the checkpoint `path` is written."""
    return path.with_name(f".{path.name}.partial")


def begin(root: Path, partial: Path) -> None:
    """Make the hidden directory in which a checkpoint is written; remove what a kill left."""
    for leftover in [*root.glob(".step_*.partial"), *root.glob(".step_*.removed")]:
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def write_files(partial: Path, files: Iterable[File]) -> dict[str, dict[str, Any]]:
    """Write files into a begun checkpoint, synced; returns size and sha256 of each."""
    partial.mkdir(parents=True, exist_ok=True)  # another host may not see it yet
    written = {}
    for file in files:
        path = write(partial, file)
        _sync(path)
        written[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return written


def finish(partial: Path, path: Path, state: dict[str, Any]) -> None:
    """Make a begun checkpoint visible as `path`."""
    state = json.loads(json.dumps(state))  # as it will be read
    (partial / STATE_NAME).write_text(json.dumps({**state, "sha256": _digest(state)}, indent=1))
    _sync(partial / STATE_NAME)
    _sync(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    _sync(path.parent)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it does not count as one of those that are kept."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def best_step(root: Path, history: Iterable[tuple[int, float]]) -> int | None:
    """The checkpoint with the lowest validation loss; None if none has one."""
    losses = dict(history)
    known = [each.step for each in find(root) if math.isfinite(losses.get(each.step, math.nan))]
    return min(known, key=losses.__getitem__, default=None)


def remove_old(root: Path, keep_last: int, keep_every: int | None, best: int | None = None) -> None:
    """Remove all but the last `keep_last` checkpoints, the multiples of `keep_every` and that of step `best`."""
    for checkpoint in find(root)[:-keep_last]:
        if checkpoint.step != best and (keep_every is None or checkpoint.step % keep_every):
            # Renamed first: a removal that is cut short leaves no directory that looks complete.
            doomed = root / f".{checkpoint.path.name}.removed"
            shutil.rmtree(doomed, ignore_errors=True)
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed)


def _kind(name: str) -> str:
    return name.removesuffix(".safetensors").split("-")[0]


def _digest(state: dict[str, Any]) -> str:
    """Of all fields but itself."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise  # some file systems sync no directories
    finally:
        os.close(descriptor)
