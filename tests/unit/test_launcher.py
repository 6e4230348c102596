"""The launcher: hosts, commands, scripts, and that it answers without torch."""

import ast
import dataclasses
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import flux2_ds
from flux2_ds.errors import UserError
from flux2_ds.recipe import Launch, parse_recipe, recipe_parser
from launcher import cli
from launcher.commands import train_command
from launcher.hosts import Hosts, find_hosts, free_port, read_hostfile
from launcher.local import run
from launcher.slurm import EXIT_STOPPED, SlurmJob, slurm_script

RECIPE = """\
run_dir: runs/cats
batch: {global_size: 4, micro_size: 2}
model: {path: models/klein}
data: {images: photos, shards: shards}
launch: {accelerator: cpu, processes: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.yaml").write_text(RECIPE)
    return "cats.yaml"


def flux2_ds_command(*argv: str) -> subprocess.CompletedProcess[str]:
    """`flux2-ds`, as installed, in a process of its own."""
    program = Path(sys.executable).with_name("flux2-ds")
    return subprocess.run([program, *argv], capture_output=True, text=True, check=False)


def call(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """`flux2-ds` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["flux2-ds", *argv])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# Hosts


def write_hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_hostfile(tmp_path):
    text = "# two machines\nnode01 slots=8\n\n  node02.cluster   slots = 4  # smaller\n"
    path = write_hostfile(tmp_path, text)
    assert read_hostfile(path) == {"node01": 8, "node02.cluster": 4}
    assert find_hosts(Launch(hostfile=str(path))) == Hosts(12, path)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("node02", 2),
        ("node02 slots=many", 2),
        ("node02 slots=0", 2),
        ("node02 slots=-1", 2),
        ("node01 slots=8", 2),
        ("node02 slots=8 extra", 2),
        ("slots=8", 2),
        ("\n\nnode02:8", 4),
    ],
)
def test_malformed_hostfile_is_refused_by_line(tmp_path, line, number):
    path = write_hostfile(tmp_path, f"node01 slots=8\n{line}\n")
    with pytest.raises(UserError, match=f"line {number}: "):
        read_hostfile(path)


@pytest.mark.parametrize("text", ["", "# nobody\n\n"])
def test_empty_hostfile_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="lists no host"):
        read_hostfile(write_hostfile(tmp_path, text))


def test_missing_hostfile_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"launch\.hostfile .*absent does not exist"):
        find_hosts(Launch(hostfile=str(tmp_path / "absent")))


@pytest.mark.parametrize(("visible", "processes"), [("0", 1), ("2,3", 2), ("0,1,2,3,", 4)])
def test_visible_gpus_are_counted(monkeypatch, visible, processes):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_hosts(Launch()) == Hosts(processes)


@pytest.mark.parametrize("listed", [0, 3])
def test_without_the_variable_nvidia_smi_is_asked(tmp_path, monkeypatch, listed):
    program = tmp_path / "nvidia-smi"
    lines = "".join(f"echo 'GPU {n}: H100 (UUID: x)'\n" for n in range(listed))
    program.write_text(f"#!/bin/sh\n{lines}echo '  MIG 1g.10gb Device 0: (UUID: y)'\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if listed:
        assert find_hosts(Launch()) == Hosts(listed)
    else:
        with pytest.raises(UserError, match="no GPU is visible"):
            find_hosts(Launch())


def test_no_gpu_is_said_but_not_for_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="no GPU is visible"):
        find_hosts(Launch())
    assert find_hosts(Launch(accelerator="cpu")) == Hosts(1)
    assert find_hosts(Launch(processes=4)) == Hosts(4)


def test_free_port_is_free():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        preferred = taken.getsockname()[1]
        port = free_port(preferred)
        assert port != preferred
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_free_port_is_the_preferred_one_if_it_can_be():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        preferred = probe.getsockname()[1]
    assert free_port(preferred) == preferred


# Commands


def test_command_for_this_machine():
    arguments = ["--config", "my recipe.yaml", "--steps=10"]
    command = train_command(
        Launch(), Hosts(4), arguments, cores=32, port=29501, environment={"PATH": "/bin"}
    )
    assert command.environment == {"DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "8"}
    assert str(command) == (
        "DS_ACCELERATOR=cuda OMP_NUM_THREADS=8 deepspeed --num_gpus 4 --master_port 29501 "
        "--no_local_rank --module flux2_ds.train --config 'my recipe.yaml' --steps=10"
    )
    assert shlex.split(str(command))[2:] == command.argv


def test_command_for_a_hostfile(tmp_path):
    launch = Launch(hostfile="hostfile")
    command = train_command(
        launch, Hosts(16, Path("hostfile")), [], cores=32, port=29500, environment={}
    )
    assert command.argv[:3] == ["deepspeed", "--hostfile", "hostfile"]
    assert "--num_gpus" not in command.argv


@pytest.mark.parametrize(
    ("cores", "environment", "threads"),
    [(2, {}, "1"), (64, {}, "16"), (64, {"OMP_NUM_THREADS": "3"}, None)],
)
def test_cores_are_shared_out_unless_the_user_did(cores, environment, threads):
    command = train_command(
        Launch(accelerator="cpu"), Hosts(4), [], cores=cores, port=1, environment=environment
    )
    assert command.environment["DS_ACCELERATOR"] == "cpu"
    assert command.environment.get("OMP_NUM_THREADS") == threads


SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=cats
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --exclusive

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port that two jobs on one node are unlikely to share.
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS DS_ACCELERATOR=cuda
export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE / 8))

srun --kill-on-bad-exit=0 bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec \
python -m flux2_ds.train --config cats.yaml'
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
""".replace("exec \\\n", "exec ")


def test_slurm_script():
    job = SlurmJob(nodes=2, gpus_per_node=8, time_limit="04:00:00", name="cats", partition="gpu")
    assert slurm_script(job, ["--config", "cats.yaml"], python="python") == SCRIPT


def test_slurm_script_is_bash_and_passes_awkward_arguments_on(tmp_path):
    """The script itself, with stand-ins for Slurm's programs, run by bash."""
    arguments = ["--config", "it's mine.yaml", "--preview.prompts", '["a $HOME", "b"]']
    job = SlurmJob(nodes=1, gpus_per_node=2, time_limit="1", name="x")
    script = slurm_script(job, arguments, python=str(tmp_path / "python"))
    stand_ins = {
        "python": 'printf "%s\\n" "$@"; echo "$RANK $LOCAL_RANK $WORLD_SIZE $OMP_NUM_THREADS"; exit 75',
        "srun": 'shift; exec "$@"',
        "scontrol": '[ "$1" = show ] && echo node01 || echo "scontrol $*"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node01", "NTASKS": "2", "CPUS_ON_NODE": "8"}
    variables = {f"SLURM_{name}": value for name, value in slurm.items()}
    variables |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash"], input=script, env=variables, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        *["-m", "flux2_ds.train", *arguments],
        "1 1 2 4",
        "scontrol requeue 7",
    ]
    assert done.returncode == 75


def test_exit_code_of_a_stopped_run_is_the_trainers():
    # Read, not imported: the trainer imports torch and DeepSpeed.
    source = Path(flux2_ds.__file__).with_name("train.py").read_text()
    values = {
        node.targets[0].id: node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert values["EXIT_STOPPED"] == EXIT_STOPPED


def test_exit_code_of_the_command_is_passed_on(monkeypatch):
    # `run` installs handlers for the whole process.
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    command = train_command(Launch(), Hosts(1), [], cores=1, port=1, environment={})
    ends = dataclasses.replace(
        command, argv=["sh", "-c", 'test "$DS_ACCELERATOR" = cuda && exit 75']
    )
    assert run(ends) == 75
    killed = dataclasses.replace(command, argv=["sh", "-c", "kill -9 $$"])
    assert run(killed) == 128 + 9


# The command line


def test_no_command_prints_the_usage():
    done = flux2_ds_command()
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("usage: flux2-ds COMMAND")


def test_help_is_no_error(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    listed = capsys.readouterr().out
    for command in ("prepare", "plan", "train", "slurm", "export", "sample", "tiny"):
        assert f"\n  {command} " in listed


def test_unknown_command_is_named(monkeypatch, capsys):
    assert call(monkeypatch, "trian", "--config", "x") == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_dry_run_prints_the_command_that_would_run(recipe):
    done = flux2_ds_command(
        *["train", "--dry-run", "--config", recipe, "--gpus", "1"],
        *["--objective.mean", "-1", "--preview.prompts", '["a cat", "b"]', "--steps=9"],
    )
    assert (done.returncode, done.stderr) == (0, "")
    *plan, command = done.stdout.splitlines()
    assert "4 global = 2 micro × 2 accumulation × 1 processes" in "\n".join(plan)
    words = shlex.split(command)
    assert "DS_ACCELERATOR=cpu" in words
    deepspeed = words[words.index("deepspeed") :]
    assert deepspeed[:3] == ["deepspeed", "--num_gpus", "1"]
    # The recipe's arguments, in order, without the launcher's own.
    arguments = deepspeed[deepspeed.index("flux2_ds.train") + 1 :]
    assert arguments == [
        *["--config", recipe, "--objective.mean", "-1"],
        *["--preview.prompts", '["a cat", "b"]', "--steps=9"],
    ]
    parsed, _ = parse_recipe(recipe_parser("train", ""), arguments)
    assert (parsed.steps, parsed.objective.mean, parsed.preview.prompts) == (9, -1, ["a cat", "b"])


@pytest.mark.parametrize("arguments", [["--gpus=1"], ["--gpus", "1"]])
def test_gpus_may_be_written_both_ways(recipe, monkeypatch, capsys, arguments):
    assert call(monkeypatch, "train", "--config", recipe, *arguments, "--dry-run") == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.endswith(f"--module flux2_ds.train --config {recipe}")


@pytest.mark.xfail(strict=True, reason="abbreviations are understood but handed to the trainer")
@pytest.mark.parametrize("arguments", [["--dry"], ["--gpu", "1", "--dry-run"]])
def test_abbreviated_option_is_refused_or_not_passed_on(recipe, monkeypatch, capsys, arguments):
    if call(monkeypatch, "train", "--config", recipe, *arguments) != 2:
        command = capsys.readouterr().out.splitlines()[-1]
        assert command.endswith(f"--module flux2_ds.train --config {recipe}")


def test_plan_prints_the_arithmetic(recipe, monkeypatch, capsys):
    assert call(monkeypatch, "plan", "--config", recipe) == 0
    out = capsys.readouterr().out
    assert "4 global = 2 micro × 1 accumulation × 2 processes" in out
    assert "shards is not prepared yet" in out


def test_plan_of_a_wrong_batch_ends_with_one_message(recipe, monkeypatch, capsys):
    assert call(monkeypatch, "plan", "--config", recipe, "--gpus=3") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: batch.global_size 4 ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "gpus",
    [pytest.param(n, marks=pytest.mark.xfail(strict=True, reason="not checked")) for n in (0, -2)],
)
def test_gpus_below_one_are_refused(recipe, monkeypatch, capsys, gpus):
    assert call(monkeypatch, "plan", "--config", recipe, f"--gpus={gpus}") == 2


def test_slurm_prints_a_script_with_the_recipes_arguments(recipe, monkeypatch, capsys):
    options = ["--nodes", "2", "--gpus-per-node=1", "--time", "1:00:00", "--account", "lab"]
    assert call(monkeypatch, "slurm", "--config", recipe, *options, "--steps", "5") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=cats\n#SBATCH --nodes=2\n" in script
    assert "#SBATCH --account=lab" in script
    assert f"-m flux2_ds.train --config {recipe} --steps 5'" in script


def test_submitting_without_slurm_is_said(recipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["--config", recipe, "--nodes=1", "--gpus-per-node=2", "--submit"]
    assert call(monkeypatch, "slurm", *arguments) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err


def test_launcher_answers_without_torch(recipe):
    heavy = ["torch", "deepspeed", "diffusers", "transformers", "wandb", "matplotlib"]
    program = (
        "import sys\nfrom launcher import cli\n"
        f"sys.argv = ['flux2-ds', 'train', '--dry-run', '--config', {recipe!r}]\n"
        f"cli.main()\nprint([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "deepspeed --num_gpus 2" in done.stdout
