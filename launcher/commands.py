"""From a recipe and its hosts to the exact command and environment. Pure."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from flux2_ds.recipe import Launch
from launcher.hosts import Hosts

TRAIN_MODULE = "flux2_ds.train"


@dataclass(frozen=True)
class Command:
    """A command line and the variables it needs on top of the environment."""

    argv: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.argv)])


def train_command(
    launch: Launch,
    hosts: Hosts,
    arguments: list[str],
    *,
    cores: int,
    port: int,
    environment: dict[str, str],
) -> Command:
    """The `deepspeed` command that runs the trainer with the recipe's `arguments`.

    `cores` of this machine are shared out to the processes (DeepSpeed's CPU Adam and gloo use
    threads) unless `environment` already sets OMP_NUM_THREADS.
    """
    variables: dict[str, str] = {}
    if hosts.hostfile is not None:
        # DeepSpeed passes neither of the variables below on to other hosts; each finds its own.
        where = ["--hostfile", str(hosts.hostfile)]
    else:
        where = ["--num_gpus", str(hosts.processes)]
        if hosts.devices:
            where = ["--include", "localhost:" + ",".join(map(str, hosts.devices))]
        variables["DS_ACCELERATOR"] = launch.accelerator
        if "OMP_NUM_THREADS" not in environment:
            variables["OMP_NUM_THREADS"] = str(max(1, cores // hosts.processes))
    argv = ["deepspeed", *where, "--master_port", str(port), "--no_local_rank", "--module"]
    return Command([*argv, TRAIN_MODULE, *arguments], variables)
