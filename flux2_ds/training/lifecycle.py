"""What is said and written where a start of a run begins and ends."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from flux2_ds.config.memory import GIB, Memory, out_of_memory
from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import OutageError, UserError
from flux2_ds.run.metrics import METRICS_NAME, draw_loss_if_missing, read_metrics
from flux2_ds.run.report import RunReport, write_report
from flux2_ds.run.run_dir import RECIPE_NAME, changed_settings, is_finished, write_run_dir
from flux2_ds.training.build import Run
from flux2_ds.training.inputs import Inputs

log = logging.getLogger("flux2_ds")


def settle(inputs: Inputs, first_step: int) -> Inputs:
    """Write into the run directory what goes on from `first_step`, or say that nothing is left to do.

    Returns the inputs with the steps at which the run has ended, where its held-out loss ended it.
    """
    recipe, rank0 = inputs.recipe, inputs.process.is_rank0
    if not is_finished(recipe, first_step):
        if rank0:
            for change in changed_settings(recipe):
                log.warning("accepted: %s", change)
            write_run_dir(inputs.plan)
        return inputs
    log_nothing_to_do(recipe, first_step)
    if rank0:
        draw_loss_if_missing(Path(recipe.run_dir))
    recipe = replace(recipe, steps=min(first_step, recipe.steps))
    return replace(inputs, plan=replace(inputs.plan, recipe=recipe))


@contextmanager
def failures_told(run: Run, expected: Memory) -> Iterator[None]:
    """Close what a run has open when its steps end, and say what a failure means."""
    try:
        yield
    except Exception as error:
        failure = error
        if isinstance(error, torch.OutOfMemoryError):
            # Of the backward pass at stage 3, which is not warmed up, or of a card that others use as well.
            failure = OutageError(
                out_of_memory(run.recipe, "step", "a step", error, expected.spare)
            )
        if run.metrics is not None:
            defect = "" if isinstance(failure, UserError) else f"{type(failure).__name__}: "
            run.metrics.alert("the run has ended", f"{defect}{failure}", last=True)
        if failure is error:
            raise
        raise failure from error
    finally:
        run.progress.close()
        # An error is no reason to lose what is being written.
        run.checkpoints.wait(run.recipe.steps)


def end(run: Run, expected: Memory, *, seconds: float, finished: bool) -> None:
    """Close the metrics and say what came of the run. `seconds`: of this start."""
    log_memory(expected, run.process.device)
    if run.metrics is not None:
        run.metrics.close()
        took = timedelta(seconds=round(seconds))
        log.info("%s in %s", "done" if finished else "stopped", took)
    if run.process.is_rank0:
        log_end(Path(run.recipe.run_dir), finished)


def log_memory(expected: Memory, device: torch.device) -> None:
    """Log the predicted peak against the measured one, at the end of a run on a card."""
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(device)
        log.info(
            "memory     peak %.1f GiB, predicted %.1f GiB (%+.0f %%)",
            measured / GIB,
            expected.on_card / GIB,
            100 * (expected.on_card - measured) / measured,
        )


def log_end(run_dir: Path, finished: bool) -> None:
    """Say what came of the run, and the next command to paste."""
    if facts := RunReport("", run_dir, {}, read_metrics(run_dir / METRICS_NAME)).facts():
        log.info("result     %s", ", ".join(f"{name} {fact}" for name, fact in facts.items()))
    if page := write_report(run_dir):
        log.info("report     %s", page)
    recipe = shlex.quote(str(run_dir / RECIPE_NAME))
    if finished:
        log.info("next       flux2-ds export --config %s", recipe)
        log.info("           flux2-ds sample --config %s", recipe)
    else:
        log.info("go on      flux2-ds train --config %s", recipe)


def log_nothing_to_do(recipe: Recipe, first_step: int) -> None:
    """Say that the newest checkpoint is past the end, and what would go on from it."""
    if first_step < recipe.steps:
        log.info(
            "nothing to do: the held-out loss ended the run at step %d. To go on, raise "
            "validation.patience, which is %d",
            first_step,
            recipe.validation.patience,
        )
        return
    changed = recipe.optimizer.schedule != "constant"
    also = " and set accept_changes: true, because the schedule depends on it" if changed else ""
    log.info(
        "nothing to do: the newest checkpoint is of step %d, and steps is %d. To go on, raise steps%s",
        first_step,
        recipe.steps,
        also,
    )
