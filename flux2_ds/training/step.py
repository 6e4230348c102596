"""One step of the optimizer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from flux2_ds.data.loader import MicroBatch
from flux2_ds.engine.engine import Engine
from flux2_ds.training.loss import FlowObjective, LossParts

_STREAM = 3  # keeps this random stream apart from those of data/order.py and data/loader.py


def train_step(
    engine: Engine,
    objective: FlowObjective,
    micro_batches: Sequence[MicroBatch],
    learning_rate: float,
    trace: StepTrace | None = None,
    parts: LossParts | None = None,
) -> list[torch.Tensor]:
    """Accumulate the gradients of all micro-batches and update; returns their losses, on the device, which
    `parts` takes in as well."""
    mark = trace.mark if trace else lambda part: None
    losses = []
    for micro_batch in micro_batches:
        mark("forward")
        found = objective.losses(engine.forward, micro_batch)
        mark("backward")
        engine.backward(found.mean)
        mark("update")
        engine.step(learning_rate)
        losses.append(found.mean.detach())
        if trace:
            trace.samples.append((found.each, found.t))
        if parts is not None:
            parts.add(found)
    mark("end")
    return losses


class StepTrace:
    """What one step leaves to be looked at: seconds of its parts, by the clock of the device that computes them,
    and the loss and timestep of its samples."""

    def __init__(self, device: torch.device) -> None:
        self.samples: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._on_card = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """`part` begins, and the one before it ends."""
        now: Any = torch.cuda.Event(enable_timing=True) if self._on_card else time.perf_counter()
        if self._on_card:
            now.record()
        self._marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Of all micro-batches together; waits for the step."""
        if self._on_card and self._marks:
            self._marks[-1][1].synchronize()
        total: dict[str, float] = {}
        for (part, start), (_, end) in pairwise(self._marks):
            spent = start.elapsed_time(end) / 1000 if self._on_card else end - start
            total[part] = total.get(part, 0.0) + spent
        return total


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make torch's global generator a function of (seed, step, rank).

    Only the adapter's dropout draws from it; a resumed run then drops what it would have dropped.
    """
    words = np.random.SeedSequence((_STREAM, seed, step, rank)).generate_state(1)
    torch.manual_seed(int(words[0]))
