"""From a recipe and its hosts to the exact commands and environment."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from flux2_ds.config.recipe import Launch
from flux2_ds.errors import UserError
from launcher.hosts import Hosts

TRAIN_MODULE = "flux2_ds.train"
_SSH = [
    *("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
]
"""ssh that asks for nothing and notices within half a minute that the other side is gone."""
_FORWARDED = (
    *("NCCL_", "GLOO_", "TORCH_", "UCX_", "FI_", "OMP_"),
    *("HF_", "WANDB_", "AWS_", "PYTHONPATH"),
)
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass(frozen=True)
class Command:
    """A command line and the variables it needs on top of the environment; on another host if it has
    one."""

    argv: list[str]
    environment: dict[str, str]
    host: str | None = None

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        line = " ".join([*variables, shlex.join(self.argv)])
        return f"{self.host}$ {line}" if self.host else line

    def program(self) -> list[str]:
        """What to execute: the program installed beside this Python, under a keeper (keeper.py), here
        or over ssh."""
        beside = Path(sys.executable).with_name(self.argv[0])
        argv = [str(beside) if beside.exists() else self.argv[0], *self.argv[1:]]
        silence = "inf" if self.host is None else "60"
        kept = [sys.executable, "-m", "launcher.reaper", silence, *argv]
        if self.host is None:
            return kept
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return ssh(self.host, ["env", *variables, *kept])


def ssh(host: str, argv: list[str]) -> list[str]:
    """`argv` on another host, in this directory."""
    return [*_SSH, host, f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(argv)}"]


def train_commands(
    launch: Launch,
    hosts: Hosts,
    arguments: list[str],
    *,
    cores: int,
    port: int,
    environment: dict[str, str],
    module: str = TRAIN_MODULE,
) -> list[Command]:
    """The `deepspeed` commands that run `module` with the recipe's `arguments`: one for this machine
    or for pdsh, or one for each host of a hostfile.

    `cores` of this machine are shared out to the processes (DeepSpeed's CPU Adam and gloo use
    threads) unless `environment` already sets OMP_NUM_THREADS; other hosts do so for themselves
    (keeper.py).
    """
    variables: dict[str, str] = {"DS_ACCELERATOR": launch.accelerator}
    variables |= collective_timeout(launch, environment)
    # DeepSpeed's own log lines would bury what the user looks for.
    start = ["deepspeed", "--log_level", "critical"]
    end = ["--master_port", str(port), "--no_local_rank", "--module", module, *arguments]
    if hosts.hostfile is None:
        where = ["--num_gpus", str(hosts.processes)]
        if hosts.devices:
            where = ["--include", "localhost:" + ",".join(map(str, hosts.devices))]
        if "OMP_NUM_THREADS" not in environment:
            variables["OMP_NUM_THREADS"] = str(max(1, cores // hosts.processes))
        return [Command([*start, *where, *end], variables)]
    start += ["--hostfile", str(hosts.hostfile)]
    if launch.over == "pdsh":
        # pdsh starts the hosts with none of these variables; ~/.deepspeed_env can set them.
        return [Command([*start, *end], variables)]
    variables = forwarded(environment) | variables
    return [
        Command(
            [*start, "--no_ssh", "--node_rank", str(rank), "--master_addr", hosts.address, *end],
            variables | {"FLUX2_DS_SLOTS": str(slots)},
            name,
        )
        for rank, (name, slots) in enumerate(hosts.slots.items())
    ]


def collective_timeout(launch: Launch, environment: dict[str, str]) -> dict[str, str]:
    """DeepSpeed's timeout of collectives, unless the user has set it: in whole minutes, and later
    than the lookout needs to name the process that they wait for.

    Raises:
        UserError: the user has set it to something else.
    """
    given = environment.get("DEEPSPEED_TIMEOUT")
    if given is not None and not (given.isdecimal() and int(given)):
        raise UserError(
            f"the environment variable DEEPSPEED_TIMEOUT is {given!r}; it must be whole minutes, at least 1."
        )
    if not launch.hang_timeout_s or given is not None:
        return {}
    return {"DEEPSPEED_TIMEOUT": str(math.ceil(launch.hang_timeout_s / 60) + 5)}


def forwarded(environment: dict[str, str]) -> dict[str, str]:
    """The variables that other hosts get, too. Never a secret: a command line is no place for one."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_FORWARDED) and not any(word in name for word in _SECRETS)
    }
