"""One step of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flux2_ds.data.loader import MicroBatch
from flux2_ds.engine.engine import Engine
from flux2_ds.training.loss import FlowObjective


def update(
    engine: Engine,
    objective: FlowObjective,
    micro_batches: Sequence[MicroBatch],
    learning_rate: float,
) -> list[torch.Tensor]:
    """One step of the optimizer; returns the loss of each micro-batch, on the device."""
    losses = []
    for micro_batch in micro_batches:
        loss = objective.loss(engine.forward, micro_batch)
        engine.backward(loss)
        engine.step(learning_rate)
        losses.append(loss.detach())
    return losses
