"""A process's place among all of a run, as whatever started it says in environment variables. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flux2_ds.errors import UserError

_TOGETHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_REMEDY = (
    f"{', '.join(_TOGETHER)} go together, as deepspeed, torchrun and Slurm's script set them. Correct them, "
    "or unset RANK and WORLD_SIZE for one process alone."
)


@dataclass(frozen=True)
class Ranks:
    """This process's number among all, and on this machine; how many there are."""

    rank: int
    local_rank: int
    world_size: int


def given_ranks(environment: Mapping[str, str]) -> Ranks | None:
    """What the variables say, or None for a process that is alone.

    Raises:
        UserError: one is missing or is no such number.
    """
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
    """This process's number among all, and how many there are; one that is alone is the first of one.

    Raises:
        UserError: as `given_ranks`.
    """
    ranks = given_ranks(environment)
    return (ranks.rank, ranks.world_size) if ranks else (0, 1)


def checked_port(given: str) -> int:
    """MASTER_PORT, at which the processes meet.

    Raises:
        UserError: it is none.
    """
    if not (given.isdecimal() and 0 < int(given) < 1 << 16):
        raise UserError(
            f"the environment variable MASTER_PORT is {given!r}; it must be a port, 1 to 65535, the same "
            "on all hosts."
        )
    return int(given)


def _number(environment: Mapping[str, str], name: str, least: int, below: int | None = None) -> int:
    given = environment[name]
    if given.isdecimal() and int(given) >= least and (below is None or int(given) < below):
        return int(given)
    bounds = f"at least {least}" if below is None else f"{least} to {below - 1}, by WORLD_SIZE"
    raise UserError(
        f"the environment variable {name} is {given!r}; it must be a number, {bounds}. {_REMEDY}"
    )
