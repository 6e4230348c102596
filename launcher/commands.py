"""From a recipe and its hosts to the `deepspeed` commands that start its processes."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flux2_ds.config.recipe import Launch
from flux2_ds.errors import UserError
from flux2_ds.run.environment import checked_port
from launcher.hosts import Hosts, pick_port

TRAIN = "flux2_ds.train"
PREPARE = "flux2_ds.prepare"
BENCH = "flux2_ds.commands.bench"
PROBE = "flux2_ds.commands.probe"
_SSH = [
    *("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
]
"""ssh that asks for nothing and notices within half a minute that the other side is gone."""
_FORWARDED = (
    *("NCCL_", "GLOO_", "TORCH_", "UCX_", "FI_", "OMP_"),
    *("HF_", "WANDB_", "AWS_", "PYTHONPATH"),
)
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH", re.IGNORECASE)
_NO_SECRET_NAME = re.compile(r"NCCL_IB_PKEY|\w+_FILE")
_SECRET_VALUE = re.compile(r"://[^\s]*[@?#;]")
"""A URL with a user, a query, a fragment or parameters."""


@dataclass(frozen=True)
class Command:
    """A command line and the variables it needs on top of the environment; on `host`, or here."""

    argv: list[str]
    environment: dict[str, str]
    host: str | None = None

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        line = " ".join([*variables, shlex.join(self.argv)])
        return f"{self.host}$ {line}" if self.host else line

    def program(self) -> list[str]:
        """Return what to execute: the program beside this Python, under a reaper, here or over ssh."""
        beside = Path(sys.executable).with_name(self.argv[0])
        argv = [str(beside) if beside.exists() else self.argv[0], *self.argv[1:]]
        silence = "inf" if self.host is None else "60"
        argv = [sys.executable, "-m", "launcher.reaper", silence, *argv]
        return argv if self.host is None else ssh(self.host, argv, self.environment)


def ssh(host: str, argv: list[str], variables: Mapping[str, str]) -> list[str]:
    """Return the command that runs `argv` on another host, in this directory."""
    words = ["env", *(f"{name}={value}" for name, value in variables.items()), *argv]
    return [*_SSH, "--", host, f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(words)}"]


def start_commands(
    module: str,
    launch: Launch,
    hosts: Hosts,
    arguments: list[str],
    *,
    node: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[Command]:
    """Return the commands, all but one `deepspeed`, that run `module` with `arguments` in every rank: one for this
    machine, or one for each host of a hostfile; with `node` that host's alone, without ssh, at a port
    that all hosts know.

    The cores are shared out to a host's processes (DeepSpeed's CPU Adam and gloo use threads) unless
    `environment` sets OMP_NUM_THREADS; other hosts do so for themselves (reaper.py).
    """
    port = (
        pick_port(hosts) if node is None else checked_port(environment.get("MASTER_PORT", "29500"))
    )
    variables = {"DS_ACCELERATOR": launch.accelerator, **collective_timeout(launch, environment)}
    # DeepSpeed's own log lines would bury what the user looks for.
    start = ["deepspeed", "--log_level", "critical"]
    end = ["--master_port", str(port), "--no_local_rank", "--module", module, *arguments]
    if hosts.hostfile is None:
        where = ["--num_gpus", str(hosts.processes)]
        devices = ",".join(map(str, hosts.devices))
        if devices:
            where = ["--include", f"localhost:{devices}"]
        if "OMP_NUM_THREADS" not in environment:
            threads = (os.cpu_count() or 1) // hosts.processes
            variables["OMP_NUM_THREADS"] = str(max(1, threads))
        if module == PREPARE and hosts.processes == 1:
            # DeepSpeed's launcher imports torch, and the user waits to hear what is wrong with the data.
            variables |= {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
            return [Command(["python", "-m", module, *arguments], variables)]
        return [Command([*start, *where, *end], variables)]
    variables = forwarded(environment) | variables
    start += ["--hostfile", str(hosts.hostfile), "--no_ssh", "--master_addr", hosts.address]
    commands = [
        Command(
            [*start, "--node_rank", str(rank), *end],
            variables | {"FLUX2_DS_SLOTS": str(slots)},
            host,
        )
        for rank, (host, slots) in enumerate(hosts.slots.items())
    ]
    return commands if node is None else [replace(commands[node], host=None)]


def collective_timeout(launch: Launch, environment: Mapping[str, str]) -> dict[str, str]:
    """Return DeepSpeed's timeout of collectives, unless the user has set it: in whole minutes, and
    later than the watchdog needs to name the rank that they wait for."""
    given = environment.get("DEEPSPEED_TIMEOUT")
    if given is not None and not (given.isdecimal() and int(given)):
        raise UserError(
            f"the environment variable DEEPSPEED_TIMEOUT is {given!r}; it must be whole minutes, at least 1."
        )
    if not launch.hang_timeout_s or given is not None:
        return {}
    return {"DEEPSPEED_TIMEOUT": str(math.ceil(launch.hang_timeout_s / 60) + 5)}


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that other hosts get, too; a command line is no place for a secret."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_FORWARDED)
        and (_NO_SECRET_NAME.fullmatch(name) or not _SECRET_NAME.search(name))
        and not _SECRET_VALUE.search(value)
    }
