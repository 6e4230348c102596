"""Steps whose gradients are NaN or infinite: never an update, always a record of what was in them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flux2_ds.data.loader import MicroBatch
from flux2_ds.data.order import Sample
from flux2_ds.errors import UserError
from flux2_ds.run.atomic import atomic_write_text

log = logging.getLogger("flux2_ds")

IN_A_ROW = 10
"""Skipped steps after which a run stops: by then it is not a sample but the weights."""


@dataclass
class NonFinite:
    """Stops at such steps, or counts them; writes their samples and statistics to `folder`.

    `describe` names the origin of a sample. `scaled`: with fp16 the loss scaler makes such steps on
    purpose, as long as the loss is finite.
    """

    folder: Path
    policy: Literal["stop", "skip"]
    scaled: bool
    describe: Callable[[Sample], dict[str, Any]]
    rank: int
    skipped: int = 0
    in_a_row: int = 0

    def check(
        self, norm: float, step: int, batches: list[MicroBatch], losses: list[torch.Tensor]
    ) -> bool:
        """Whether the step made its update; `norm` is global, so all ranks agree.
        Refuses to go on where the recipe says so.
        """
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        if self.scaled and all(math.isfinite(loss) for loss in losses):
            return False
        self.in_a_row += 1
        try:
            path = self.write(norm, step, batches, losses)
            where = f"{path} has this rank's samples and their statistics."
        except (OSError, UserError) as error:  # a full disk; a store that is away
            where = f"What was in it could not be written: {error}."
        what = f"the gradient norm is {norm} at step {step}, and no update was made. {where} "
        if self.policy == "stop":
            raise UserError(
                f"{what}Look for a broken sample there, lower "
                "optimizer.learning_rate, or set optimizer.nonfinite: skip to go on without it."
            )
        if self.in_a_row == IN_A_ROW:
            raise UserError(
                f"{what}It is the {IN_A_ROW}th such step in a row. Lower optimizer.learning_rate and "
                "start again."
            )
        log.warning("%sSkipped; %d so far", what, self.skipped)
        return False

    def write(
        self, norm: float, step: int, batches: list[MicroBatch], losses: list[torch.Tensor]
    ) -> Path:
        """Write down what this rank had in the step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}-rank_{self.rank}.json"
        batch_facts = [
            {
                "loss": str(float(loss)),
                "bucket": str(batch.bucket),
                "samples": [self.describe(sample) for sample in batch.samples],
                "deviates": batch.deviates.tolist(),
                **{
                    name: [statistics(row) for row in getattr(batch, name)]
                    for name in ("latents", "text", "noise")
                },
            }
            for batch, loss in zip(batches, losses, strict=True)
        ]
        facts = {"step": step, "gradient_norm": str(norm), "micro_batches": batch_facts}
        atomic_write_text(path, json.dumps(facts, indent=1) + "\n")
        return path


def statistics(tensor: torch.Tensor) -> dict[str, float]:
    """Of the finite elements of a tensor, and how many are not."""
    finite = tensor[tensor.isfinite()].float()
    broken = tensor.numel() - finite.numel()
    if finite.numel() == 0:
        return {"not_finite": broken}
    return {
        "not_finite": broken,
        "mean": finite.mean().item(),
        "std": finite.std(correction=0).item(),
        "min": finite.min().item(),
        "max": finite.max().item(),
    }
