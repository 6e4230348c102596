"""Saving a checkpoint by all processes together: it becomes visible in all of them, or in none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flux2_ds import checkpoint
from flux2_ds.agreement import exchange
from flux2_ds.errors import UserError
from flux2_ds.processes import Process
from flux2_ds.stored import Piece


class SaveError(UserError):
    """A checkpoint could not be written, in any of the processes. Those before it are untouched."""


def save(
    root: Path,
    step: int,
    pieces: Callable[[], Iterable[Piece]],
    state: dict[str, Any],
    process: Process,
    *,
    in_parts: bool,
) -> Path:
    """Write the checkpoint of `step`; collective.

    `pieces` is collective, too: called in every process, it gives what that one writes. `in_parts`:
    several do.

    Raises:
        SaveError: in all processes, when one of them cannot write.
    """

    def clear() -> None:
        if process.first:
            shutil.rmtree(checkpoint.partial_path(root, step), ignore_errors=True)

    def together(action: Callable[[], Any]) -> list[Any]:
        """The results of all processes, once all of them have come this far."""
        result, failure = None, None
        try:
            result = action()
        except (OSError, SafetensorError) as error:
            failure = f"{error}"
        outcomes = exchange((result, failure))
        failures = {rank: why for rank, (_, why) in enumerate(outcomes) if why is not None}
        if failures:
            clear()
            rank, why = next(iter(failures.items()))
            raise SaveError(
                f"the checkpoint of step {step} cannot be written to {root}: {why} (process {rank}). "
                "Make room there, or correct its permissions. Earlier checkpoints are untouched."
            )
        return [result for result, _ in outcomes]

    part = process.rank if in_parts else None
    together(lambda: checkpoint.begin(root, step) if process.first else None)
    partial = checkpoint.partial_path(root, step)
    written = together(lambda: checkpoint.write_files(partial, pieces(), part))
    files = {name: facts for one in written for name, facts in one.items()}
    together(lambda: checkpoint.finish(root, step, files, state) if process.first else None)
    return checkpoint.checkpoint_path(root, step)
