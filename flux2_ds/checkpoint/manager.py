"""Checkpoints: named tensors in safetensors, position in JSON, all of it or none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flux2_ds.checkpoint.tensor_store import TensorShard, TensorStore, write
from flux2_ds.distributed import Process, all_gather_object
from flux2_ds.errors import UserError
from flux2_ds.run.run_dir import checkpoint_steps

STATE_NAME = "state.json"
_READERS = 8


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
        """What is stored: weights, and the states of the optimizer that trained them."""
        return sorted({_kind(name) for name in self.state()["files"]})

    def stored(self, kind: str) -> TensorStore:
        """The tensors of one kind, to be read one by one or in parts.

        Raises:
            UserError: the checkpoint has none of it.
        """
        files = [self.path / name for name in self.state()["files"] if _kind(name) == kind]
        if not files:
            raise UserError(
                f"{self.path} holds no {kind}, only {', '.join(self.kinds())}. It was written with "
                "other optimizer settings; go on with those, or give a new run_dir."
            )
        return TensorStore(files)

    def tensors(self, kind: str) -> dict[str, torch.Tensor]:
        """Whole tensors by parameter name, all at once."""
        stored = self.stored(kind)
        return {name: stored.whole(name) for name in stored.shapes}


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return root / f"step_{step:08d}"


def begin(root: Path, step: int) -> Path:
    """The hidden directory into which the checkpoint of `step` is written; leftovers are removed."""
    for leftover in [*root.glob(".step_*.partial"), *root.glob(".step_*.removed")]:
        shutil.rmtree(leftover)
    partial = partial_path(root, step)
    partial.mkdir(parents=True)
    return partial


def partial_path(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is while it is written."""
    return root / f".{checkpoint_path(root, step).name}.partial"


def write_files(
    partial: Path, tensor_shards: Iterable[TensorShard], part: int | None = None
) -> dict[str, dict[str, Any]]:
    """Write tensors into a begun checkpoint, synced; returns size and sha256 of each file."""
    partial.mkdir(parents=True, exist_ok=True)  # another host may not see it yet
    files = {}
    for file in write(partial, tensor_shards, part):
        _sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return files


def finish(root: Path, step: int, files: dict[str, Any], state: dict[str, Any]) -> Path:
    """Make a begun checkpoint visible, with everything that `files` names in it."""
    partial, path = partial_path(root, step), checkpoint_path(root, step)
    (partial / STATE_NAME).write_text(json.dumps({**state, "step": step, "files": files}, indent=1))
    _sync(partial / STATE_NAME)
    _sync(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    _sync(root)
    return path


def newest(root: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest intact checkpoint, and what is wrong with each newer one that was passed over.

    Raises:
        UserError: there are checkpoints, but none is intact.
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


def find(root: Path) -> list[Checkpoint]:
    """Checkpoints by ascending step."""
    return [Checkpoint(path, step) for step, path in checkpoint_steps(root).items()]


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not counted among those that are kept."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def verify(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = {
            name: (int(facts["bytes"]), str(facts["sha256"]))
            for name, facts in checkpoint.state()["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE_NAME} cannot be read ({error!r})"

    def damage(name: str) -> str | None:
        (size, sha256), file = files[name], checkpoint.path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != sha256:
            return f"{name} does not have its sha256"
        return None

    with ThreadPoolExecutor(_READERS) as readers:  # the other processes wait
        return next(filter(None, readers.map(damage, files)), None)


def remove_old(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove all but the last `keep_last` checkpoints and the multiples of `keep_every`."""
    for checkpoint in find(root)[:-keep_last]:
        if keep_every is None or checkpoint.step % keep_every:
            # Renamed first: a removal that is cut short leaves no directory that looks complete.
            doomed = root / f".{checkpoint.path.name}.removed"
            shutil.rmtree(doomed, ignore_errors=True)
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed)


def _kind(name: str) -> str:
    return name.removesuffix(".safetensors").split("-")[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SaveError(UserError):
    """A checkpoint could not be written, in any of the processes. Those before it are untouched."""


def save(
    root: Path,
    step: int,
    tensor_shards: Callable[[], Iterable[TensorShard]],
    state: dict[str, Any],
    process: Process,
    *,
    sharded: bool,
) -> Path:
    """Write the checkpoint of `step`; collective.

    `tensor_shards` is collective, too: called in every process, it gives what that one writes. `sharded`:
    several do.

    Raises:
        SaveError: in all processes, when one of them cannot write.
    """

    def clear() -> None:
        if process.is_rank0:
            shutil.rmtree(partial_path(root, step), ignore_errors=True)

    def together(action: Callable[[], Any]) -> list[Any]:
        """The results of all processes, once all of them have come this far."""
        result, failure = None, None
        try:
            result = action()
        except (OSError, SafetensorError) as error:
            failure = f"{error}"
        outcomes = all_gather_object((result, failure))
        failures = {rank: why for rank, (_, why) in enumerate(outcomes) if why is not None}
        if failures:
            clear()
            rank, why = next(iter(failures.items()))
            raise SaveError(
                f"the checkpoint of step {step} cannot be written to {root}: {why} (process {rank}). "
                "Make room there, or correct its permissions. Earlier checkpoints are untouched."
            )
        return [result for result, _ in outcomes]

    part = process.rank if sharded else None
    together(lambda: begin(root, step) if process.is_rank0 else None)
    partial = partial_path(root, step)
    written = together(lambda: write_files(partial, tensor_shards(), part))
    files = {name: facts for one in written for name, facts in one.items()}
    together(lambda: finish(root, step, files, state) if process.is_rank0 else None)
    return checkpoint_path(root, step)
