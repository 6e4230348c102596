"""`flux2-ds prepare`, here and over the machines of a hostfile."""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

from flux2_ds.config.recipe import Recipe
from launcher.commands import Command, forwarded
from launcher.hosts import check_ssh, find_hosts
from launcher.supervise import Stopper, run

PREPARE_MODULE = "flux2_ds.prepare"


def prepare_here(arguments: list[str]) -> int:
    """Run `prepare` on this machine until it ends, or a signal ends all of it; returns the exit code."""
    with Stopper(None) as stopper:
        return run([_command(arguments, {})], stopper)


def prepare_on_hosts(recipe: Recipe, arguments: list[str]) -> int:
    """Run `prepare` on every host, the first leading (prepare/team.py); returns the exit code.

    When one fails the others are ended, and so is all by a signal: the same command goes on.
    """
    commands = prepare_commands(recipe, arguments, dict(os.environ), start=uuid.uuid4().hex[:8])
    check_ssh(find_hosts(recipe.launch))
    for command in commands:
        print(command, flush=True)
    with Stopper(None) as stopper:
        return run(commands, stopper)


def prepare_commands(
    recipe: Recipe, arguments: list[str], environment: dict[str, str], *, start: str
) -> list[Command]:
    """A command for each host, with as many processes as its slots unless the recipe says how many."""
    slots = find_hosts(recipe.launch).slots
    return [
        _command(
            [
                *arguments,
                *([] if recipe.prepare.processes else [f"--prepare.processes={processes}"]),
            ],
            forwarded(environment)
            | {"FLUX2_DS_NODE": str(node), "FLUX2_DS_NODES": str(len(slots))}
            | {"FLUX2_DS_START": start, "FLUX2_DS_SLOTS": str(processes)},
            host,
        )
        for node, (host, processes) in enumerate(slots.items())
    ]


def _command(arguments: list[str], variables: dict[str, str], host: str | None = None) -> Command:
    argv = [Path(sys.executable).name, "-m", PREPARE_MODULE, *arguments]
    return Command(argv, variables, host)
