"""AdamW over flat tensors: on a card in one pass over memory, or passing through the card from host memory."""

from __future__ import annotations

from typing import Any

import torch

from flux2_ds.engine.host_memory import pin_in_place

_AT_ONCE = 1 << 28  # elements, whose places fit into 32 bits
_PASSING = 1 << 24  # elements of a piece from host memory
_SLOTS = 3  # such pieces on the card: one comes, one is updated, one goes


def adamw_state(master: torch.Tensor) -> dict[str, torch.Tensor]:
    """State of torch's AdamW before the first update, pinned if the master is."""
    moments = [torch.zeros_like(master, requires_grad=False) for _ in range(2)]
    for moment in moments if master.is_pinned() else ():
        pin_in_place(moment)
    step = torch.zeros((), device=master.device)
    return {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}


def adamw(
    scalars: torch.Tensor, master: torch.Tensor, mean: torch.Tensor, square: torch.Tensor,
    gradient: torch.Tensor, weights: torch.Tensor,
) -> None:  # fmt: skip
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), Algorithm 2, in place; all [n] but `scalars`, see `update`."""
    factor, decay, rate, correction, eps, beta1, rest1, beta2, rest2 = scalars.unbind()
    withheld = factor.isnan()
    gradient = gradient.float() * factor
    mean.copy_(torch.where(withheld, mean, mean * beta1 + gradient * rest1))
    square.copy_(torch.where(withheld, square, square * beta2 + gradient * gradient * rest2))
    # One rounding: 1 - decay would be off by a fifth in fp32 where decay is 1e-7.
    change = master * decay + rate * mean / (square.sqrt() * correction + eps)
    master.copy_(torch.where(withheld, master, master - change))
    weights.copy_(master)


compiled_adamw = torch.compile(adamw, dynamic=True)


def update(
    optimizer: torch.optim.AdamW, group: int, gradient: torch.Tensor, factor: torch.Tensor, weights: torch.Tensor,
    *, compiled: bool, passing: bool,
) -> None:  # fmt: skip
    """torch's AdamW for the one flat master [n] of a group: from the `gradient`, in its own dtype, times `factor` [],
    fp64, to the `weights` that the model reads. Nothing changes if `factor` is NaN. It may not be computed yet: the
    host does not wait for the device. `passing`: master and moments, and perhaps the gradient, are in host memory."""
    settings = optimizer.param_groups[group]
    [master] = settings["params"]
    state = optimizer.state[master]
    if not state:
        state.update(adamw_state(master))
    count = state["step"] = state["step"].to(factor.device) + ~factor.isnan()
    given = [settings["lr"], settings["weight_decay"], settings["eps"], *settings["betas"]]
    pinned = torch.tensor(given, dtype=torch.float64, pin_memory=factor.is_cuda)
    rate, decay, eps, beta1, beta2 = pinned.to(factor.device, non_blocking=True)
    debiased = rate / (1 - beta1**count), (1 - beta2**count).rsqrt()
    numbers = (factor, rate * decay, *debiased, eps, beta1, 1 - beta1, beta2, 1 - beta2)
    scalars = torch.stack(numbers).float()
    flat = [master.detach(), state["exp_avg"], state["exp_avg_sq"], gradient, weights]
    step = compiled_adamw if compiled else adamw
    if passing:
        _pass_through(step, scalars, flat)
        return
    for parts in zip(*(tensor.split(_AT_ONCE) for tensor in flat), strict=True):
        step(scalars, *parts)


def _pass_through(step: Any, scalars: torch.Tensor, flat: list[torch.Tensor]) -> None:
    """Piece by piece: in, update, and back at the same time."""
    device = scalars.device
    on = torch.get_device_module(device)
    main, bringing, returning = on.current_stream(), on.Stream(), on.Stream()
    for stream in (bringing, returning):
        stream.wait_stream(main)
    hosted = len(flat) - 1 if flat[3].device != device else 3
    room = torch.empty(_SLOTS, hosted, min(_PASSING, flat[0].numel()), device=device)
    returned: list[Any] = []
    for number, parts in enumerate(zip(*(t.split(room.shape[2]) for t in flat), strict=True)):
        pieces = [*room[number % _SLOTS, :, : parts[0].numel()]]
        with on.stream(bringing):
            if number >= _SLOTS:
                bringing.wait_event(returned[number - _SLOTS])
            for piece, part in zip(pieces, parts[:hosted], strict=True):
                piece.copy_(part, non_blocking=True)
        main.wait_stream(bringing)
        step(scalars, *pieces, *parts[hosted:])
        returning.wait_stream(main)
        with on.stream(returning):
            for piece, part in zip(pieces[:3], parts[:3], strict=True):
                part.copy_(piece, non_blocking=True)
            returned.append(returning.record_event())
    on.synchronize()  # the host may read them from here on
