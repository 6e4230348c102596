"""Validation: the loss on held-out samples, always the same ones with the same noise and timesteps.

Nothing of it reaches the training: no gradient, no dropout, no random number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from flux2_ds.data.loader import Loader
from flux2_ds.data.order import ValidationOrder
from flux2_ds.distributed import all_reduce_sum, broadcast_from_rank0
from flux2_ds.engine.engine import Engine
from flux2_ds.run.logging import progress_bar
from flux2_ds.run.metrics import Values
from flux2_ds.run.run_dir import stale
from flux2_ds.training.loss import FlowObjective, Forward

BANDS = ("t0-25", "t25-50", "t50-75", "t75-100")
"""Quarters of the timesteps, in percent: from the last details to the first outlines."""
LOSS = "validation/loss"


def band_of(t: torch.Tensor) -> torch.Tensor:
    """The number of the band of each timestep."""
    return (t * len(BANDS)).long().clamp(max=len(BANDS) - 1)


class ValidationLoss:
    """The mean loss over the samples of `order`, which `loader` reads.

    `sources`: of each shard in the index. `against_base`: also without the adapter. `patience`: evaluations without
    a lower loss after which the run ends. `history`: the step and loss of the evaluations before, oldest
    first. `heartbeat` is called with (step, phase) at each forward pass.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        objective: FlowObjective,
        order: ValidationOrder,
        sources: Sequence[str],
        *,
        against_base: bool = False,
        patience: int | None = None,
        history: Sequence[tuple[int, float]] = (),
        heartbeat: Callable[[int, str], None],
    ) -> None:
        self._engine, self._loader, self._objective = engine, loader, objective
        self._order, self._sources, self._heartbeat = order, sources, heartbeat
        names = sorted(set(sources))
        self._groups = ["", *BANDS, *(names if len(names) > 1 else [])]
        self._against_base, self._base = against_base, dict[str, float]()
        self._patience, self.history = patience, list(history)

    def losses(self, step: int) -> Values:
        """The loss after `step` steps, each sample counted once, and that of each band of t and source that
        has samples. Against the base also the base's loss and the gain in each of them: how much lower the
        loss is than without the adapter, on the same noise. Collective."""
        found = self._means(step, self._engine.forward)
        self.history.append((step, found[""]))
        values: Values = {f"{LOSS}_{g}" if g else LOSS: loss for g, loss in found.items()}
        if self._against_base:
            # It stays the same for as long as this process runs.
            self._base = self._base or self._means(step, self._engine.forward_base)
            values["validation/base_loss"] = self._base[""]
            for group, base in self._base.items():
                values[f"validation/gain_{group}".rstrip("_")] = base - found[group]
        return values

    def stale(self) -> bool:
        """Whether the loss has not fallen for so long that the run ends. Collective."""
        if self._patience is None:
            return False
        # Rank 0 decides: a last bit that differs must not part the ranks.
        decided = int(stale(self.history, self._patience))
        return bool(broadcast_from_rank0(decided, self._objective.device))

    def _means(self, step: int, forward: Forward) -> dict[str, float]:
        """The mean loss of each group that has samples; "" is of all. Collective."""
        totals = all_reduce_sum(self.sums(step, forward)).tolist()
        return {
            group: total / count
            for group, (total, count) in zip(self._groups, totals, strict=True)
            if count
        }

    @torch.no_grad()
    def sums(self, step: int, forward: Forward) -> torch.Tensor:
        """The sum of this rank's losses in each group and their number, [groups, 2] in fp64, in which it does
        not matter which rank has which samples."""
        self._heartbeat(step, "validating")
        device, named = self._objective.device, self._groups[1 + len(BANDS) :]
        sums = torch.zeros(len(self._groups), 2, dtype=torch.float64, device=device)
        with self._engine.evaluating():
            steps = self._loader.steps(0, len(self._order))
            total = len(self._order)
            for micro_batches in progress_bar("validation", total, "batch", iterable=steps):
                self._heartbeat(step, "validating")
                for batch in micro_batches:
                    # Also with none that counts: at ZeRO-3 all ranks make the same passes.
                    _, each, t, _ = self._objective.losses(forward, batch)
                    count = sum(s.position < self._order.count for s in batch.samples)
                    bands = band_of(t[:count])
                    sources = [self._sources[s.shard] for s in batch.samples[:count]]
                    member = torch.zeros(len(self._groups), count, dtype=torch.float64)
                    member[0] = 1
                    for row, group in enumerate(named, start=1 + len(BANDS)):
                        member[row] = torch.tensor([source == group for source in sources])
                    member = member.to(device)
                    member[1 + bands, torch.arange(count, device=device)] = 1
                    sums[:, 0] += member @ each[:count].double()
                    sums[:, 1] += member.sum(1)
        return sums
