"""The commands that start a training."""

import shlex
import subprocess
import sys

import pytest
from test_hosts import NODES

from flux2_ds.config.recipe import Launch
from flux2_ds.errors import UserError
from launcher.commands import Command, train_commands
from launcher.hosts import Hosts


def commands(
    launch: Launch, hosts: Hosts, arguments: list[str], **environment: str
) -> list[Command]:
    return train_commands(launch, hosts, arguments, cores=32, port=29501, environment=environment)


def test_command_for_this_machine():
    arguments = ["--config", "my recipe.yaml", "--steps=10"]
    (command,) = commands(Launch(), Hosts(4), arguments, PATH="/bin")
    assert str(command) == (
        "DS_ACCELERATOR=cuda DEEPSPEED_TIMEOUT=15 OMP_NUM_THREADS=8 deepspeed --log_level critical --num_gpus 4 "
        "--master_port 29501 --no_local_rank --module flux2_ds.train --config 'my recipe.yaml' "
        "--steps=10"
    )
    assert shlex.split(str(command))[3:] == command.argv


@pytest.mark.parametrize("given", ["abc", "0", "1.5"])
def test_a_timeout_of_the_environment_that_is_none_is_refused(given):
    with pytest.raises(UserError, match=f"DEEPSPEED_TIMEOUT is '{given}'"):
        commands(Launch(), Hosts(4), [], DEEPSPEED_TIMEOUT=given)


def test_command_names_the_gpus_that_were_chosen():
    (command,) = commands(Launch(), Hosts(2, devices=(2, 3)), [])
    assert command.argv[3:6] == ["--include", "localhost:2,3", "--master_port"]


def test_commands_for_a_hostfile_carry_the_environment_but_no_secret(monkeypatch):
    monkeypatch.chdir("/")
    variables = {"NCCL_SOCKET_IFNAME": "ib0", "WANDB_API_KEY": "x", "HF_TOKEN": "y", "PATH": "/bin"}
    variables |= {"AWS_ACCESS_KEY_ID": "z", "AWS_SECRET_ACCESS_KEY": "z", "AWS_SESSION_TOKEN": "z"}
    variables |= {"AWS_ENDPOINT_URL": "http://store"}
    first, second = commands(Launch(), NODES, ["--preview.prompts", '["a $b"]'], **variables)
    assert str(second) == (
        "node02$ NCCL_SOCKET_IFNAME=ib0 AWS_ENDPOINT_URL=http://store "
        "DS_ACCELERATOR=cuda DEEPSPEED_TIMEOUT=15 FLUX2_DS_SLOTS=4 "
        "deepspeed --log_level critical --hostfile hostfile --no_ssh --node_rank 1 --master_addr 10.0.0.1 "
        "--master_port 29501 --no_local_rank --module flux2_ds.train --preview.prompts '[\"a $b\"]'"
    )
    assert (first.host, first.environment["FLUX2_DS_SLOTS"]) == ("node01", "8")
    program = second.program()
    assert program[0] == "ssh" and program[-2] == "node02"
    # What the shell over there makes of it.
    shown = program[-1].replace("exec env", "printf '%s\\n'")
    words = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True).stdout
    assert words.splitlines()[-2:] == ["--preview.prompts", '["a $b"]']
    assert [sys.executable, "-m", "launcher.reaper", "60"] == words.splitlines()[5:9]


def test_command_for_pdsh_is_deepspeeds_own():
    (command,) = commands(Launch(over="pdsh", hang_timeout_s=0), NODES, ["-x"])
    assert str(command) == (
        "DS_ACCELERATOR=cuda deepspeed --log_level critical --hostfile hostfile --master_port 29501 "
        "--no_local_rank --module flux2_ds.train -x"
    )


@pytest.mark.parametrize(
    ("cores", "environment", "threads"),
    [(2, {}, "1"), (64, {}, "16"), (64, {"OMP_NUM_THREADS": "3"}, None)],
)
def test_cores_are_shared_out_unless_the_user_did(cores, environment, threads):
    (command,) = train_commands(
        Launch(accelerator="cpu"), Hosts(4), [], cores=cores, port=1, environment=environment
    )
    assert command.environment["DS_ACCELERATOR"] == "cpu"
    assert command.environment.get("OMP_NUM_THREADS") == threads
