"""An update at ZeRO stages 1 and 2 that reads and writes memory as seldom as it can.

DeepSpeed 0.19.8 divides each gradient by the number of processes, sums the first micro-batch's gradients onto zeros in
fp32, looks for values that are not finite in each tensor, takes the norm in fp64, which shows them, too, multiplies by
what clips, even if that is 1, and waits for the device three times. With `reduce_scatter`, which the shipped configs
switch off, it copies each bucket before the all-reduce (it has no reduce-scatter) and back. For a full fine-tune of
klein 4B on one H200 the update below takes a third off the step (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import distributed

_AT_ONCE = 1 << 28  # elements, whose places fit into 32 bits


def lighten(zero: Any, micro_batches: int, *, fused: bool) -> int:
    """Let DeepSpeed's optimizer take the ways below instead, if it is the one of stages 1 and 2 and on the device.

    `micro_batches`: of a step. `fused`: by `_adamw`, for which the gradients of one micro-batch stay in their dtype.
    Returns what the loss is to be divided by, for gradients that are summed over the processes.
    """
    if not isinstance(zero, DeepSpeedZeroOptimizer) or zero.cpu_offload:
        return 1
    if fused and micro_batches == 1 and zero.communication_data_type == zero.dtype:
        zero.gradient_accumulation_dtype = zero.dtype
    zero._use_compact_grad_partition_buffer = lambda group: True  # one flat tensor of gradients
    zero._add_to_grad_partition_buffer = partial(_add, zero)
    zero.gradient_average = False
    zero.step = partial(_step, zero, fused)
    return distributed.get_world_size(zero.dp_process_group)


def _add(zero: Any, total: torch.Tensor | None, gradient: torch.Tensor) -> None:
    if total is None:
        return
    if zero.micro_step_id == 0:  # onto zeros
        total.copy_(gradient)
    else:
        total.add_(gradient)


def _step(zero: Any, fused: bool) -> None:
    """Clip and update, unless the norm says that a gradient is not finite. It is the one wait."""
    zero.micro_step_id = INITIAL_MICRO_STEP_ID
    gradients = [zero.averaged_gradients[i] for i in range(len(zero.bit16_groups))]
    zero.averaged_gradients.clear()
    tensors = [gradient for group in gradients for gradient in group]
    squares = torch.stack(torch._foreach_norm(tensors, 2, torch.float32)).double().square().sum()
    distributed.all_reduce(squares, group=zero.dp_process_group)
    scale, scaled_norm = zero.loss_scale, math.sqrt(squares.item())
    zero._global_grad_norm = scaled_norm / scale
    zero.overflow = not math.isfinite(scaled_norm)
    zero._update_scale(zero.overflow)
    if zero.overflow:
        return
    if zero.clip_grad > 0:
        scale *= max(1.0, (zero._global_grad_norm + 1e-6) / zero.clip_grad)
    for i, master in enumerate(zero.single_partition_of_fp32_groups):
        rank = distributed.get_rank(zero.real_dp_process_group[i])
        weights = zero.parallel_partitioned_bit16_groups[i][rank]
        gradient, gradients[i] = gradients[i].flat_partition, None
        if fused:
            _adamw(zero.optimizer, i, gradient, 1 / scale, weights)
            continue
        master.grad = gradient.to(master.dtype)
        if scale != 1:
            master.grad.mul_(1 / scale)
        zero._optimizer_step(i)
        master.grad = None
        weights.data.copy_(master)
    all_gather_dp_groups(
        zero.bit16_groups_flat, zero.parallel_partitioned_bit16_groups, zero.real_dp_process_group,
        zero.nccl_start_alignment_factor, zero.allgather_bucket_size,
    )  # fmt: skip


def _adamw(
    optimizer: Any, group: int, gradient: torch.Tensor, factor: float, weights: torch.Tensor
) -> None:
    """torch's AdamW for the one flat master of a group, in one compiled pass over memory: from the gradient, in its
    own dtype, times `factor`, to the weights that the model reads."""
    settings = optimizer.param_groups[group]
    [master] = settings["params"]
    state = optimizer.state[master]
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
    state["step"] += 1
    (beta1, beta2), count = settings["betas"], int(state["step"])
    decay = 1 - settings["lr"] * settings["weight_decay"]
    rate, correction = settings["lr"] / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
    numbers = [factor, decay, rate, correction, settings["eps"], beta1, 1 - beta1, beta2, 1 - beta2]
    scalars = torch.tensor(numbers, device=master.device)
    flat = master.detach(), state["exp_avg"], state["exp_avg_sq"], gradient, weights.data
    for parts in zip(*(tensor.split(_AT_ONCE) for tensor in flat), strict=True):
        adamw(scalars, *parts)


@torch.compile(dynamic=True)
def adamw(
    scalars: torch.Tensor, master: torch.Tensor, mean: torch.Tensor, square: torch.Tensor,
    gradient: torch.Tensor, weights: torch.Tensor,
) -> None:  # fmt: skip
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), Algorithm 2, in place. All [n] but `scalars`, see `_adamw`."""
    factor, decay, rate, correction, eps, beta1, rest1, beta2, rest2 = scalars.unbind()
    gradient = gradient.float() * factor
    mean.copy_(mean * beta1 + gradient * rest1)
    square.copy_(square * beta2 + gradient * gradient * rest2)
    master.copy_(master * decay - rate * mean / (square.sqrt() * correction + eps))
    weights.copy_(master)
