"""Evaluation: the loss on held-out samples, always the same ones with the same noise and timesteps.

Nothing of it reaches the training: no gradient, no dropout, no random number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flux2_ds.data.loader import Loader
from flux2_ds.engine import Engine, average
from flux2_ds.objective import FlowObjective


class Evaluation:
    """The mean loss over the first `batches` global batches of `loader`, wanted every `every` steps."""

    def __init__(
        self, engine: Engine, loader: Loader, objective: FlowObjective, batches: int, every: int
    ) -> None:
        self._engine, self._loader, self._objective = engine, loader, objective
        self._batches = batches
        self.every = every

    @torch.no_grad()
    def loss(self, moving: Callable[[], None] = lambda: None) -> float:
        """The loss now, averaged over all processes; `moving` is called at each batch. Collective."""
        losses = []
        moving()
        with self._engine.evaluating():
            for micro_batches in self._loader.steps(0, self._batches):
                moving()
                losses += [
                    self._objective.loss(self._engine.forward, batch) for batch in micro_batches
                ]
        return float(average(torch.stack(losses).mean()))
