"""What training has changed, by parameter name: weights, optimizer state, EMA; to and from checkpoints.

Whatever the ZeRO stage and the number of processes, a checkpoint holds the same named tensors, so that
any other stage and number can continue from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn

from flux2_ds.checkpoint.manager import Checkpoint
from flux2_ds.checkpoint.tensor_store import TensorShard, TensorStore
from flux2_ds.config.recipe import Optimizer
from flux2_ds.engine import optimizers
from flux2_ds.engine.zero_partitions import ZeroPartition, owned_partitions, shape_of
from flux2_ds.errors import UserError

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's dynamic loss scaler, which runs with fp16."""


class TrainingState:
    """The state of the `named` parameters under `optimizer`; `zero` is DeepSpeed's wrapper of it.

    `sharded`: checkpoints hold each process's part (for a full fine-tune) instead of whole tensors.
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
        self._fragments = owned_partitions(named, zero, stage, self._rank)
        self._ema: dict[str, torch.Tensor] = {}
        if settings.ema_decay is not None:
            self._ema = {part.name: part.weight.clone() for part in self._fragments}
        self._averaged: torch.Tensor | int = 0

    def updates(self) -> int:
        """Optimizer updates made; steps whose gradients were not finite are not among them."""
        counts = {int(state["step"]) for state in self._optimizer.state.values() if "step" in state}
        return max(counts, default=0)

    def tensor_shards(self) -> list[TensorShard] | Iterator[TensorShard]:
        """What this process writes into a checkpoint; collective.

        With `sharded` its own fragments, one after the other; else the first process's list of whole
        tensors, and nothing in the others.
        """
        if self._stage == 0:
            return self._whole_pieces() if self._rank == 0 else []
        if self.sharded:
            return self._parts()
        gathered = []
        for kind in self._kinds():
            for name in self._named:
                whole = self._gather(kind, name)
                if self._rank == 0:
                    gathered.append(TensorShard(kind, name, whole.cpu()))
        return gathered

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps in JSON: updates, and scalars of optimizer and loss scaler."""
        scaler = self._loss_scaler()
        return {
            "updates": self.updates(),
            "optimizer": optimizers.group_state(self._optimizer, self._settings.name),
            "loss_scaler": {name: getattr(scaler, name) for name in _SCALER} if scaler else {},
        }

    def load(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint: trained weights with their masters, optimizer and EMA.

        Raises:
            UserError: its parameters, or the optimizer's states, are not those of this run.
        """
        counters = saved.state()
        check_fit(saved, {name: shape_of(p) for name, p in self._named.items()}, self._kinds())
        elementwise = self._settings.name in optimizers.ELEMENTWISE
        if elementwise:
            self._create_state()
        self._load_weights(saved.stored("weights"))
        if elementwise:
            stored = {
                kind: saved.stored(kind) for kind in optimizers.ELEMENTWISE[self._settings.name]
            }
            optimizers.load_elements(
                self._optimizer,
                self._settings.name,
                self._fragments,
                lambda kind, name, start, stop: stored[kind].read(name, start, stop),
            )
            for state in self._optimizer.state.values():
                count = state["step"]
                updates = counters["updates"]
                state["step"] = count.fill_(updates) if torch.is_tensor(count) else updates
        else:
            kinds = [kind for kind in saved.kinds() if kind not in ("weights", "ema")]
            tensors = {kind: saved.tensors(kind) for kind in kinds}
            optimizers.load_whole_state(self._optimizer, self._named, tensors, counters["updates"])
        self._optimizer.param_groups[0].update(counters["optimizer"])
        if self._ema:
            averages = saved.stored("ema")
            for part in self._fragments:
                value = averages.read(part.name, part.start, part.start + part.count)
                self._ema[part.name].copy_(value)
            self._averaged = counters["updates"]
        scaler = self._loss_scaler()
        for name, value in counters["loss_scaler"].items() if scaler else ():
            setattr(scaler, name, value)

    def _loss_scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler; None without fp16."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def _kinds(self) -> list[str]:
        """Kinds of elementwise tensors in this run's checkpoints."""
        ema = ["ema"] if self._settings.ema_decay is not None else []
        return ["weights", *ema, *optimizers.ELEMENTWISE.get(self._settings.name, ())]

    def _elements(self, kind: str, partition_: ZeroPartition) -> torch.Tensor:
        if kind == "weights":
            return partition_.weight
        if kind == "ema":
            return self._ema[partition_.name]
        return optimizers.elements(self._optimizer.state[partition_.flat], kind, partition_)

    def _parts(self) -> Iterator[TensorShard]:
        for kind in self._kinds():
            for part in self._fragments:
                yield TensorShard(
                    kind, part.name, self._elements(kind, part), part.start, part.shape
                )

    def _whole_pieces(self) -> Iterator[TensorShard]:
        for kind in self._kinds():
            for part in self._fragments:
                yield TensorShard(kind, part.name, self._elements(kind, part).view(part.shape))
        if self._settings.name not in optimizers.ELEMENTWISE:
            for kind, name, tensor in sorted(
                optimizers.whole_state(self._optimizer, self._named), key=lambda item: item[0]
            ):
                yield TensorShard(kind, name, tensor)

    def _gather(self, kind: str, name: str) -> torch.Tensor:
        """A whole tensor from the fragments of all processes. Collective."""
        parameter = self._named[name]
        shape = shape_of(parameter)
        dtype = torch.uint8 if kind.startswith("state") else torch.float32
        whole = torch.zeros(math.prod(shape), dtype=dtype, device=parameter.device)
        for part in self._fragments:
            if part.name == name:
                whole[part.start : part.start + part.count] = self._elements(kind, part)
        distributed.all_reduce(whole)
        return whole.view(shape)

    def _load_weights(self, saved: TensorStore) -> None:
        own = {part.name: part for part in self._fragments}
        for name, parameter in self._named.items():
            part = own.get(name)
            if self._stage == 3:
                if part is not None:
                    part.weight.copy_(saved.read(name, part.start, part.start + part.count))
                    # The partition that the forward pass gathers; ZeRO-3 hangs it on the parameter.
                    getattr(parameter, "ds_tensor").data[: part.count].copy_(part.weight)  # noqa: B009
                continue
            whole = saved.whole(name)
            parameter.data.copy_(whole)
            if part is not None:
                part.weight.copy_(whole.flatten()[part.start : part.start + part.count])
        if self._stage == 3:
            # Drops what hpZ holds twice, and gathers what stays gathered between steps.
            self._zero.checkpoint_event_epilogue()

    def _create_state(self) -> None:
        """Let the optimizer allocate its state, by a step with zero gradients and learning rate 0."""
        (group,) = self._optimizer.param_groups
        # Stage 3 hands the optimizer its flat partitions one at a time, during the step only.
        held = group["params"]
        flat = self._zero.fp32_partitioned_groups_flat if self._stage == 3 else held
        gradients = [parameter.grad for parameter in flat]
        for parameter in flat:
            parameter.grad = torch.zeros_like(parameter)
        group["params"], group["lr"] = flat, 0.0
        self._optimizer.step()
        group["params"] = held
        for parameter, gradient in zip(flat, gradients, strict=True):
            parameter.grad = gradient

    @property
    def averages(self) -> bool:
        """Whether there is an EMA."""
        return self._settings.ema_decay is not None

    def average(self, updated: torch.Tensor | bool) -> None:
        """Move the EMA if the step has `updated` the weights; young ones move faster, so that the start
        is soon forgotten. A flag on the device stays there: reading it would wait."""
        decay = self._settings.ema_decay
        assert decay is not None
        self._averaged = self._averaged + torch.as_tensor(updated, dtype=torch.float64)
        young = (1 + self._averaged) / (10 + self._averaged)
        share = ((1 - young.clamp(max=decay)) * updated).float()
        for part in self._fragments:
            share = share.to(part.weight.device, non_blocking=True)
            self._ema[part.name].lerp_(part.weight, share)


def check_fit(saved: Checkpoint, shapes: dict[str, tuple[int, ...]], kinds: list[str]) -> None:
    """Refuse a checkpoint of other parameters or another optimizer.

    Raises:
        UserError: naming what differs.
    """
    found = saved.stored("weights").shapes
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
        saved.stored(kind)
