"""How DeepSpeed's ZeRO-3 divides a model's parameters among the processes, and where it keeps the parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
from deepspeed.runtime.zero.config import get_zero_config
from pydantic import ValidationError
from torch import distributed, nn
from transformers.integrations import HfDeepSpeedConfig

from flux2_ds.config.validate import swaps
from flux2_ds.engine.host_memory import place_large_apart
from flux2_ds.errors import UserError

log = logging.getLogger("flux2_ds")


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
        if page_locks(config):
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


def page_locks(config: dict[str, Any]) -> bool:
    """Whether parameters wait in page-locked host memory."""
    offload = config.get("zero_optimization", {}).get("offload_param") or {}
    on_cuda = get_accelerator().device_name() == "cuda"
    return on_cuda and offload.get("device") == "cpu" and bool(offload.get("pin_memory", True))


def check_config(config: dict[str, Any]) -> None:
    """Refuse what DeepSpeed would after the model is loaded.

    Raises:
        UserError: as `check_zero`; a place on NVMe where it could not write.
    """
    check_zero(config)
    zero = config.get("zero_optimization", {})
    if swaps(zero):
        _check_swapping(zero["offload_param"]["nvme_path"])


def check_zero(config: dict[str, Any]) -> None:
    """Refuse what DeepSpeed does not know.

    Raises:
        UserError: naming the keys of zero_optimization.
    """
    try:
        get_zero_config(config)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"zero_optimization in the deepspeed config: {wrong}.") from error


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
