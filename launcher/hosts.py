"""The machines of a run: this one's GPUs, or a hostfile's."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flux2_ds.errors import UserError
from flux2_ds.recipe import Launch

_HOST_LINE = re.compile(r"^(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\d+)$")


@dataclass(frozen=True)
class Hosts:
    """Processes on this machine (`hostfile` None), or on those of a hostfile."""

    processes: int
    hostfile: Path | None = None


def find_hosts(launch: Launch) -> Hosts:
    """How many processes the recipe's `launch` section means on these machines.

    Raises:
        UserError: no GPU, or a hostfile that is missing or malformed.
    """
    if launch.hostfile is not None:
        if launch.processes is not None:
            raise UserError(
                f"launch.processes is {launch.processes}, but launch.hostfile {launch.hostfile} says "
                "how many processes each host runs. Remove launch.processes (and --gpus)."
            )
        slots = read_hostfile(Path(launch.hostfile))
        return Hosts(sum(slots.values()), Path(launch.hostfile))
    if launch.processes is not None:
        return Hosts(launch.processes)
    if launch.accelerator == "cpu":
        return Hosts(1)
    gpus = visible_gpus()
    if gpus == 0:
        raise UserError(
            "no GPU is visible (nvidia-smi -L, CUDA_VISIBLE_DEVICES). Run on a machine with GPUs, "
            "say how many with --gpus N, or set launch.accelerator to cpu."
        )
    return Hosts(gpus)


def visible_gpus() -> int:
    """GPUs that CUDA_VISIBLE_DEVICES leaves, or that nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def read_hostfile(path: Path) -> dict[str, int]:
    """Host name -> number of processes, from lines like `node01 slots=8`."""
    if not path.is_file():
        raise UserError(f"launch.hostfile {path} does not exist.")
    slots: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        match = _HOST_LINE.match(line)
        if match is None or int(match["slots"]) < 1 or match["name"] in slots:
            raise UserError(
                f"launch.hostfile {path}, line {number}: {line!r}. Each host stands on a line of its "
                "own, once, as `name slots=8`."
            )
        slots[match["name"]] = int(match["slots"])
    if not slots:
        raise UserError(f"launch.hostfile {path} lists no host.")
    return slots


def free_port(preferred: int = 29500) -> int:
    """`preferred`, or a free port if another run has it."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
