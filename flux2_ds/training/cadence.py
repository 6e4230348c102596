"""When something is due: a pure function of the number of steps that are done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Due:
    """What to do after a step."""

    log: bool
    validation: bool
    checkpoint: bool
    preview: bool
    last: bool
    """Whether no step follows in this start."""


@dataclass(frozen=True)
class Cadence:
    """Steps between log lines, checkpoints, validations and previews; None: never."""

    steps: int
    """Of the whole run."""
    log: int
    checkpoint: int
    validation: int | None
    preview: int | None

    def due(self, done: int, stopping: bool = False, ended: bool = False) -> Due:
        """What is due after `done` steps, all of it at the end, which may have `ended` the run early.

        A run that is asked to stop saves and logs, but takes no time for validation and previews. Both come
        with a log line.
        """
        last = stopping or ended or done == self.steps

        def every(period: int | None) -> bool:
            return period is not None and (last or done % period == 0)

        validation = every(self.validation) and not stopping
        preview = every(self.preview) and not stopping
        log = every(self.log) or validation or preview
        return Due(log, validation, every(self.checkpoint), preview, last)
