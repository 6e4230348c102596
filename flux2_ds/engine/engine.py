"""A model under DeepSpeed.

Gives the loop a forward, a backward and a step, and checkpoints *named tensors*: weights and optimizer
state by parameter name, whatever the ZeRO stage and the world size.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.config import get_zero_config
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import set_z3_leaf_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.cpp_extension import _get_build_directory

from flux2_ds.config.memory import ZERO_GROUP
from flux2_ds.config.recipe import Optimizer
from flux2_ds.engine import optimizers
from flux2_ds.engine.host_memory import pin_in_place
from flux2_ds.engine.state import TrainingState
from flux2_ds.engine.zero2 import Update, let_offload
from flux2_ds.engine.zero3 import pins_parameters

log = logging.getLogger("flux2_ds")


_ABANDONED_AFTER_S = 120


def cpu_adam(parameters: list[Any], **settings: Any) -> DeepSpeedCPUAdam:
    """DeepSpeed's CPU Adam, which is compiled at its first use on a machine."""
    wait_for_build(Path(_get_build_directory("cpu_adam", verbose=False)) / "lock")
    return DeepSpeedCPUAdam(parameters, **settings)


def wait_for_build(lock: Path) -> None:
    """Wait for the process that builds an extension. Torch would wait forever if that one was killed; its lock is
    removed here once no process of this machine has it open, nor one of another machine can be at work."""
    for waited in count():
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age > _ABANDONED_AFTER_S and not _is_open(lock):
            log.warning("%s was left by a build that was killed: it is removed.", lock)
            lock.unlink(missing_ok=True)
            return
        if waited == 5:
            log.info("waiting for another process that compiles CPU Adam (%s)", lock)
        time.sleep(1)


def _is_open(path: Path) -> bool:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path == str(path) for file in process.open_files()):
                return True
    return False


class Engine:
    """A model under DeepSpeed with an optimizer over its trainable parameters.

    `sharded`: checkpoints hold each rank's partitions (for a full fine-tune) instead of full tensors.
    `compiled`: modules that are one graph each, whose parameters ZeRO-3 must gather together.
    """

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        settings: Optimizer,
        *,
        offload_optimizer: bool = False,
        sharded: bool = False,
        compiled: Sequence[nn.Module] = (),
    ) -> None:
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        parameters = list(self._named.values())
        fused = get_accelerator().device_name() == "cuda"
        self._stage = config.get("zero_optimization", {}).get("stage", 0)
        pinned = False
        if offload_optimizer and self._stage == 3:
            adam = {"betas": settings.betas, "eps": settings.eps}
            decay = settings.weight_decay
            grouped = optimizers.groups(parameters, decay)
            self._optimizer = cpu_adam(grouped, **adam, weight_decay=decay)
        else:
            # In groups: gradients of one appear once its backward pass begins, its weights are gathered while the
            # next is updated, and its masters are made on the card before they are moved.
            size = ZERO_GROUP if self._stage in (1, 2) else math.inf
            self._optimizer = optimizers.build(
                settings, parameters, fused=fused, group_elements=size
            )
            if offload_optimizer:
                config, pinned = let_offload(config)
        self._max_norm = config["gradient_clipping"]
        if self._stage == 0:
            config = config | {"gradient_clipping": 0.0}  # see `_clip`
        else:
            # DeepSpeed takes the memory of whole buckets, however little there is to reduce.
            trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
            bucket = min(get_zero_config(config).reduce_bucket_size, trained)
            zero = config["zero_optimization"] | {"reduce_bucket_size": bucket}
            config = config | {"zero_optimization": zero}
        self._gathers_modules = self._stage == 3 and bool(compiled)
        if self._gathers_modules:
            for module in compiled:
                set_z3_leaf_module(module, True)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config=config
        )
        if pins_parameters(config):
            weights: list[Any] = list(model.parameters())
            for partition in (weight.ds_tensor for weight in weights):
                if partition.is_cpu:  # DeepSpeed keeps small ones on the card
                    pin_in_place(partition)
        zero_optimizer = self._engine.optimizer
        self._summed_over = 1
        if isinstance(zero_optimizer, DeepSpeedZeroOptimizer):
            self._summed_over = Update(
                zero_optimizer,
                self._engine.gradient_accumulation_steps(),
                compiled=bool(compiled) and self._optimizer.defaults.get("fused", False),
                pinned=fused and pinned,
            ).summed_over
        self._norm: torch.Tensor | float = math.nan
        self.state = TrainingState(
            self._named, self._optimizer, self._engine.optimizer, self._stage, settings, sharded
        )
        """Weights, optimizer and EMA, for checkpoints."""
        self.skips_overflows = "fp16" in config
        """Whether a step with infinite gradients is skipped by the loss scaler."""

    @property
    def model(self) -> Any:
        """The model, as the engine holds it."""
        return self._engine.module

    def forward(self, **inputs: Any) -> torch.Tensor:
        """The transformer's prediction."""
        return self._predict(self._engine, inputs)

    def forward_base(self, **inputs: Any) -> torch.Tensor:
        """The prediction of the plain model, its adapter switched off and without dropout; no gradient."""
        # Not by PEFT's own switch, which makes the adapter's weights need no gradient.
        for layer in self._adapted:
            layer._disable_adapters = True
        training = self._engine.training
        try:
            self._engine.eval()
            with torch.no_grad():
                return self._predict(self._engine, inputs)
        finally:
            self._engine.train(training)
            for layer in self._adapted:
                layer._disable_adapters = False

    def _predict(self, module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if self._gathers_modules:
            # DeepSpeed counts a module's gradients by its inputs, so the first needs such an input.
            inputs["hidden_states"] = inputs["hidden_states"].detach().requires_grad_()
        prediction: torch.Tensor = module(**inputs, return_dict=False)[0]
        return prediction

    def rehearse(self, loss: Callable[[Callable[..., torch.Tensor]], torch.Tensor]) -> None:
        """One forward and backward pass that leaves no trace; `loss` is given the model's forward.

        Only the gradient of the first trained parameter is asked for. That takes the backward pass
        through all blocks, and accumulates no gradient, which DeepSpeed would count.
        """

        def forward(**inputs: Any) -> torch.Tensor:
            return self._predict(self._engine.module, inputs)

        devices = [self._engine.device] if self._engine.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            value = loss(forward)
            # DeepSpeed would count the gradients of modules that it gathers at once. Their graphs
            # are compiled for both directions now, so forward is enough for them.
            if not self._gathers_modules:
                torch.autograd.grad(value, [next(iter(self._named.values()))])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes without dropout."""
        self._engine.eval()
        try:
            yield
        finally:
            self._engine.train()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self._engine.backward(loss / self._summed_over)

    def step(self, learning_rate: float) -> None:
        """End a micro-batch; on the last one of a step, reduce, clip and update.

        Nothing is updated if a gradient is not finite; `gradient_norm` tells.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        last = self._engine.is_gradient_accumulation_boundary()
        if last and self._stage == 0:
            self._norm = self._clip()
        advance = self._step_partitioned if last and self._stage == 3 else self._engine.step
        advance()
        if last and self._stage > 0:
            self._norm = self._engine.get_global_grad_norm()
        if last and self.state.has_ema:
            norm = self._norm
            finite = norm.isfinite() if torch.is_tensor(norm) else math.isfinite(norm)
            self.state.update_ema(finite)

    def _step_partitioned(self) -> None:
        """A step at stage 3, in which DeepSpeed releases the small parameters that stay gathered.

        DeepSpeed would gather each in a collective of its own, some hundred for an adapter.
        """
        zero = self._engine.optimizer
        small, zero.persistent_parameters = zero.persistent_parameters, []
        try:
            self._engine.step()
        finally:
            zero.persistent_parameters = small
        if small:
            small[0].all_gather_coalesced(small).wait()

    def _clip(self) -> torch.Tensor:
        """Clip at stage 0 and return the norm before it; withhold an update that is not finite.

        DeepSpeed would make that update, and its clipping takes two kernels a tensor and waits for the
        device.
        """
        trained = [p for p in self._named.values() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self._max_norm > 0:
            nn.utils.clip_grads_with_norm_(trained, self._max_norm, norm)
        if self._optimizer.defaults.get("fused"):
            # The kernel reads it on the device, so that the host need not wait to decide.
            self._optimizer.found_inf = (~norm.isfinite()).float()
        elif not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)  # so that no parameter is updated
        return norm

    def gradient_norm(self) -> torch.Tensor | float:
        """Global L2 norm before clipping, of the last step; not finite: it made no update.

        A tensor where the step may not have been computed yet; reading it waits.
        """
        return self._norm
