"""Validation: the loss on held-out samples, always the same ones with the same noise and timesteps.

Nothing of it reaches the training: no gradient, no dropout, no random number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flux2_ds.data.loader import Loader
from flux2_ds.data.order import ValidationOrder
from flux2_ds.distributed import all_reduce_sum
from flux2_ds.engine.engine import Engine
from flux2_ds.training.loss import FlowObjective


class ValidationLoss:
    """The mean loss over the samples of `order`, which `loader` reads.

    `heartbeat` is called with (step, phase) at each forward pass.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        objective: FlowObjective,
        order: ValidationOrder,
        heartbeat: Callable[[int, str], None],
    ) -> None:
        self._engine, self._loader, self._objective = engine, loader, objective
        self._order, self._heartbeat = order, heartbeat

    @torch.no_grad()
    def loss(self, step: int) -> float:
        """The loss after `step` steps, each sample counted once. Collective."""
        self._heartbeat(step, "validating")
        # In fp64 the sum does not depend on which rank has which samples.
        summed = torch.zeros((), dtype=torch.float64, device=self._objective.device)
        with self._engine.evaluating():
            for micro_batches in self._loader.steps(0, len(self._order)):
                self._heartbeat(step, "validating")
                for batch in micro_batches:
                    counted = sum(s.position < self._order.count for s in batch.samples)
                    # Also with none that counts: at ZeRO-3 all ranks make the same passes.
                    loss = self._objective.loss(self._engine.forward, batch, counted)
                    if counted:
                        summed += counted * loss.double()
        return float(all_reduce_sum(summed)) / self._order.count
