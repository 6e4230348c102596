"""An update at ZeRO stages 1 and 2 that reads and writes memory as seldom as it can, on the card or from the host.

DeepSpeed 0.19.8 divides each gradient by the number of processes, sums the first micro-batch's gradients onto zeros in
fp32, looks for values that are not finite in each tensor, takes the norm in fp64, which shows them, too, multiplies by
what clips, even if that is 1, gathers the weights once all are updated, and waits for the device once after the
backward pass and three times in the update. With `reduce_scatter`, which the shipped configs switch off, it copies each
bucket before the all-reduce (it has no reduce-scatter) and back. Here the host waits only where a loss scaler or
another optimizer than AdamW has to know the norm, or where the state is in host memory, and the weights of a group are
gathered while the next is updated (figures: docs/benchmarks.md).

An optimizer in host memory DeepSpeed updates on the CPU, from gradients summed in fp32 on the card, and sends the
weights back as fp32. Here masters and moments pass through the card, whose memory is as fast as the CPU's is slow; so
do sums of gradients, which wait in host memory between micro-batches (figures: docs/benchmarks.md).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
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
        if zero.overlap_comm and zero.reduction_stream is not None:
            zero.independent_gradient_partition_epilogue = self._end_of_backward
            self._main_stream = get_accelerator().current_stream()
            self._build_sum = zero._build_compact_grad_partition_buffer
            zero._build_compact_grad_partition_buffer = self._sum_of_group
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

    def _end_of_backward(self) -> None:
        """DeepSpeed's, which waits for the device where it is enough that one stream waits for the other."""
        zero = self._zero
        zero.reduce_ipg_grads()
        zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)
        self._main_stream.wait_stream(zero.reduction_stream)
        zero._clear_previous_reduced_grads()
        if zero.is_gradient_accumulation_boundary():
            for i in range(len(zero.bit16_groups)):
                zero._get_compact_grad_partition_buffer(i)
        zero._release_ipg_buffers()
        zero._clear_param_grad_only()
        zero._epilogue_ran_this_backward = True

    def _sum_of_group(self, i: int) -> Any:
        """DeepSpeed's buffer of a group's gradients, made for the stream that computes: what the stream that reduces
        allocates, no forward pass could use once it is free."""
        reducing = get_accelerator().current_stream()
        with get_accelerator().stream(self._main_stream):
            total = self._build_sum(i)
        reducing.wait_stream(self._main_stream)
        return total

    @torch.no_grad()
    def _step(self) -> None:
        """Clip and update, unless the norm says that a gradient is not finite."""
        zero = self._zero
        gradients, squares = self._gradients()
        self._squares = 0.0
        self._start()
        distributed.all_reduce(squares, group=zero.dp_process_group)
        scale, norm = zero.loss_scale, squares.sqrt()
        zero._global_grad_norm = norm / scale
        zero.overflow = False
        if not self._in_passes or zero.dynamic_loss_scale:
            zero.overflow = not math.isfinite(norm)  # the one wait
            zero._update_scale(zero.overflow)
            if zero.overflow:
                return
        factor = torch.full_like(norm, 1 / scale)
        if zero.clip_grad > 0:
            factor /= ((zero._global_grad_norm + 1e-6) / zero.clip_grad).clamp(min=1)
        factor.masked_fill_(~norm.isfinite(), math.nan)
        gathered = []
        for i, master in enumerate(zero.single_partition_of_fp32_groups):
            group = zero.real_dp_process_group[i]
            weights = zero.parallel_partitioned_bit16_groups[i][distributed.get_rank(group)].data
            gradient = gradients.pop(0)
            if self._in_passes:
                update(
                    zero.optimizer, i, gradient, factor, weights,
                    compiled=self._compiled, passing=self._offloaded,
                )  # fmt: skip
            else:
                master.grad = gradient.to(master.dtype)
                master.grad.mul_(factor)
                zero._optimizer_step(i)
                master.grad = None
                weights.copy_(master)
            if distributed.get_world_size(group) > 1:
                whole = zero.bit16_groups_flat[i]
                gathered.append(
                    distributed.all_gather_into_tensor(whole, weights, group, async_op=True)
                )
        for work in gathered:
            work.wait()
