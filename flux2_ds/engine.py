"""DeepSpeed, and the only file that imports it.

Gives the loop a forward, a backward and a step, and gives checkpoints *named tensors*: weights and
optimizer state by parameter name, whatever the ZeRO stage and the number of processes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
from deepspeed.runtime.zero.config import get_zero_config
from deepspeed.utils import set_z3_leaf_module
from pydantic import ValidationError
from torch import distributed, nn
from transformers.integrations import HfDeepSpeedConfig

from flux2_ds import optimizers
from flux2_ds.errors import OutageError, UserError
from flux2_ds.host_memory import lock_pages, place_large_apart
from flux2_ds.ranks import given_ranks
from flux2_ds.recipe import Optimizer
from flux2_ds.swapping import swaps
from flux2_ds.training_state import TrainingState

log = logging.getLogger("flux2_ds")


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
    """Join the process group that the launcher's environment describes; alone without one.

    Raises:
        UserError: another accelerator, or an environment that cannot be.
        OutageError: this first process cannot listen where the others would meet it.
    """
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
        "MASTER_PORT": "0",  # whichever is free
    }
    ranks = given_ranks(os.environ)
    if ranks is None:
        os.environ.update(alone)
    device = torch.device("cpu")
    # DeepSpeed would compile a shared-memory collective on its first CPU run: minutes, and a failure
    # without a C++ compiler. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if accelerator == "cuda":
        device = torch.device("cuda", ranks.local_rank if ranks else 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"the environment variable LOCAL_RANK is {device.index}; this machine shows "
                f"{torch.cuda.device_count()} GPUs. Start fewer processes here, or correct "
                "CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(device)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    except distributed.DistNetworkError as error:
        if ranks is None or ranks.rank:  # that the first one cannot be reached has a cause there
            raise
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        raise OutageError(
            f"the processes cannot meet at {address}, port {port}, by the environment variables MASTER_ADDR "
            f"and MASTER_PORT ({str(error).splitlines()[0]}). They must name this machine, on which the "
            "first process runs, and a port that nothing else uses."
        ) from error
    return Process(distributed.get_rank(), distributed.get_world_size(), device)


@dataclass(frozen=True)
class Swapped:
    """What goes to NVMe, where the config says so: parameters of one dtype, of at most so many elements.

    DeepSpeed's buffers have one dtype and would convert parameters of others.
    """

    dtype: torch.dtype
    largest: int


def divider(config: dict[str, Any], swapped: Swapped | None = None) -> Callable[[nn.Module], None]:
    """A function that leaves of a module's parameters this process's part of each (ZeRO-3).

    Collective. Dtypes are kept. With `swapped`, parts that are not small go to NVMe at once, so that a module
    must be filled before; all processes get the first one's values.
    """
    place_large_apart()
    if swapped is None:
        if _locks(config):
            config = _with_offload(config, pin_memory=False)  # `Engine` locks them

        def divide(module: nn.Module) -> None:
            deepspeed.zero.Init(module=module, config_dict_or_path=config)

        return divide

    size = -(-swapped.largest // distributed.get_world_size())
    config = _with_offload(config, buffer_size=size)
    # Of its own each Init would make one, which empties the directory.
    swapper = AsyncPartitionedParameterSwapper(DeepSpeedConfig(config), swapped.dtype)

    def swap(module: nn.Module) -> None:
        away = [p for p in module.parameters() if p.dtype == swapped.dtype]
        deepspeed.zero.Init(
            module=nn.ParameterList(away), config_dict_or_path=config, param_swapper=swapper
        )
        divide_on_host([p for p in module.parameters() if p.dtype != swapped.dtype], config)

    return swap


def divide_on_host(parameters: Sequence[nn.Parameter], config: dict[str, Any]) -> None:
    """Divide what does not go to NVMe though the config's other parameters do. Collective."""
    config = _with_offload(config, device="cpu")
    deepspeed.zero.Init(module=nn.ParameterList(parameters), config_dict_or_path=config)


def _with_offload(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    zero = config["zero_optimization"]
    return config | {"zero_optimization": zero | {"offload_param": zero["offload_param"] | changes}}


def _locks(config: dict[str, Any]) -> bool:
    """Whether parameters wait in page-locked host memory."""
    offload = config.get("zero_optimization", {}).get("offload_param") or {}
    on_cuda = get_accelerator().device_name() == "cuda"
    return on_cuda and offload.get("device") == "cpu" and bool(offload.get("pin_memory", True))


def check_config(config: dict[str, Any]) -> None:
    """Refuse what DeepSpeed would after the model is loaded.

    Raises:
        UserError: naming the keys of zero_optimization.
    """
    try:
        get_zero_config(config)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"zero_optimization in the deepspeed config: {wrong}.") from error
    zero = config.get("zero_optimization", {})
    if swaps(zero):
        _check_swapping(zero["offload_param"]["nvme_path"])


def _check_swapping(place: str) -> None:
    """Refuse a place on NVMe, or a machine, where DeepSpeed could not write; compiles its I/O at first use."""
    try:
        Path(place).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"nvme_path in the deepspeed config is {place}, where no directory can be made ({error}). Name "
            "another one."
        ) from error
    log.info("nvme       %s; the first start compiles DeepSpeed's async_io, some minutes", place)
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # whatever compiler and linker do wrong
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the deepspeed config has offload_param on 'nvme', and DeepSpeed's async_io does not build ({reason}). It "
            'needs a C++ compiler, ninja and libaio-dev (Debian\'s name). Install them, or set "device": "cpu".'
        ) from error


@contextmanager
def gathering(config: dict[str, Any]) -> Iterator[None]:
    """PEFT gathers a divided weight wherever it reads one inside, as DoRA does for its norms."""
    known_to_transformers = HfDeepSpeedConfig(config)  # which keeps a weak reference to it
    try:
        yield
    finally:
        del known_to_transformers


def build_cpu_adam() -> None:
    """Compile and load DeepSpeed's CPU Adam, which its first use would do otherwise."""
    DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])


class Engine:
    """A model under DeepSpeed with an optimizer over its trainable parameters.

    `in_parts`: checkpoints hold each process's part (for a full fine-tune) instead of whole tensors.
    `compiled`: modules that are one graph each, whose parameters ZeRO-3 must gather all together.
    """

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        settings: Optimizer,
        *,
        offload_optimizer: bool = False,
        in_parts: bool = False,
        compiled: Sequence[nn.Module] = (),
    ) -> None:
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parameters = list(self._named.values())
        if offload_optimizer:
            adam = {"betas": settings.betas, "eps": settings.eps}
            decay = settings.weight_decay
            self._optimizer = DeepSpeedCPUAdam(parameters, **adam, weight_decay=decay)
        else:
            fused = get_accelerator().device_name() == "cuda"
            self._optimizer = optimizers.build(settings, parameters, fused=fused)
        self._max_norm = config["gradient_clipping"]
        self._stage = config.get("zero_optimization", {}).get("stage", 0)
        if self._stage == 0:
            config = config | {"gradient_clipping": 0.0}  # see `_clip`
        else:
            # DeepSpeed takes the memory of whole buckets, however little there is to reduce.
            trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
            bucket = min(get_zero_config(config).reduce_bucket_size, trained)
            zero = config["zero_optimization"] | {"reduce_bucket_size": bucket}
            config = config | {"zero_optimization": zero}
        if swaps(config.get("zero_optimization", {})):
            # Left to `initialize`, adapters would go through buffers of the base's dtype.
            divide_on_host(parameters, config)
        self._gathers_whole_modules = self._stage == 3 and bool(compiled)
        if self._gathers_whole_modules:
            for module in compiled:
                set_z3_leaf_module(module, True)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config=config
        )
        if _locks(config):
            divided: list[Any] = list(model.parameters())
            for part in (parameter.ds_tensor for parameter in divided):
                if part.is_cpu:  # DeepSpeed keeps small ones on the card
                    lock_pages(part)
        self._norm: torch.Tensor | float = math.nan
        self.state = TrainingState(
            self._named, self._optimizer, self._engine.optimizer, self._stage, settings, in_parts
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

    def _predict(self, module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if self._gathers_whole_modules:
            # DeepSpeed counts a module's gradients by its inputs, so the first one needs such an input.
            inputs["hidden_states"] = inputs["hidden_states"].detach().requires_grad_()
        prediction: torch.Tensor = module(**inputs, return_dict=False)[0]
        return prediction

    def rehearse(self, loss: Callable[[Callable[..., torch.Tensor]], torch.Tensor]) -> None:
        """One forward and backward pass that leaves no trace; `loss` is given the model's forward.

        Only the gradient of the first trained parameter is asked for. It takes the backward pass through
        all blocks, while no parameter's gradient is accumulated, which is when DeepSpeed would count it.
        """

        def forward(**inputs: Any) -> torch.Tensor:
            return self._predict(self._engine.module, inputs)

        devices = [self._engine.device] if self._engine.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            value = loss(forward)
            # DeepSpeed would count the gradients of modules that it gathers whole. Their graphs are
            # compiled for both directions now, so forward is enough for them.
            if not self._gathers_whole_modules:
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
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        """End a micro-batch; on the last one of a step, reduce, clip and update.

        Nothing is updated if a gradient is not finite; `gradient_norm` tells.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        last = self._engine.is_gradient_accumulation_boundary()
        if last and self._stage == 0:
            self._norm = self._clip()
        advance = self._step_divided if last and self._stage == 3 else self._engine.step
        advance()
        if last and self._stage > 0:
            self._norm = float(self._engine.get_global_grad_norm())
            if self._stage < 3 and not math.isfinite(self._norm):
                # With an offloaded optimizer DeepSpeed 0.19.8 leaves the gradients of a step that it
                # has not made in its buffers, and would add those of the next steps to them.
                buffers = getattr(self._engine.optimizer, "averaged_gradients", {})
                buffers.update(dict.fromkeys(buffers))
        if last and self.state.averages:
            norm = self._norm
            finite = norm.isfinite() if torch.is_tensor(norm) else math.isfinite(norm)
            self.state.average(finite)

    def _step_divided(self) -> None:
        """A step at stage 3, in which DeepSpeed releases the small parameters that it keeps whole.

        Left to it, each would then be gathered in a collective of its own, some hundred for an adapter.
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

        DeepSpeed would make that update, and its clipping takes two kernels a tensor and waits for
        the device.
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


def barrier() -> None:
    """Wait for all processes."""
    # Without a device torch warns, where DeepSpeed has bound none to the group: with one process.
    on_card = distributed.get_backend() == "nccl"
    distributed.barrier(device_ids=[torch.cuda.current_device()] if on_card else None)


def stop_process() -> None:
    """Wait for all processes and leave the process group."""
    # Not only for each other: a gloo thread that still returns the tensor of the last collective when
    # Python shuts down aborts a process that has done all its work ("terminate called without an
    # active exception").
    barrier()
    distributed.destroy_process_group()
