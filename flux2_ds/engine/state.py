"""What training has changed, by parameter name: weights, optimizer state, EMA; to and from checkpoints.

Whatever the ZeRO stage and the world size, a checkpoint holds the same named tensors, so that a run
can continue from it at any other stage and world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import distributed, nn

from flux2_ds.checkpoint.manager import Checkpoint
from flux2_ds.checkpoint.tensor_store import TensorShard, TensorStore
from flux2_ds.config.recipe import Optimizer
from flux2_ds.engine import optimizers
from flux2_ds.engine.flat_adamw import adamw_state
from flux2_ds.engine.zero_partitions import ZeroPartition, full_shape, owned_partitions
from flux2_ds.errors import UserError

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's dynamic loss scaler, which runs with fp16."""


class TrainingState:
    """The state of the `named` parameters under `optimizer`; `zero` is DeepSpeed's wrapper of it.

    `sharded`: checkpoints hold each rank's partitions (for a full fine-tune) instead of full tensors.
    """

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        optimizer: Any,
        zero: Any,
        stage: int,
        settings: Optimizer,
        sharded: bool,
    ) -> None:
        self._named, self._optimizer, self._zero = named, optimizer, zero
        self._stage, self._settings, self.sharded = stage, settings, sharded
        self._rank = distributed.get_rank()
        self._partitions = owned_partitions(named, zero, stage, self._rank)
        self.has_ema = settings.ema_decay is not None
        self._ema: dict[str, torch.Tensor] = {}
        self._ema_updates: torch.Tensor | int = 0
        if self.has_ema:
            self._ema = {part.name: part.weight.clone() for part in self._partitions}

    def updates(self) -> int:
        """Optimizer updates made; steps whose gradients were not finite are not among them."""
        counts = {int(state["step"]) for state in self._optimizer.state.values() if "step" in state}
        return max(counts, default=0)

    def update_ema(self, updated: torch.Tensor | bool) -> None:
        """Move the EMA if the step has `updated` the weights: ema += (1 − d) · (weight − ema).

        d = min(ema_decay, (1 + n) / (10 + n)) after n updates, so that the start is soon forgotten.
        A flag on the device stays there: reading it would wait.
        """
        decay = self._settings.ema_decay
        assert decay is not None
        self._ema_updates = self._ema_updates + torch.as_tensor(updated, dtype=torch.float64)
        young = (1 + self._ema_updates) / (10 + self._ema_updates)
        share = ((1 - young.clamp(max=decay)) * updated).float()
        for part in self._partitions:
            share = share.to(part.weight.device, non_blocking=True)
            self._ema[part.name].lerp_(part.weight, share)

    def tensor_shards(self) -> Iterable[TensorShard]:
        """What this rank writes into a checkpoint. Collective.

        With `sharded` its own partitions, one after the other; else rank 0's full tensors, and nothing
        in the others.
        """
        if self._stage == 0:
            return self._own_shards() if self._rank == 0 else []
        if self.sharded:
            return self._own_shards()
        gathered = []
        for kind in self._kinds():
            for name in self._named:
                tensor = self._gather(kind, name)
                if self._rank == 0:
                    gathered.append(TensorShard(kind, name, tensor.cpu()))
        return gathered

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps in JSON: counts, and scalars of optimizer and loss scaler."""
        scaler = self._loss_scaler()
        return {
            "updates": self.updates(),
            "ema_updates": int(self._ema_updates),
            "optimizer": optimizers.group_state(self._optimizer, self._settings.name),
            "loss_scaler": {name: getattr(scaler, name) for name in _SCALER} if scaler else {},
        }

    def load(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint: trained weights with their masters, optimizer and EMA.

        Refuses other parameters and another optimizer's state.
        """
        counters, shapes = saved.state(), {n: full_shape(p) for n, p in self._named.items()}
        check_fit(saved, shapes, self._optimizer_kinds(counters["updates"]))
        if counters["updates"]:
            self._load_optimizer(saved, counters["updates"])
        self._load_weights(saved.store("weights"))
        for group in self._optimizer.param_groups:
            group.update(counters["optimizer"])
        if self.has_ema:
            # Without one in the checkpoint it was switched on now, and starts from the weights.
            resumed = "ema" in saved.kinds()
            averages = saved.store("ema" if resumed else "weights")
            for part in self._partitions:
                value = averages.read(part.name, part.start, part.start + part.count)
                self._ema[part.name].copy_(value)
            self._ema_updates = counters["ema_updates"] if resumed else 0
        scaler = self._loss_scaler()
        for name, value in counters["loss_scaler"].items() if scaler else ():
            setattr(scaler, name, value)

    def _loss_scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler; None without fp16."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def _optimizer_kinds(self, updates: int) -> list[str]:
        """Kinds of elementwise optimizer state, which there is from the first update on."""
        return list(optimizers.ELEMENTWISE.get(self._settings.name, ())) if updates else []

    def _kinds(self) -> list[str]:
        """Kinds of elementwise tensors in this run's checkpoints."""
        ema = ["ema"] if self.has_ema else []
        return ["weights", *ema, *self._optimizer_kinds(self.updates())]

    def _elements(self, kind: str, partition: ZeroPartition) -> torch.Tensor:
        if kind == "weights":
            return partition.weight
        if kind == "ema":
            return self._ema[partition.name]
        return optimizers.elements(self._optimizer.state[partition.flat], kind, partition)

    def _own_shards(self) -> Iterator[TensorShard]:
        """This rank's partitions; at stage 0 the full tensors."""
        for kind in self._kinds():
            for part in self._partitions:
                values = self._elements(kind, part)
                if self._stage == 0:
                    yield TensorShard(kind, part.name, values.view(part.shape))
                else:
                    yield TensorShard(kind, part.name, values, part.start, part.shape)
        if self._settings.name not in optimizers.ELEMENTWISE:
            state = optimizers.full_state(self._optimizer, self._named)
            for kind, name, tensor in sorted(state, key=lambda item: item[0]):
                yield TensorShard(kind, name, tensor)

    def _gather(self, kind: str, name: str) -> torch.Tensor:
        """A full tensor from the partitions of all ranks. Collective."""
        parameter = self._named[name]
        shape = full_shape(parameter)
        dtype = torch.uint8 if kind.startswith("state") else torch.float32
        tensor = torch.zeros(math.prod(shape), dtype=dtype, device=parameter.device)
        for part in self._partitions:
            if part.name == name:
                tensor[part.start : part.start + part.count] = self._elements(kind, part)
        distributed.all_reduce(tensor)
        return tensor.view(shape)

    def _load_weights(self, saved: TensorStore) -> None:
        own = {part.name: part for part in self._partitions}
        for name, parameter in self._named.items():
            part = own.get(name)
            if self._stage == 3:
                if part is not None:
                    part.weight.copy_(saved.read(name, part.start, part.start + part.count))
                    # The partition that the forward pass gathers; ZeRO-3 hangs it on the parameter.
                    getattr(parameter, "ds_tensor").data[: part.count].copy_(part.weight)  # noqa: B009
                continue
            tensor = saved.tensor(name)
            parameter.data.copy_(tensor)
            if part is not None:
                part.weight.copy_(tensor.flatten()[part.start : part.start + part.count])
        if self._stage == 3:
            # Drops hpZ's second copies, and gathers what stays gathered between steps.
            self._zero.checkpoint_event_epilogue()

    def _load_optimizer(self, saved: Checkpoint, updates: int) -> None:
        name = self._settings.name
        if name not in optimizers.ELEMENTWISE:
            kinds = [kind for kind in saved.kinds() if kind not in ("weights", "ema")]
            tensors = {kind: saved.tensors(kind) for kind in kinds}
            optimizers.load_full_state(self._optimizer, self._named, tensors, updates)
            return
        self._create_state()
        stores = {kind: saved.store(kind) for kind in optimizers.ELEMENTWISE[name]}
        optimizers.load_elements(
            self._optimizer,
            name,
            self._partitions,
            lambda kind, parameter, start, stop: stores[kind].read(parameter, start, stop),
        )
        for state in self._optimizer.state.values():
            count = state["step"]
            state["step"] = count.fill_(updates) if torch.is_tensor(count) else updates

    def _create_state(self) -> None:
        """Let the optimizer allocate its state; others than AdamW by a step with zero gradients and learning rate 0."""
        groups = self._optimizer.param_groups
        held = [group["params"] for group in groups]
        if self._stage == 3:
            # DeepSpeed hands the optimizer its flat partitions one at a time, during the step only.
            groups[0]["params"] = self._zero.fp32_partitioned_groups_flat
        flat = [parameter for group in groups for parameter in group["params"]]
        if isinstance(self._optimizer, torch.optim.AdamW):
            self._optimizer.state.update({master: adamw_state(master) for master in flat})
        else:
            gradients = [parameter.grad for parameter in flat]
            for parameter in flat:
                parameter.grad = torch.zeros_like(parameter)
            for group in groups:
                group["lr"] = 0.0
            self._optimizer.step()
            for parameter, gradient in zip(flat, gradients, strict=True):
                parameter.grad = gradient
        for group, parameters in zip(groups, held, strict=True):
            group["params"] = parameters


def check_fit(saved: Checkpoint, shapes: dict[str, tuple[int, ...]], kinds: list[str]) -> None:
    """Refuse a checkpoint of other parameters or another optimizer, naming what differs."""
    found = saved.store("weights").shapes
    if shapes != found:
        differing = sorted(n for n in {*shapes, *found} if shapes.get(n) != found.get(n))
        first = differing[0]
        raise UserError(
            f"the checkpoint does not fit what is trained now: {len(differing)} parameters "
            f"differ, the first is {first} ({found.get(first, 'absent')} in the checkpoint, "
            f"{shapes.get(first, 'not trained')} now). method, lora.rank and lora.targets "
            "cannot change within a run; give a new run_dir."
        )
    for kind in kinds:
        saved.store(kind)
