"""The machines of a run: this one's GPUs, or a hostfile's."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from flux2_ds.config.cards import Card, card_problem
from flux2_ds.config.recipe import Launch, Recipe
from flux2_ds.errors import UserError, counted

_HOST_LINE = re.compile(r"(?P<name>[\w\[][\w.:@%\[\]-]*)\s+slots=(?P<slots>\d{1,6})", re.ASCII)
"""A name that ssh takes for an option, or a shell for more than a word, is none."""
_NO_GPU = "no GPU is visible (nvidia-smi -L, CUDA_VISIBLE_DEVICES). Run on a machine with GPUs"
_PATIENCE = 30.0  # s for nvidia-smi, which may have to initialize every GPU


@dataclass(frozen=True)
class Hosts:
    """Processes on this machine, on its GPUs `devices` if CUDA_VISIBLE_DEVICES names any; or on the
    hosts of a hostfile, `slots` of them on each, which meet at `address`, the first."""

    processes: int
    hostfile: Path | None = None
    devices: tuple[int, ...] = ()
    slots: dict[str, int] = field(default_factory=dict)
    address: str = ""


def find_hosts(launch: Launch) -> Hosts:
    """Return where the recipe's `launch` section runs."""
    if launch.hostfile is not None:
        if launch.processes is not None:
            raise UserError(
                f"launch.processes is {launch.processes}, but launch.hostfile {launch.hostfile} says "
                "how many processes each host runs. Remove launch.processes (and --gpus)."
            )
        path = Path(launch.hostfile)
        return on_hosts(path, read_hostfile(path))
    if launch.accelerator == "cpu":
        return Hosts(1 if launch.processes is None else launch.processes)
    devices = named_devices()
    processes = visible_gpus(devices) if launch.processes is None else launch.processes
    if launch.processes is None and not processes:
        raise UserError(f"{_NO_GPU}, say how many with --gpus N, or set launch.accelerator to cpu.")
    # More processes than the variable names: a plan for another machine (`check_gpus` starts none).
    named = devices is not None and processes <= len(devices)
    return Hosts(processes, devices=devices[:processes] if devices and named else ())


def on_hosts(hostfile: Path, slots: dict[str, int]) -> Hosts:
    """Return the hosts of a hostfile; refuse a first one that the others would look for on themselves."""
    address = ssh_address(next(iter(slots)))
    if len(slots) > 1 and (address == "localhost" or address.startswith("127.")):
        raise UserError(
            f"launch.hostfile {hostfile} begins with {next(iter(slots))}, which the other hosts cannot "
            "reach by that name. Give the name or address that they know it by."
        )
    return Hosts(sum(slots.values()), hostfile, slots=slots, address=address)


def ssh_address(host: str) -> str:
    """Return what ssh connects to for `host`, which may be an alias of its configuration."""
    if shutil.which("ssh") is None:
        return host
    told = ask(["ssh", "-G", host], _PATIENCE).stdout
    names = [line.split()[1] for line in told.splitlines() if line.startswith("hostname ")]
    return names[0] if names else host


def check_gpus(hosts: Hosts) -> None:
    """Refuse to start more processes than this machine has visible GPUs."""
    if hosts.hostfile is not None:
        return
    visible = visible_gpus(named_devices())
    if not visible:
        raise UserError(f"{_NO_GPU}, or set launch.accelerator to cpu.")
    if hosts.processes > visible:
        raise UserError(
            f"{counted(hosts.processes, 'process')} (launch.processes or --gpus) for as many GPUs; this "
            f"machine shows {visible}. Ask for fewer, or correct CUDA_VISIBLE_DEVICES."
        )


def check_cards(recipe: Recipe, hosts: Hosts) -> None:
    """Refuse what none of this machine's GPUs can compute, unless the processes run, or are planned, elsewhere. Of
    different GPUs the ranks see which is theirs."""
    if recipe.launch.accelerator == "cpu" or hosts.hostfile is not None:
        return
    cards = cards_here()
    problems = [card_problem(recipe, card) for card in cards]
    if len(cards) >= hosts.processes and all(problems):
        raise UserError(str(problems[0]))


def cards_here() -> list[Card]:
    """Return this machine's GPUs, as far as nvidia-smi tells."""
    if shutil.which("nvidia-smi") is None:
        return []
    listing = ask_nvidia_smi("--query-gpu=name,compute_cap", "--format=csv,noheader").stdout
    found = re.findall(r"^(.+), *(\d+)\.(\d+)$", listing, re.M)
    return [Card(name, (int(major), int(minor))) for name, major, minor in found]


def check_ssh(hosts: Hosts) -> None:
    """Refuse a hostfile without the program that reaches its hosts."""
    if hosts.hostfile is not None and shutil.which("ssh") is None:
        raise UserError(
            f"launch.hostfile {hosts.hostfile} needs ssh, which is not on this machine's PATH. Install "
            "it, or start each host's part there with --node-rank."
        )


def named_devices() -> tuple[int, ...] | None:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, None without it: DeepSpeed's launcher replaces
    the variable and has to be told."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    if value.strip() == "-1":
        return ()
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not all(name.isdecimal() for name in names):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {value!r}; DeepSpeed's launcher takes GPU numbers only, no "
            "UUIDs or MIG names. Use the numbers that nvidia-smi -L shows."
        )
    return tuple(int(name) for name in names)


def visible_gpus(named: tuple[int, ...] | None) -> int:
    """Return how many GPUs a start would see, given those that are named."""
    return count_gpus() if named is None else len(named)


def count_gpus() -> int:
    """Return how many GPUs nvidia-smi lists."""
    if shutil.which("nvidia-smi") is None:
        return 0
    return sum(line.startswith("GPU ") for line in ask_nvidia_smi("-L").stdout.splitlines())


def ask_nvidia_smi(*options: str) -> subprocess.CompletedProcess[str]:
    """Return what nvidia-smi says; refuse a driver that never answers."""
    try:
        return ask(["nvidia-smi", *options], _PATIENCE)
    except UserError as error:
        raise UserError(
            f"{error} The NVIDIA driver hangs, and CUDA would, too: see dmesg, and reboot."
        ) from None


def ask(argv: list[str], seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program that answers soon; a `UserError` says that it has not."""
    # Not subprocess.run, which waits for the killed program: one that hangs in a driver does not die.
    child = subprocess.Popen(
        argv,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, error = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        raise UserError(f"`{shlex.join(argv)}` has not ended in {seconds:.0f} s.") from None
    return subprocess.CompletedProcess(argv, child.returncode, out, error)


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the number of processes by host, from lines like `node01 slots=8`."""
    try:
        if path.exists() and not path.is_file():  # a device may have no end
            raise ValueError("it is no file")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"launch.hostfile {path} cannot be read ({error}).") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        match = _HOST_LINE.fullmatch(line)
        if match is None or int(match["slots"]) < 1 or match["name"] in slots:
            raise UserError(
                f"launch.hostfile {path}, line {number}: {line!r}. Each host stands on a line of its own, "
                "once, as `name slots=8`, without spaces around the =; a name is letters, digits and .:@%_-."
            )
        slots[match["name"]] = int(match["slots"])
    if not slots:
        raise UserError(f"launch.hostfile {path} lists no host.")
    return slots


def pick_port(hosts: Hosts) -> int:
    """Draw a port for rank 0, anew for every start: until it listens there, some ten seconds, another
    run may look for one, too. Of another machine's ports nobody can tell which are free."""
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                if hosts.hostfile is None:
                    continue
        return port
