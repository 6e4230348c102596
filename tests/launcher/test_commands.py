"""The commands that start a training."""

import os
import shlex
import subprocess
import sys

import pytest
from test_hosts import NODES

from flux2_ds.config.recipe import Launch
from flux2_ds.errors import UserError
from launcher.commands import PREPARE, TRAIN, Command, start_commands
from launcher.hosts import Hosts


def commands(
    launch: Launch, hosts: Hosts, arguments: list[str], node: int | None = None, **environment: str
) -> list[Command]:
    return start_commands(TRAIN, launch, hosts, arguments, node=node, environment=environment)


def test_command_for_this_machine():
    arguments = ["--config", "my recipe.yaml", "--steps=10"]
    (command,) = commands(Launch(), Hosts(4), arguments, OMP_NUM_THREADS="8")
    port = command.argv[command.argv.index("--master_port") + 1]
    assert 20000 <= int(port) < 30000
    assert str(command) == (
        "DS_ACCELERATOR=cuda DEEPSPEED_TIMEOUT=15 deepspeed --log_level critical --num_gpus 4 "
        f"--master_port {port} --no_local_rank --module flux2_ds.train --config 'my recipe.yaml' "
        "--steps=10"
    )
    assert shlex.split(str(command))[2:] == command.argv


@pytest.mark.parametrize("given", ["abc", "0", "1.5"])
def test_a_timeout_of_the_environment_that_is_none_is_refused(given):
    with pytest.raises(UserError, match=f"DEEPSPEED_TIMEOUT is '{given}'"):
        commands(Launch(), Hosts(4), [], DEEPSPEED_TIMEOUT=given)


@pytest.mark.parametrize("given", ["HF_ENDPOINT=https://u:word/w@hub", "HF_HUB_ETAG_TIMEOUT=soon"])
def test_what_the_hubs_client_cannot_read_is_refused_without_its_value(given):
    name, value = given.split("=")
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "--version"], env=os.environ | {name: value},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert name in line and "word" not in line and "soon" not in line


def test_command_names_the_gpus_that_were_chosen():
    (command,) = commands(Launch(), Hosts(2, devices=(2, 3)), [])
    assert command.argv[3:6] == ["--include", "localhost:2,3", "--master_port"]


def test_one_process_prepares_without_deepspeeds_launcher():
    """Which imports torch before anything is said of the data."""
    launch, given = Launch(accelerator="cpu"), {"OMP_NUM_THREADS": "8"}
    (command,) = start_commands(PREPARE, launch, Hosts(1, devices=(3,)), ["-x"], environment=given)
    assert command.argv == ["python", "-m", "flux2_ds.prepare", "-x"]
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "3"
    (command,) = start_commands(PREPARE, launch, Hosts(2), [], environment=given)
    assert command.argv[0] == "deepspeed"


SECRETS = {
    **{"WANDB_API_KEY": "x", "HF_TOKEN": "y", "AWS_ACCESS_KEY_ID": "z", "AWS_SESSION_TOKEN": "z"},
    **{"WANDB_PASSWD": "z", "AWS_CREDENTIALS": "z", "HF_AUTH": "z", "TORCH_password": "z"},
    **{"HF_ENDPOINT": "https://user:p@host", "WANDB_BASE_URL": "https://user:p/w@host/x"},
    **{"AWS_ENDPOINT_URL_S3": "http://host/#token=x", "HF_MIRROR": "https://host/;sig=x"},
    "AWS_ENDPOINT_URL_STS": "http://host?X-Amz-Signature=x",
}


def test_commands_for_a_hostfile_carry_the_environment_but_no_secret(monkeypatch):
    monkeypatch.chdir("/")
    variables = {
        "NCCL_SOCKET_IFNAME": "ib0",
        "NCCL_IB_PKEY": "1",
        "AWS_ENDPOINT_URL": "http://store",
    }
    variables |= {"AWS_SHARED_CREDENTIALS_FILE": "/aws", "HF_HOME": "it's $(here)"}
    arguments = ["--run_dir", "$(touch owned)", "--preview.prompts", '["a $b"]']
    given = {**variables, **SECRETS, "PATH": "/bin"}
    first, second = commands(Launch(), NODES, arguments, **given)
    added = {"DS_ACCELERATOR": "cuda", "DEEPSPEED_TIMEOUT": "15", "FLUX2_DS_SLOTS": "4"}
    assert (second.host, second.environment) == ("node02", variables | added)
    assert (first.host, first.environment["FLUX2_DS_SLOTS"]) == ("node01", "8")
    port = second.argv[second.argv.index("--master_port") + 1]
    where = ["--hostfile", "hostfile", "--no_ssh", "--master_addr", "10.0.0.1", "--node_rank", "1"]
    start = ["deepspeed", "--log_level", "critical", *where, "--master_port", port]
    assert second.argv == [*start, "--no_local_rank", "--module", "flux2_ds.train", *arguments]
    program = second.program()
    assert program[0] == "ssh" and program[-3:-1] == ["--", "node02"]
    # What the shell over there makes of it.
    shown = program[-1].replace("exec env", "printf '%s\\n'")
    words = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True).stdout
    given = [f"{name}={value}" for name, value in second.environment.items()]
    reaper = [sys.executable, "-m", "launcher.reaper", "60"]
    assert words.splitlines()[: len(given) + 4] == [*given, *reaper]
    assert words.splitlines()[-len(arguments) :] == arguments


def test_one_hosts_part_is_started_without_ssh_at_a_port_that_all_know():
    (command,) = commands(Launch(), NODES, [], node=1, MASTER_PORT="29511")
    assert command.host is None and command.environment["FLUX2_DS_SLOTS"] == "4"
    assert command.argv[command.argv.index("--node_rank") + 1] == "1"
    assert command.argv[command.argv.index("--master_port") + 1] == "29511"
    for wrong in ("none", "0", "70000"):
        with pytest.raises(UserError, match=f"MASTER_PORT is '{wrong}'; it must be a port"):
            commands(Launch(), NODES, [], node=1, MASTER_PORT=wrong)


def test_cores_are_shared_out_unless_the_user_did():
    threads = str(max(1, (os.cpu_count() or 1) // 4))
    for environment, expected in (({}, threads), ({"OMP_NUM_THREADS": "3"}, None)):
        (command,) = commands(Launch(accelerator="cpu"), Hosts(4), [], **environment)
        assert command.environment["DS_ACCELERATOR"] == "cpu"
        assert command.environment.get("OMP_NUM_THREADS") == expected
