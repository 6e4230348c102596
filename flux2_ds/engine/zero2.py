"""What DeepSpeed 0.19.8 does at stages 1 and 2 with every gradient more often than an update needs.

It looks for values that are not finite in each tensor and then takes the norm in fp64, which shows them, too; it
divides each gradient by the number of processes; it sums the first micro-batch's gradients onto zeros, by way of a copy
in fp32; it multiplies by what clips, even if that is 1, by a tensor, which torch cannot vectorize; and it waits for the
device three times. For a full fine-tune of klein 4B on one H200 that is a fifth of the step (docs/benchmarks.md).

The shipped configs set `reduce_scatter: false` besides: with it, DeepSpeed 0.19.8 copies a bucket before the
all-reduce (it has no reduce-scatter) and back; without, it reduces the bucket where it lies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import distributed


def lighten(zero: Any) -> int:
    """Let DeepSpeed's optimizer take the ways below instead, if it is the one of stages 1 and 2 and on the device.

    Returns what the loss is to be divided by, for gradients that are summed over the processes.
    """
    if not isinstance(zero, DeepSpeedZeroOptimizer) or zero.cpu_offload:
        return 1

    def norm(norm_type: int = 2) -> float:
        """Global L2 norm of the averaged gradients, scaled as they are. The one wait of an update."""
        parts = [g for group in zero.averaged_gradients.values() for g in group]
        norms = torch.stack(torch._foreach_norm(parts, norm_type, torch.float32))
        squares = norms.double().square().sum()
        distributed.all_reduce(squares, group=zero.dp_process_group)
        return math.sqrt(squares.item())

    def unscale_and_clip(gradients: list[torch.Tensor], total: float) -> None:
        scale = zero.loss_scale
        if zero.clip_grad > 0:
            scale *= max(1.0, (total / zero.loss_scale + 1e-6) / zero.clip_grad)
        if scale != 1:
            for gradient in gradients:
                gradient.mul_(1 / scale)

    def add(total: torch.Tensor | None, gradient: torch.Tensor) -> None:
        if total is None:
            return
        if zero.micro_step_id == 0:  # onto zeros
            total.copy_(gradient)
        else:
            total.add_(gradient)

    zero.gradient_average = False
    zero.check_overflow = lambda partition_gradients: None  # a norm that is not finite says it
    zero.scaled_global_norm = norm
    zero.unscale_and_clip_grads = unscale_and_clip
    zero._add_to_grad_partition_buffer = add
    return distributed.get_world_size(zero.dp_process_group)
