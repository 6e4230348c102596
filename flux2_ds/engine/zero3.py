"""How DeepSpeed's ZeRO-3 partitions a model's parameters, and where the partitions wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import get_zero_config
from deepspeed.utils import groups
from pydantic import ValidationError
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from flux2_ds.engine.host_memory import mmap_large_allocations
from flux2_ds.errors import UserError


def make_partitioner(config: dict[str, Any]) -> Callable[[nn.Module], None]:
    """Return a function that ZeRO-3-partitions a module in place, keeping its dtypes. Collective."""
    mmap_large_allocations()
    if pins_parameters(config):  # `Engine` pins them, without growing them
        zero = config["zero_optimization"]
        offload = zero["offload_param"] | {"pin_memory": False}
        config = config | {"zero_optimization": zero | {"offload_param": offload}}

    hpz = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    if hpz > 1 and groups._get_zero_param_intra_parallel_group() is None:
        # Each `zero.Init` would make its own, of which DeepSpeed allows one.
        groups._create_zero_param_parallel_group(hpz)
    group = groups._get_zero_param_intra_parallel_group() if hpz > 1 else None

    def partition(module: nn.Module) -> None:
        deepspeed.zero.Init(
            module=module, config_dict_or_path=config, zero_param_parallel_group=group
        )
        if (
            hpz > 1
        ):  # its copies are of what is not read yet; the first forward pass makes them anew
            for parameter in module.parameters():
                setattr(parameter, "ds_secondary_tensor", None)  # noqa: B010

    return partition


def pins_parameters(config: dict[str, Any]) -> bool:
    """Whether parameters wait in pinned host memory."""
    offload = config.get("zero_optimization", {}).get("offload_param") or {}
    on_cuda = get_accelerator().device_name() == "cuda"
    return on_cuda and offload.get("device") == "cpu" and bool(offload.get("pin_memory", True))


def check_zero(config: dict[str, Any]) -> None:
    """Refuse what DeepSpeed does not know, naming the keys of zero_optimization."""
    try:
        get_zero_config(config)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"zero_optimization in the deepspeed config: {wrong}.") from error


@contextmanager
def gathering(config: dict[str, Any]) -> Iterator[None]:
    """Let PEFT gather a partitioned weight wherever it reads one, as DoRA does for its norms."""
    known_to_transformers = HfDeepSpeedConfig(config)  # which keeps a weak reference to it
    try:
        yield
    finally:
        del known_to_transformers
