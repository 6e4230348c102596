"""DeepSpeed configs: the shipped ones by name, and what a config may hold."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flux2_ds.config.parse import shipped_directory
from flux2_ds.errors import UserError

OFFLOADS = ("offload_optimizer", "offload_param")
_KEYS: dict[str, type | tuple[type, ...]] = {
    "zero_optimization": dict,
    "communication_data_type": str,
    "comms_logger": dict,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "steps_per_print": int,
}
"""What a config may hold, and of which type each is."""
_OWNED_BY_RECIPE = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "wandb": "log.wandb",
}
_SIZES = {
    "reduce_bucket_size": 1,
    "sub_group_size": 1,
    "zero_hpz_partition_size": 1,
    "stage3_max_live_parameters": 0,
    "stage3_param_persistence_threshold": 0,
}
"""Numbers of zero_optimization that the memory plan reads -> the least that each may be."""


def shipped_configs() -> dict[str, Path]:
    """The DeepSpeed configs that come with the project, by name."""
    return {path.stem: path for path in sorted(shipped_directory("ds_configs").glob("*.json"))}


def read_deepspeed(choice: str | dict[str, Any]) -> dict[str, Any]:
    """Read the DeepSpeed config by shipped name, path or value, and check it against what it may hold."""
    source: str = "(in the recipe)"
    config: Any = copy.deepcopy(choice)
    if isinstance(choice, str):
        shipped = shipped_configs()
        path = Path(choice) if choice.endswith(".json") else shipped.get(choice)
        if path is None or not path.is_file():
            raise UserError(
                f"deepspeed is {choice!r}: neither a shipped config ({', '.join(shipped)}) nor an existing "
                ".json file."
            )
        source, config = str(path), _read_json(path)
    for problem in _problems(config):
        raise UserError(f"deepspeed config {source} {problem}")
    return dict(config)


def offload_device(zero: dict[str, Any], part: str) -> str:
    """Where `zero_optimization` puts one of `OFFLOADS`; "none" is the card."""
    return str((zero.get(part) or {}).get("device", "none"))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise UserError(f"deepspeed config {path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"deepspeed config {path} is not valid JSON: {error}.") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that comes twice, of which json would take the last."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} comes twice")
    return dict(pairs)


def _problems(config: Any) -> Iterator[str]:
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if (
        not isinstance(zero, dict)
        or zero.get("stage", 0) not in (0, 1, 2, 3)
        or not all(isinstance(zero.get(part) or {}, dict) for part in OFFLOADS)
    ):
        yield (
            "must be a JSON object; its zero_optimization, too, with a stage of 0, 1, 2 or 3; and its "
            f"{' and '.join(OFFLOADS)}, if any."
        )
        return
    for key, value in config.items():
        if key in _OWNED_BY_RECIPE:
            yield (
                f"sets {key!r}, which belongs to the recipe: set {_OWNED_BY_RECIPE[key]} there and remove "
                "it from the config."
            )
        elif key not in _KEYS:  # which would have no effect, or the wrong one
            yield f"has the key {key!r}, which is not offered. Remove it. Offered: {', '.join(sorted(_KEYS))}."
        elif not isinstance(value, _KEYS[key]):
            yield f"is wrong: {key} is {value!r}, which is no value for it."
    if '"auto"' in json.dumps(config):
        yield 'uses "auto"; write the value.'
    reduced = config.get("communication_data_type", "fp32")
    if reduced not in ("fp32", "bf16", "fp16"):
        yield f"is wrong: communication_data_type is {reduced!r}; it must be fp32, bf16 or fp16."
    for old, new in zip(("cpu_offload", "cpu_offload_param"), OFFLOADS, strict=True):
        if old in zero:
            yield f'has zero_optimization.{old}, an old name: write "{new}": {{"device": "cpu"}}.'
    for key, least in _SIZES.items():
        value = zero.get(key, least)
        if not (isinstance(value, int | float) and least <= value < 1e18):
            yield f"is wrong: zero_optimization.{key} is {value!r}; it must be a number of at least {least}."
