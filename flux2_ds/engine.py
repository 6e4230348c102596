"""DeepSpeed, and the only file that imports it.

Gives the loop a forward, a backward and a step, and gives checkpoints *named full tensors*: weights
and optimizer moments by parameter name, whatever the ZeRO stage and the number of processes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import distributed, nn
from transformers.integrations import HfDeepSpeedConfig

from flux2_ds.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of one parameter, in fp32."""


@dataclass(frozen=True)
class Process:
    """This process among all of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0


def start_process(accelerator: Literal["cuda", "cpu"]) -> Process:
    """Join the process group that the launcher's environment describes; alone without one."""
    found = get_accelerator().device_name()
    if found != accelerator:
        raise UserError(
            f"DeepSpeed chose the {found} accelerator, the recipe's launch.accelerator is "
            f"{accelerator}. Start with `flux2-ds train`, or set DS_ACCELERATOR={accelerator}."
        )
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    if "RANK" not in os.environ:
        os.environ.update(alone)
    device = torch.device("cpu")
    # DeepSpeed would compile a shared-memory collective on its first CPU run: minutes, and a failure
    # without a C++ compiler. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if accelerator == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return Process(distributed.get_rank(), distributed.get_world_size(), device)


@contextmanager
def divided(config: dict[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside keep this process's part of each parameter only (ZeRO-3), in `dtype`."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # On its own glibc would soon keep freed tensors in its heap, where they leave holes as large
        # as the model. M_MMAP_THRESHOLD: from this size on they go back to the system.
        libc.mallopt(-3, 4 << 20)
    # Without fp16 on the machine, zero.Init takes its own `dtype` argument for bf16, whatever it is.
    sections = {
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.half},
    }
    with deepspeed.zero.Init(config_dict_or_path=config | sections):
        yield


@contextmanager
def gathering(config: dict[str, Any]) -> Iterator[None]:
    """PEFT gathers a divided weight wherever it reads one inside, as DoRA does for its norms."""
    known_to_transformers = HfDeepSpeedConfig(config)  # which keeps a weak reference to it
    try:
        yield
    finally:
        del known_to_transformers


class Engine:
    """A model under DeepSpeed with AdamW over its trainable parameters."""

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        *,
        offload_optimizer: bool,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        settings: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        if offload_optimizer:
            adam = DeepSpeedCPUAdam(self._named.values(), adamw_mode=True, **settings)
        else:
            fused = get_accelerator().device_name() == "cuda"
            adam = torch.optim.AdamW(self._named.values(), fused=fused, **settings)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
        self._adam = adam
        self._stage = self._engine.zero_optimization_stage()
        self.skips_overflows = "fp16" in config
        """Whether a step with infinite gradients is skipped by the loss scaler."""

    def forward(self, **inputs: Any) -> torch.Tensor:
        """The transformer's prediction."""
        return self._engine(**inputs, return_dict=False)[0]

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        """End a micro-batch; on the last one of a step, reduce, clip and update."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def gradient_norm(self) -> float | None:
        """Global L2 norm before clipping, of the last step; None at stage 0, which keeps none."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, parameter name, full fp32 tensor) for kind in "weights" and `MOMENTS`.

        Collective: every process must iterate to the end.
        """
        for name, parameter in self._named.items():
            yield "weights", name, self._full_weight(parameter)
        for kind in MOMENTS:
            for name, parameter in self._named.items():
                yield kind, name, self._full_moment(parameter, kind)

    def updates(self) -> int:
        """Optimizer updates made (with fp16, steps that overflowed are not among them)."""
        counts = {int(state["step"]) for state in self._adam.state.values() if "step" in state}
        return max(counts, default=0)

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the trainable weights and their fp32 masters.

        Raises:
            UserError: the checkpoint's parameters are not those that are trained now.
        """
        shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self._named.items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if shapes != found:
            differing = sorted(n for n in {*shapes, *found} if shapes.get(n) != found.get(n))
            first = differing[0]
            raise UserError(
                f"the checkpoint does not fit what is trained now: {len(differing)} parameters "
                f"differ, the first is {first} ({found.get(first, 'absent')} in the checkpoint, "
                f"{shapes.get(first, 'not trained')} now). method, lora.rank and lora.targets "
                "cannot change within a run; give a new run_dir."
            )
        for name, parameter in self._named.items():
            value = weights[name]
            if self._stage == 3:
                local = self._local_part(value, safe_get_local_fp32_param(parameter))
                safe_set_local_fp32_param(parameter, local)
                # The partition that the forward pass gathers; ZeRO-3 hangs it on the parameter.
                getattr(parameter, "ds_tensor").data.copy_(local)  # noqa: B009
                continue
            parameter.data.copy_(value)
            if hasattr(parameter, "_hp_mapping"):
                safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def load_moments(self, moments: dict[str, dict[str, torch.Tensor]], updates: int) -> None:
        """Set Adam's state; `moments[kind][name]` is a full fp32 tensor."""
        self._create_moments()
        for kind in MOMENTS:
            for name, parameter in self._named.items():
                self._set_moment(parameter, kind, moments[kind][name])
        for state in self._adam.state.values():
            count = state["step"]
            state["step"] = count.fill_(updates) if torch.is_tensor(count) else updates

    def _full_weight(self, parameter: nn.Parameter) -> torch.Tensor:
        master = safe_get_full_fp32_param(parameter)
        return parameter.detach().float() if master is None else master

    def _full_moment(self, parameter: nn.Parameter, kind: str) -> torch.Tensor:
        if self._plain:
            return self._adam.state[parameter][kind]
        return safe_get_full_optimizer_state(parameter, kind)

    def _set_moment(self, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
        if self._plain:
            self._adam.state[parameter][kind].copy_(value)
        elif self._stage == 3:
            like = safe_get_local_fp32_param(parameter)
            safe_set_local_optimizer_state(parameter, self._local_part(value, like), kind)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), kind)

    @property
    def _plain(self) -> bool:
        """Stage 0 in fp32: no ZeRO optimizer wraps Adam."""
        return self._engine.optimizer is self._adam

    def _create_moments(self) -> None:
        """Let Adam allocate its state, by a step with zero gradients and learning rate 0.

        Torch optimizers create their state in the first step, and ZeRO links its named fragments to
        what exists then.
        """
        (group,) = self._adam.param_groups
        # Stage 3 hands Adam its flat partitions one at a time, during the step only.
        held = group["params"]
        flat = self._engine.optimizer.fp32_partitioned_groups_flat if self._stage == 3 else held
        gradients = [parameter.grad for parameter in flat]
        for parameter in flat:
            parameter.grad = torch.zeros_like(parameter)
        group["params"], group["lr"] = flat, 0.0
        self._adam.step()
        group["params"] = held
        for parameter, gradient in zip(flat, gradients, strict=True):
            parameter.grad = gradient
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    @staticmethod
    def _local_part(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This process's slice of a full tensor at stage 3, zero-padded as ZeRO pads it."""
        flat = value.flatten()
        first = like.numel() * distributed.get_rank()
        part = torch.zeros_like(like).flatten()
        own = flat[first : first + like.numel()]
        part[: own.numel()] = own
        return part.view_as(like)


def average(value: torch.Tensor) -> torch.Tensor:
    """Mean over all processes. Collective."""
    distributed.all_reduce(value, op=distributed.ReduceOp.SUM)
    return value / distributed.get_world_size()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process. Collective, so that all of them act on it together."""
    value = torch.tensor(int(flag), device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value)


def from_first(value: int, device: torch.device) -> int:
    """The first process's value, in all of them. Collective."""
    tensor = torch.tensor(value, device=device)
    distributed.broadcast(tensor, src=0)
    return int(tensor)


def barrier() -> None:
    """Wait for all processes."""
    distributed.barrier()


def stop_process() -> None:
    """Leave the process group."""
    distributed.destroy_process_group()
