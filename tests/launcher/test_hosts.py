"""Which hosts and GPUs a recipe runs on."""

import socket
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from flux2_ds.config.recipe import Data, Launch, Model, Recipe
from flux2_ds.errors import UserError
from launcher import hosts
from launcher.doctor import Findings
from launcher.host_checks import check_gpus as examine_gpus
from launcher.hosts import (
    Hosts,
    cards_here,
    check_cards,
    check_gpus,
    count_gpus,
    find_hosts,
    pick_port,
    read_hostfile,
)

NODES = Hosts(12, Path("hostfile"), slots={"node01": 8, "node02": 4}, address="10.0.0.1")
ROOT = Path(__file__).parents[2]


def write_hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_hostfile(tmp_path):
    text = "# two machines\nnode01 slots=8\n\n  node02.cluster   slots=4  # smaller\n"
    path = write_hostfile(tmp_path, text)
    slots = {"node01": 8, "node02.cluster": 4}
    assert read_hostfile(path) == slots == fetch_hostfile(path)
    assert find_hosts(Launch(hostfile=str(path))) == Hosts(12, path, (), slots, "node01")
    with pytest.raises(UserError, match=r"launch\.processes is 2, but launch\.hostfile"):
        find_hosts(Launch(hostfile=str(path), processes=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (f"node01 slots=8\n{line}\n", "line 2: ")
            for line in (
                *("node02", "node02 slots=many", "node02 slots=0", "node02 slots=-1"),
                *("node01 slots=8", "node02 slots=8 extra", "slots=8", "node02 slots = 8"),
                *(
                    "-oProxyCommand=x slots=8",
                    "$(x) slots=8",
                    "a;b slots=8",
                    "node02 slots=9999999",
                ),
            )
        ),
        ("node01 slots=8\n\n\nnode02:8", "line 4: "),
        ("", "lists no host"),
        ("# nobody\n\n", "lists no host"),
    ],
)
def test_malformed_hostfile_is_refused_by_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_hostfile(write_hostfile(tmp_path, text))


def test_the_example_is_a_hostfile():
    assert read_hostfile(ROOT / "examples" / "hostfile") == {"node01": 8, "node02": 8}


@pytest.mark.parametrize("path", ["absent", "/dev/zero"])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(UserError, match=rf"launch\.hostfile {path} cannot be read"):
        find_hosts(Launch(hostfile=path))


@pytest.mark.parametrize(
    ("launch", "visible", "hosts"),
    [
        (Launch(), "0", Hosts(1, devices=(0,))),
        (Launch(), "2,3", Hosts(2, devices=(2, 3))),
        (Launch(), "3, 1,2,0,", Hosts(4, devices=(3, 1, 2, 0))),
        (Launch(processes=2), "5,4,3", Hosts(2, devices=(5, 4))),
        (Launch(processes=4), "", Hosts(4)),
        (Launch(processes=4), "2,3", Hosts(4)),  # a plan for another machine
        (Launch(accelerator="cpu"), "GPU-8a1b", Hosts(1)),
        (Launch(accelerator="cpu", processes=3), "2,3", Hosts(3)),
    ],
)
def test_gpus_are_those_that_the_variable_leaves(monkeypatch, launch, visible, hosts):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_hosts(launch) == hosts


@pytest.mark.parametrize("visible", ["GPU-8a1b", "0,MIG-GPU-8a1b/1/0", "0,-1"])
def test_gpus_that_are_no_numbers_are_refused(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES is {visible!r}.*GPU numbers only"):
        find_hosts(Launch())


def test_without_the_variable_nvidia_smi_is_asked(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for asks in (lambda: find_hosts(Launch()), lambda: check_gpus(Hosts(1))):
        with pytest.raises(UserError, match="no GPU is visible"):
            asks()
    listed = "echo 'GPU 0: H100 (UUID: x)'\necho '  MIG 1g.10gb Device 0: (UUID: y)'\n"
    program.write_text(f"#!/bin/sh\n{listed}{listed}")
    program.chmod(0o755)
    assert find_hosts(Launch()) == Hosts(2)
    check_gpus(Hosts(2))
    check_gpus(Hosts(16, tmp_path / "hostfile"))  # elsewhere
    with pytest.raises(UserError, match=r"3 processes .* shows 2"):
        check_gpus(Hosts(3))


def test_what_no_card_here_computes_is_refused(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = Recipe(
        run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s"), base_weights="fp8"
    )
    check_cards(recipe, Hosts(1))
    old, new = "NVIDIA GeForce RTX 3090, 8.6", "NVIDIA H100 80GB HBM3, 9.0"
    for listed, processes, refused in (
        ([old, old], 2, True),
        ([old], 2, False),  # a plan for another machine
        ([old, new], 1, False),
        ([], 1, False),
    ):
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in listed))
        program.chmod(0o755)
        with pytest.raises(UserError, match=r"RTX 3090\. .* int8") if refused else nullcontext():
            check_cards(recipe, Hosts(processes))
    program.write_text(f"#!/bin/sh\necho '{old}'\n")
    check_cards(recipe, Hosts(1, tmp_path / "hostfile"))
    check_cards(replace(recipe, launch=Launch(accelerator="cpu")), Hosts(1))


@pytest.mark.parametrize(
    ("asks", "command"),
    [
        (count_gpus, "nvidia-smi -L` .* driver hangs"),
        (cards_here, "nvidia-smi --query-gpu=name,compute_cap .* driver hangs"),
        (lambda: examine_gpus(Findings(), 1), "nvidia-smi --query-gpu=name,driver.* driver hangs"),
        (lambda: hosts.ssh_address("node01"), "ssh -G node01"),
    ],
)
def test_a_program_that_hangs_is_not_waited_for(tmp_path, monkeypatch, asks, command):
    monkeypatch.setenv("PATH", str(tmp_path), ":")
    monkeypatch.setattr(hosts, "_PATIENCE", 0.2)
    for name in ("nvidia-smi", "ssh"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 20\n")
        (tmp_path / name).chmod(0o755)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"{command}"):
        asks()
    assert time.monotonic() - began < 10


def test_a_port_that_is_taken_is_not_picked(monkeypatch):
    with socket.socket() as taken, socket.socket() as other:
        for each in (taken, other):
            each.bind(("127.0.0.1", 0))
            each.listen()
        ports = [each.getsockname()[1] for each in (taken, other)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
        drawn = iter(ports)
        monkeypatch.setattr("random.randrange", lambda low, high: next(drawn))
        assert pick_port(Hosts(2)) == ports[2]
        drawn = iter(ports)
        assert pick_port(NODES) == ports[0]  # on another machine nobody can tell


def test_first_host_must_be_reachable_by_the_others(tmp_path):
    path = write_hostfile(tmp_path, "localhost slots=1\nnode02 slots=1\n")
    with pytest.raises(UserError, match="begins with localhost"):
        find_hosts(Launch(hostfile=str(path)))
