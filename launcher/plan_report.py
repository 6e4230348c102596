"""What `flux2-ds plan` prints."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from flux2_ds.config.autofit import Choice, choices
from flux2_ds.config.buckets import bucket_table, resolutions
from flux2_ds.config.memory import GIB, Memory, estimate, kept_blocks
from flux2_ds.config.model_spec import planned_spec
from flux2_ds.config.plan import Plan
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.dataset import recordable
from flux2_ds.data.index import Index
from flux2_ds.errors import UserError
from launcher.hosts import Hosts

_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the recipe as it stands, and what else would fit.

    `per_host`: processes that share a host's memory. `checkpointed`: share of the blocks
    whose activations are checkpointed. `fits`: on the given card and host; None if none was given. `others`: the fastest
    first.
    """

    processes: int
    per_host: int
    image_tokens: int
    checkpointed: float
    memory: Memory
    fits: bool | None
    others: list[Choice]

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"memory     {self.memory.on_card / GIB:.1f} GiB a GPU at {self.image_tokens} image tokens, "
            f"{self.checkpointed:.0%} of the blocks checkpointed",
            *_parts(self.memory.card),
        ]
        if self.memory.host:
            one = self.memory.on_host / GIB
            parts = f"{self.per_host} processes × {one:.1f} GiB"
            found.append(f"host       {one * self.per_host:.1f} GiB = {parts}")
            found += _parts(self.memory.host)
        if self.fits is None:
            return found
        found.append(f"fits       {'yes' if self.fits else 'no'}")
        if not self.others:
            return [*found, "           nothing does: more or larger GPUs, or a smaller model"]
        found.append("what fits, fastest first:")
        found.append(f"  {'deepspeed':23}  base      ckpt  inputs  GPU GiB  host GiB")
        found += [
            f"  {choice.deepspeed:23}  {choice.base_weights or '-':8}  {choice.activation_checkpointing:4.0%}"
            f"  {'host' if choice.offload_activations else 'card':6}"
            f"  {choice.memory.on_card / GIB:7.1f}"
            f"  {choice.memory.on_host * self.per_host / GIB:8.1f}"
            for choice in self.others
        ]
        return found

    def values(self) -> dict[str, Any]:
        """For programs; bytes."""
        return {
            "processes": self.processes,
            "processes_per_host": self.per_host,
            "image_tokens": self.image_tokens,
            "activation_checkpointing": self.checkpointed,
            "gpu": self.memory.card,
            "gpu_total": self.memory.on_card,
            "host_per_process": self.memory.host,
            "fits": self.fits,
            "choices": [
                {
                    "deepspeed": choice.deepspeed,
                    "base_weights": choice.base_weights,
                    "activation_checkpointing": choice.activation_checkpointing,
                    "offload_activations": choice.offload_activations,
                    "gpu_total": choice.memory.on_card,
                    "host_total": choice.memory.on_host * self.per_host,
                }
                for choice in self.others
            ],
        }


def plan_memory(
    plan: Plan, hosts: Hosts, index: Index | None, card: str | None, host: str | None
) -> MemoryPlan:
    """Estimate the recipe's memory; `card` and `host`: sizes such as 24GiB, of each GPU and each host.

    Raises:
        UserError: a size that is none, or a model whose dimensions are not known.
    """
    recipe, spec = plan.recipe, planned_spec(plan.recipe.model.path)
    tokens = index.largest_tokens if index else _largest_bucket(recipe)
    most = plan.recipe.launch.processes or 8
    per_host = max(hosts.slots.values(), default=min(hosts.processes, most))
    card_bytes = None if card is None else size("--gpu", card)
    host_bytes = math.inf if host is None else size("--host", host) / per_host
    if index is not None:
        plan = recordable(plan, index)
    kept = kept_blocks(spec, plan, tokens, card_bytes or 0)
    memory = estimate(spec, plan, tokens, kept, card_bytes or 0)
    checkpointed = 1 - kept / spec.blocks
    if card_bytes is None:
        return MemoryPlan(plan.processes, per_host, tokens, checkpointed, memory, None, [])
    fits = memory.fits(card_bytes, host_bytes)
    others = choices(plan.recipe, spec, plan.processes, tokens, card_bytes, host_bytes)
    return MemoryPlan(plan.processes, per_host, tokens, checkpointed, memory, fits, others)


def size(option: str, text: str) -> float:
    """Bytes of a size such as 24GiB or 64 GB.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise UserError(f"{option} is {text!r}; it must be a size such as 24GiB or 64GB.")
    return float(match[1]) * _UNITS[match[2].upper()]


def _largest_bucket(recipe: Recipe) -> int:
    data = recipe.data
    table = bucket_table(resolutions(data.resolution)[0], data.bucket_step, data.max_aspect)
    return max(bucket.tokens for bucket in table)


def _parts(parts: dict[str, float]) -> list[str]:
    return [f"  {name:18} {value / GIB:7.2f} GiB" for name, value in parts.items()]
