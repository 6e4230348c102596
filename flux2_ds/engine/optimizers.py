"""Optimizers by name, and their state by parameter name.

AdamW and its 8-bit forms keep one value an element, so their state is partitioned like the weights.
Adafactor, Prodigy and Muon look at full matrices, or at all parameters at once, and run without ZeRO.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from flux2_ds.config.recipe import Optimizer
from flux2_ds.engine.zero_partitions import ZeroPartition, full_shape

_ADAM = ("exp_avg", "exp_avg_sq")
_EIGHT_BIT = ("state1", "absmax1", "state2", "absmax2")
ELEMENTWISE = {"adamw": _ADAM, "adamw8bit": _EIGHT_BIT, "adamw8bit_paged": _EIGHT_BIT}
"""Optimizer -> its kinds of state with one value an element. Checkpoints hold `absmax` for each element,
which does not depend on where ZeRO puts the blocks' boundaries."""
_GROUP_STATE = {"prodigy": ("d", "d_max", "d_numerator", "k")}
_BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit optimizers."""

Read = Callable[[str, str, int, int], torch.Tensor]
"""(kind, parameter name, start, stop) -> saved elements [start, stop), flat."""


def compatible(before: str, now: str) -> bool:
    """Whether the optimizer `now` can continue from the state that `before` left."""
    return before == now or (before in ELEMENTWISE and ELEMENTWISE[before] == ELEMENTWISE.get(now))


def groups(
    parameters: list[nn.Parameter], weight_decay: float, at_most: float = math.inf
) -> list[dict[str, Any]]:
    """Matrices, and what has one dimension: magnitudes and norm scales, which weight decay would draw to zero. One
    group where nothing is to be told apart; of not much more than `at_most` elements."""
    vectors = [p for p in parameters if weight_decay and len(full_shape(p)) < 2]
    one_dimensional = set(map(id, vectors))
    matrices = [p for p in parameters if id(p) not in one_dimensional]
    found: list[dict[str, Any]] = []
    for kind, settings in (matrices, {}), (vectors, {"weight_decay": 0.0}):
        room = 0.0
        for parameter in kind:
            if room <= 0:
                found.append({"params": [], **settings})
                room = at_most
            found[-1]["params"].append(parameter)
            room -= parameter.numel()
    return found


def build(
    settings: Optimizer,
    trained: list[nn.Parameter],
    *,
    fused: bool,
    group_elements: float = math.inf,
) -> Any:
    """The optimizer that `settings.name` names; `fused`: AdamW in one CUDA kernel; `group_elements`: see `groups`."""
    parameters = groups(trained, settings.weight_decay, group_elements)
    decay = settings.weight_decay
    adam: dict[str, Any] = {"betas": settings.betas, "eps": settings.eps, "weight_decay": decay}
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, fused=fused, **adam)
    if settings.name == "adafactor":
        return torch.optim.Adafactor(parameters, weight_decay=decay)
    if settings.name == "muon":
        # Updates as large as AdamW's, so that its learning rates hold (Liu et al. 2025, arXiv:2502.16982).
        return Muon(parameters, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    # Imported where they are used: bitsandbytes takes seconds.
    if settings.name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, safeguard_warmup=settings.warmup_steps > 0, **adam)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = PagedAdamW8bit if settings.name == "adamw8bit_paged" else AdamW8bit
    # Small tensors, too: ZeRO has joined them into large ones.
    return kind(parameters, min_8bit_size=0, **adam)


class Muon(torch.optim.Muon):
    """torch's, with the count of updates that the other optimizers keep."""

    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
        return loss


def elements(state: dict[str, Any], kind: str, partition: ZeroPartition) -> torch.Tensor:
    """A partition's values [count] of one kind of elementwise state."""
    if kind.startswith("absmax"):
        places = torch.arange(partition.offset, partition.offset + partition.count)
        value: torch.Tensor = state[kind][(places // _BLOCK).to(state[kind].device)]
        return value
    return partition.of(state[kind])


def load_elements(optimizer: Any, name: str, partitions: list[ZeroPartition], read: Read) -> None:
    """Set the elementwise state of the flat tensors that `partitions` lie in."""
    by_flat: dict[int, list[ZeroPartition]] = {}
    for partition in partitions:
        by_flat.setdefault(id(partition.flat), []).append(partition)
    for own in by_flat.values():
        flat = own[0].flat
        state = optimizer.state[flat]
        blocks = name != "adamw"
        saved = {}
        for kind in ELEMENTWISE[name]:
            dtype = torch.uint8 if kind.startswith("state") else torch.float32
            saved[kind] = torch.zeros(flat.numel(), dtype=dtype) if blocks else state[kind]
            for part in own:
                value = read(kind, part.name, part.start, part.start + part.count)
                part.of(saved[kind]).copy_(value)
        for number in ("1", "2") if blocks else ():
            qmap = state[f"qmap{number}"].cpu()
            codes, scales = join_blocks(saved[f"state{number}"], saved[f"absmax{number}"], qmap)
            state[f"state{number}"].view(-1).copy_(codes)
            state[f"absmax{number}"].copy_(scales)


def join_blocks(
    codes: torch.Tensor, scales: torch.Tensor, qmap: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit state of one flat tensor from values that may have been quantized in other blocks.

    `codes` [n] uint8 and `scales` [n] fp32: element i is qmap[codes[i]] · scales[i]. Returns codes [n]
    and one scale for each block of 256. A block whose elements share a scale keeps its codes, so that
    nothing changes where the blocks are the same; the others are quantized anew.
    """
    from bitsandbytes.functional import quantize_blockwise

    codes = torch.where(scales == 0, qmap.abs().argmin().to(codes.dtype), codes)
    padded = functional.pad(scales, (0, -codes.numel() % _BLOCK)).view(-1, _BLOCK)
    highest = padded.amax(1)
    lowest = padded.masked_fill(padded == 0, torch.inf).amin(1)
    anew, state = quantize_blockwise(qmap[codes.int()] * scales, qmap, blocksize=_BLOCK)
    shared = lowest >= highest  # elements of scale 0 are 0 under any scale
    kept = shared.repeat_interleave(_BLOCK)[: codes.numel()]
    return torch.where(kept, codes, anew), torch.where(shared, highest, state.absmax)


def full_state(
    optimizer: Any, named: dict[str, nn.Parameter]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, parameter name, tensor) of an optimizer that runs without ZeRO."""
    for name, parameter in named.items():
        for kind, value in optimizer.state[parameter].items():
            if torch.is_tensor(value) and kind != "step":
                yield kind, name, value


def load_full_state(
    optimizer: Any,
    named: dict[str, nn.Parameter],
    saved: dict[str, dict[str, torch.Tensor]],
    updates: int,
) -> None:
    """Set the state of an optimizer without ZeRO; `saved[kind][parameter name]`."""
    step = torch.tensor(float(updates)) if isinstance(optimizer, torch.optim.Adafactor) else updates
    for name, parameter in named.items():
        optimizer.state[parameter] = {"step": step.clone() if torch.is_tensor(step) else step} | {
            kind: tensors[name].to(parameter.device)
            for kind, tensors in saved.items()
            if name in tensors
        }


def group_state(optimizer: Any, name: str) -> dict[str, float]:
    """What an optimizer keeps for all parameters at once, such as Prodigy's step size."""
    group = optimizer.param_groups[0]  # the same in all
    return {key: float(group[key]) for key in _GROUP_STATE.get(name, ())}
