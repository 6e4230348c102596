"""An update at ZeRO stages 1 and 2 that reads and writes memory as seldom as it can, on the card or from the host.

DeepSpeed 0.19.8 divides each gradient by the number of processes, sums the first micro-batch's gradients onto zeros in
fp32, looks for values that are not finite in each tensor, takes the norm in fp64, which shows them, too, multiplies by
what clips, even if that is 1, and waits for the device three times. With `reduce_scatter`, which the shipped configs
switch off, it copies each bucket before the all-reduce (it has no reduce-scatter) and back. For a full fine-tune of
klein 4B on one H200 the update below takes 28 % off the step in bf16, 33 % in fp8.

An optimizer in host memory DeepSpeed updates on the CPU, from gradients summed in fp32 on the card, and sends the
weights back as fp32. Here masters and moments pass through the card, whose memory is as fast as the CPU's is slow; so
do sums of gradients, which wait in host memory between micro-batches (figures: docs/benchmarks.md).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import distributed

from flux2_ds.engine.flat_adamw import update
from flux2_ds.engine.host_memory import mmap_large_allocations, pin_in_place

_SUMMED_AT_ONCE = 1 << 24  # elements that wait in host memory between micro-batches


def let_offload(config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A DeepSpeed config that leaves the optimizer to `Update`, and whether its memory is to be pinned: by that, as
    DeepSpeed's way takes powers of two."""
    mmap_large_allocations()
    zero = config["zero_optimization"]
    offload = zero["offload_optimizer"]
    unpinned = zero | {"offload_optimizer": offload | {"pin_memory": False}}
    changed = config | {"zero_optimization": unpinned, "zero_force_ds_cpu_optimizer": False}
    return changed, offload.get("pin_memory", True)


class Update:
    """Replaces the update of DeepSpeed's optimizer of stages 1 and 2.

    `micro_batches`: of a step. `compiled`: AdamW is one pass that torch compiles. `pinned`: an offloaded optimizer's
    memory is.
    """

    def __init__(
        self, zero: DeepSpeedZeroOptimizer, micro_batches: int, *, compiled: bool, pinned: bool
    ) -> None:
        self._zero: Any = zero
        self._compiled, self._offloaded = compiled, bool(zero.cpu_offload)
        self._in_passes = compiled or self._offloaded
        if self._in_passes and micro_batches == 1 and zero.communication_data_type == zero.dtype:
            zero.gradient_accumulation_dtype = zero.dtype  # nothing is summed
        self._host_sums: list[torch.Tensor] = []
        if self._offloaded:
            self._take_over(micro_batches > 1 and zero.partition_gradients, pinned)
        self._squares: torch.Tensor | float = 0.0
        zero._use_compact_grad_partition_buffer = lambda group: True  # one flat tensor of gradients
        zero._add_to_grad_partition_buffer = self._add
        zero.gradient_average = False
        zero.step = self._step
        self.summed_over = distributed.get_world_size(zero.dp_process_group)
        """What the loss is to be divided by, for gradients that are summed over the processes."""
        self._start()

    def _take_over(self, sums: bool, pinned: bool) -> None:
        """Let DeepSpeed go on as if it offloaded nothing, and free what it would offload by."""
        zero = self._zero
        zero.cpu_offload = zero._offload_gradient_safety_enabled = False
        zero.temp_grad_buffer_for_cpu_offload = zero.temp_grad_buffer_for_gpu_offload = None
        zero.param_buffer_of_bit16_for_cpu_offload_groups.clear()
        zero.offload_gradient_dict.clear()
        for master in zero.single_partition_of_fp32_groups:
            if sums:
                self._host_sums.append(master.grad)
            master.grad = None
            for tensor in (master, *self._host_sums[-1:]) if pinned else ():
                pin_in_place(tensor)

    def _start(self) -> None:
        self._zero.micro_step_id = INITIAL_MICRO_STEP_ID
        self._zero.averaged_gradients.clear()
        for i, total in enumerate(self._host_sums):
            self._zero.averaged_gradients[i] = SimpleNamespace(flat_partition=total)

    def _add(self, total: torch.Tensor, gradient: torch.Tensor) -> None:
        first = self._zero.micro_step_id == 0
        if not self._host_sums:
            total.copy_(gradient) if first else total.add_(gradient)  # onto zeros
            return
        last = self._zero.is_gradient_accumulation_boundary()
        pieces = total.split(_SUMMED_AT_ONCE), gradient.split(_SUMMED_AT_ONCE)
        for part, new in zip(*pieces, strict=True):
            summed = new.float() if first else new + part.to(new.device, non_blocking=True)
            if last:
                self._squares += torch.linalg.vector_norm(summed).double().square()
            part.copy_(summed, non_blocking=True)

    def _gradients(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The flat gradients of the groups, and the sum of their squares, fp64."""
        if self._host_sums:
            fp64 = {"dtype": torch.float64, "device": self._zero.bit16_groups_flat[0].device}
            return [*self._host_sums], torch.as_tensor(self._squares, **fp64)
        groups = [self._zero.averaged_gradients[i] for i in range(len(self._zero.bit16_groups))]
        norms = torch._foreach_norm([each for group in groups for each in group], 2, torch.float32)
        squares = torch.stack(norms).double().square().sum()
        return [group.flat_partition for group in groups], squares

    def _step(self) -> None:
        """Clip and update, unless the norm says that a gradient is not finite. It is the one wait."""
        zero = self._zero
        gradients, squares = self._gradients()
        self._squares = 0.0
        self._start()
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
            weights = zero.parallel_partitioned_bit16_groups[i][rank].data
            gradient = gradients.pop(0)
            if self._in_passes:
                update(
                    zero.optimizer, i, gradient, 1 / scale, weights,
                    compiled=self._compiled, passing=self._offloaded,
                )  # fmt: skip
                continue
            master.grad = gradient.to(master.dtype)
            if scale != 1:
                master.grad.mul_(1 / scale)
            zero._optimizer_step(i)
            master.grad = None
            weights.copy_(master)
        all_gather_dp_groups(
            zero.bit16_groups_flat, zero.parallel_partitioned_bit16_groups, zero.real_dp_process_group,
            zero.nccl_start_alignment_factor, zero.allgather_bucket_size,
        )  # fmt: skip
