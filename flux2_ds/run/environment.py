"""This process's rank, as whatever started it says in environment variables. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from flux2_ds.errors import UserError

_TOGETHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_REMEDY = (
    f"{', '.join(_TOGETHER)} go together, as deepspeed, torchrun and Slurm's script set them. Correct "
    "them, or unset RANK and WORLD_SIZE for one process alone."
)


@dataclass(frozen=True)
class Ranks:
    """This process's rank in the run and on its host, and the world size."""

    rank: int
    local_rank: int
    world_size: int


def given_ranks(environment: Mapping[str, str]) -> Ranks | None:
    """What the variables say, or None for a process that is alone. Refuses what cannot be."""
    if "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1":
        return None
    for name in _TOGETHER:
        if not environment.get(name):
            raise UserError(f"the environment variable {name} is not set. {_REMEDY}")
    world_size = _number(environment, "WORLD_SIZE", 1)
    rank = _number(environment, "RANK", 0, world_size)
    local_rank = _number(environment, "LOCAL_RANK", 0, world_size)
    checked_port(environment["MASTER_PORT"])
    return Ranks(rank, local_rank, world_size)


def rank_and_world_size(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and world size; (0, 1) for a process that is alone."""
    ranks = given_ranks(environment)
    return (ranks.rank, ranks.world_size) if ranks else (0, 1)


def checked_port(given: str) -> int:
    """MASTER_PORT, at which the ranks meet."""
    if not (given.isdecimal() and len(given) < 6 and 0 < int(given) < 1 << 16):
        raise UserError(
            f"the environment variable MASTER_PORT is {given!r}; it must be a port, 1 to 65535, the "
            "same on all hosts."
        )
    return int(given)


def _number(environment: Mapping[str, str], name: str, least: int, below: int = 1 << 31) -> int:
    given = environment[name]
    if given.isdecimal() and len(given) < 11 and least <= int(given) < below:
        return int(given)
    bounds = f"at least {least}" if least else f"0 to {below - 1}, by WORLD_SIZE"
    raise UserError(
        f"the environment variable {name} is {given!r}; it must be a number, {bounds}. {_REMEDY}"
    )


def free_host_memory(root: Path = Path("/")) -> float:
    """Bytes that are free on this host, and in the control groups of this process, such as a container's."""
    free = float(psutil.virtual_memory().available)
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, kinds, own = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        # Version 1 of control groups, in which each kind has a tree of its own, or version 2.
        tree, limit_name, used_name, cached_name = (
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if kinds
            else ("", "memory.max", "memory.current", "inactive_file")
        )
        group = root / "sys/fs/cgroup" / tree / own.lstrip("/")
        for folder in (group, *group.parents):
            try:
                limit = float((folder / limit_name).read_text())
                stat = (folder / "memory.stat").read_text()
                cached = re.search(rf"^{cached_name} (\d+)", stat, re.M)
                used = int((folder / used_name).read_text()) - int(cached[1] if cached else 0)
            except (OSError, ValueError):  # no such group; "max": no limit
                continue
            free = min(free, limit - used)
    return free
