"""What `flux2-ds plan` prints."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from flux2_ds.config.autofit import CHOSEN, LINKS, Choice, Room, choices, moved_bytes, place_base
from flux2_ds.config.buckets import bucket_table, resolutions
from flux2_ds.config.cards import CARD_NAMES, Card, card_named
from flux2_ds.config.memory import GIB, Memory, estimate, kept_blocks
from flux2_ds.config.model_spec import planned_spec
from flux2_ds.config.plan import Plan, make_plan
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.index import Index
from flux2_ds.errors import UserError, counted
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
    recipe: Recipe
    asked: str
    """The options that say how much there is."""
    moved: float
    """Bytes of the base that come to each card in a micro-batch."""
    automatic: bool
    """Whether the recipe leaves `base_placement` open."""

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"memory     {self.memory.on_card / GIB:.1f} GiB a GPU at {self.image_tokens} image tokens, "
            f"{self.checkpointed:.0%} of the blocks checkpointed",
            *_parts(self.memory.card),
        ]
        if self.memory.host:
            one = self.memory.on_host / GIB
            parts = f"{counted(self.per_host, 'process')} × {one:.1f} GiB"
            found.append(f"host       {one * self.per_host:.1f} GiB = {parts}")
            found += _parts(self.memory.host)
        if self.moved:
            placed = f"{self.recipe.base_placement}, {self.recipe.base_resident:.0%} of the blocks resident"
            seconds = ", ".join(
                f"{self.moved / rate:.2f} s over {link}"
                for link, rate in LINKS.items()
                if link != "nvlink" or self.recipe.base_placement == "sharded"
            )
            found.append(
                f"streams    {self.moved / GIB:.1f} GiB a micro-batch ({placed}): {seconds}; hidden where "
                "computing takes longer"
            )
        if self.fits is None:
            return found
        found.append(f"fits       {'yes' if self.fits else 'no'}")
        if not self.others:
            return [*found, "           nothing does: more or larger GPUs, or a smaller model"]
        found.append("what fits, fastest first, with the flags that make it so (--json has all):")
        found.append("  GPU GiB  host GiB")
        found += [
            f"  {choice.memory.on_card / GIB:7.1f}  {choice.memory.needed_on_host * self.per_host / GIB:8.1f}"
            f"  {self.flags(choice)}"
            for choice in self.worth_a_line()
        ]
        return found

    def worth_a_line(self) -> list[Choice]:
        """The others, but those that hardly need less than a faster one over the same base."""
        kept: list[Choice] = []
        for choice in self.others:
            card, host = choice.memory.on_card, choice.memory.needed_on_host
            if not any(
                faster.recipe.base_weights == choice.recipe.base_weights
                and 0.95 * faster.memory.on_card <= card
                and faster.memory.needed_on_host <= host
                for faster in kept
            ):
                kept.append(choice)
        return kept

    def flags(self, choice: Choice) -> str:
        """The settings in which a choice differs from the recipe, for a command line."""
        wanted = {
            name: getattr(choice.recipe, name)
            for name in CHOSEN
            if not (self.automatic and name in ("base_placement", "base_resident"))
        }
        words = [
            f"--{name} {json.dumps(value).strip(chr(34))}"
            for name, value in wanted.items()
            if value != getattr(self.recipe, name)
        ]
        return " ".join(words) or "(the recipe as it is)"

    def refusal(self) -> str | None:
        """Why a start with this memory would not end well; None if it would, or nobody has asked."""
        if self.fits is not False:
            return None
        needs = f"{self.memory.on_card / GIB:.1f} GiB of each GPU"
        if self.memory.needed_on_host:
            needs += f" and {self.memory.needed_on_host * self.per_host / GIB:.1f} GiB of each host"
        remedy = (
            f"add {self.flags(self.others[0])}"
            if self.others
            else "with no settings it does: more or larger GPUs, or a smaller model"
        )
        return f"the plan takes {needs}, which {self.asked} does not have; {remedy}."

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
            "streamed_per_micro_batch": self.moved,
            "fits": self.fits,
            "choices": [
                {name: getattr(choice.recipe, name) for name in CHOSEN}
                | {
                    "gpu_total": choice.memory.on_card,
                    "host_total": choice.memory.needed_on_host * self.per_host,
                    "flags": self.flags(choice),
                }
                for choice in self.others
            ],
        }


def plan_memory(
    plan: Plan, hosts: Hosts, index: Index | None, card: Card | None, host: str | None
) -> MemoryPlan:
    """Estimate the recipe's memory; `card`: each GPU; `host`: memory of each host, such as 64GiB."""
    recipe = plan.recipe
    spec = planned_spec(recipe.model.path, recipe.model.revision)
    tokens = index.largest_tokens if index else _largest_bucket(recipe)
    most = plan.recipe.launch.processes or 8
    per_host = max(hosts.slots.values(), default=min(hosts.processes, most))
    card_bytes = None if card is None else card.gib * GIB
    host_bytes = math.inf if host is None else size("--host", host) / per_host
    room = Room(plan.processes, tokens, card_bytes or math.inf, host_bytes, card)
    automatic = recipe.base_placement == "auto"
    if automatic:
        plan = make_plan(place_base(recipe, spec, room), plan.processes)
    kept = kept_blocks(spec, plan, tokens, card_bytes or 0)
    memory = estimate(spec, plan, tokens, kept, card_bytes or 0)
    checkpointed = 1 - kept / spec.blocks
    fits, others = None, []
    if card_bytes is not None:
        fits = memory.fits(card_bytes, host_bytes)
        others = choices(plan.recipe, spec, room)
    asked = f"--gpu {card.name if card else None}" + (f" --host {host}" if host else "")
    return MemoryPlan(
        plan.processes, per_host, tokens, checkpointed, memory, fits, others, plan.recipe, asked,
        moved_bytes(plan, spec), automatic,
    )  # fmt: skip


def find_card(text: str) -> Card:
    """The card that `--gpu` names; of a size alone, one that computes everything."""
    if (card := card_named(text)) is not None:
        return card
    try:
        return Card(text, (99, 0), size("--gpu", text) / GIB)
    except UserError as error:
        raise UserError(f"{error} Or a card: one of {', '.join(CARD_NAMES)}.") from error


def size(option: str, text: str) -> float:
    """Bytes of a size such as 24GiB or 64 GB."""
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
