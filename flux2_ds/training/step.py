"""One step of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flux2_ds.data.loader import MicroBatch
from flux2_ds.engine.engine import Engine
from flux2_ds.training.loss import FlowObjective

_STREAM = 3  # keeps this random stream apart from those of data/order.py and data/loader.py


def train_step(
    engine: Engine,
    objective: FlowObjective,
    micro_batches: Sequence[MicroBatch],
    learning_rate: float,
) -> list[torch.Tensor]:
    """Accumulate the gradients of all micro-batches and update; returns their losses, on the device."""
    losses = []
    for micro_batch in micro_batches:
        loss = objective.loss(engine.forward, micro_batch)
        engine.backward(loss)
        engine.step(learning_rate)
        losses.append(loss.detach())
    return losses


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make torch's global generator a function of (seed, step, rank).

    Only the adapter's dropout draws from it; a resumed run then drops what it would have dropped.
    """
    words = np.random.SeedSequence((_STREAM, seed, step, rank)).generate_state(1)
    torch.manual_seed(int(words[0]))
