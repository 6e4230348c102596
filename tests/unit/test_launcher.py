"""The launcher: hosts, commands, scripts, and that it answers without torch."""

import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deepspeed.launcher.runner import fetch_hostfile
from safetensors.numpy import save_file
from test_spec import write_model

from flux2_ds.data.buckets import Bucket
from flux2_ds.data.index import (
    CONDITIONING_NAME,
    PROMPTS_NAME,
    Index,
    Shard,
    read_index,
    write_index,
)
from flux2_ds.errors import EXIT_STOPPED, UserError
from flux2_ds.parsing import load_recipe, parse_recipe, recipe_parser
from flux2_ds.recipe import Launch
from flux2_ds.rundir import lock_run_dir
from launcher import cli
from launcher.commands import Command, train_commands
from launcher.hosts import Hosts, check_gpus, find_hosts, pick_port, read_hostfile
from launcher.local import Stopper, run
from launcher.slurm import SlurmJob, train_script

RECIPE = """\
run_dir: runs/cats
batch: {global_size: 4, micro_size: 2}
model: {path: models/klein}
data: {images: photos, shards: shards}
launch: {accelerator: cpu, processes: 2}
"""
ROOT = Path(cli.__file__).parents[1]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.yaml").write_text(RECIPE)
    return "cats.yaml"


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


def test_missing_hostfile_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"launch\.hostfile .*absent does not exist"):
        find_hosts(Launch(hostfile=str(tmp_path / "absent")))


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
    with pytest.raises(UserError, match="no GPU is visible"):
        find_hosts(Launch())
    listed = "echo 'GPU 0: H100 (UUID: x)'\necho '  MIG 1g.10gb Device 0: (UUID: y)'\n"
    program.write_text(f"#!/bin/sh\n{listed}{listed}")
    program.chmod(0o755)
    assert find_hosts(Launch()) == Hosts(2)
    check_gpus(Hosts(2))
    check_gpus(Hosts(16, tmp_path / "hostfile"))  # elsewhere
    with pytest.raises(UserError, match=r"3 processes .* shows 2"):
        check_gpus(Hosts(3))


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


# Commands


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


NODES = Hosts(12, Path("hostfile"), slots={"node01": 8, "node02": 4}, address="10.0.0.1")


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
    assert [sys.executable, "-m", "launcher.keeper", "60"] == words.splitlines()[5:9]


def test_command_for_pdsh_is_deepspeeds_own():
    (command,) = commands(Launch(over="pdsh", hang_after=0), NODES, ["-x"])
    assert str(command) == (
        "DS_ACCELERATOR=cuda deepspeed --log_level critical --hostfile hostfile --master_port 29501 "
        "--no_local_rank --module flux2_ds.train -x"
    )


def test_first_host_must_be_reachable_by_the_others(tmp_path):
    path = write_hostfile(tmp_path, "localhost slots=1\nnode02 slots=1\n")
    with pytest.raises(UserError, match="begins with localhost"):
        find_hosts(Launch(hostfile=str(path)))


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


def test_slurm_is_asked_for_what_the_job_needs():
    job = SlurmJob(nodes=2, tasks=8, time_limit="04:00:00", name="cats", partition="gpu")
    lines = train_script(job, "runs/cats", [], python="python").splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")} == {
        *("job-name=cats", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu"),
        *("time=04:00:00", "signal=USR1@120", "output=%x-%j.log", "open-mode=append"),
        *("requeue", "exclusive", "mem=0"),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [("it's mine; rm -rf", "it-s-mine-rm--rf"), ("a_b-1.2", "a_b-1.2"), ("", "flux2-ds")],
)
def test_job_name_is_one_word(name, expected):
    job = SlurmJob(nodes=1, tasks=1, time_limit="1", name=name)
    lines = train_script(job, "", [], python="python").splitlines()
    assert lines[1] == f"#SBATCH --job-name={expected}"


JOB = SlurmJob(nodes=1, tasks=2, time_limit="1", name="x")


def run_job(
    folder: Path, arguments: list[str], cpus: int = 8, job: SlurmJob = JOB, **stand_ins: str
) -> subprocess.CompletedProcess[str]:
    """The script itself, run by bash with stand-ins for Slurm's programs and the trainer."""
    script = train_script(job, "my runs/x", arguments, python=str(folder / "python"))
    defaults = {
        "srun": 'shift; exec "$@"',
        "scontrol": '[ "$1" = show ] && echo node01 || echo "scontrol $*"',
        "scancel": 'echo "scancel $*"',
        "sleep": ":",
    }
    for name, body in (defaults | stand_ins).items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node01", "NTASKS": "2", "CPUS_ON_NODE": str(cpus)}
    slurm |= {"PROCID": "1", "LOCALID": "1", "STEP_ID": "0", "ARRAY_TASK_ID": "5"}
    variables = {f"SLURM_{name}": value for name, value in slurm.items()}
    variables["PATH"] = f"{folder}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-s", "--", "--steps", "a b"],
        input=script,
        env=variables,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("cpus", "threads"), [(8, 4), (1, 1)])
def test_slurm_script_is_bash_and_passes_awkward_arguments_on(tmp_path, cpus, threads):
    arguments = ["--config", "it's mine.yaml", "--preview.prompts", '["a $HOME", "b"]']
    variables = "$RANK $LOCAL_RANK $WORLD_SIZE $OMP_NUM_THREADS $MASTER_ADDR $MASTER_PORT"
    done = run_job(tmp_path, arguments, cpus, python=f'printf "%s\\n" "$@"; echo "{variables}"')
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        *["-m", "flux2_ds.train", *arguments, "--steps", "a b"],
        f"1 1 2 {threads} node01 20007",
    ]
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("code", "said"),
    [(EXIT_STOPPED, "scontrol requeue 7\n"), (1, "scancel --signal=KILL 7.0\n"), (0, "")],
)
def test_slurm_job_requeues_what_was_stopped_and_ends_what_failed(tmp_path, code, said):
    done = run_job(tmp_path, [], python=f"exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


def test_an_arrays_task_is_a_run_of_its_own(tmp_path):
    job = dataclasses.replace(JOB, array="0-7")
    done = run_job(tmp_path, ["--config", "x"], job=job, python='printf "%s\\n" "$@"')
    own = ["--run_dir", "my runs/x-5", "--seed", "5"]
    words = ["-m", "flux2_ds.train", "--config", "x", *own, "--steps", "a b"]
    assert done.stdout.splitlines() == words


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(1, 0, True), (1, 2, False), (2, 0, False), (75, 9, True)]
)
def test_slurm_job_requeues_after_failures_so_many_times(tmp_path, code, restarts, requeued):
    job = dataclasses.replace(JOB, max_restarts=2)
    job = dataclasses.replace(job, environment=(("SLURM_RESTART_COUNT", str(restarts)),))
    done = run_job(tmp_path, [], job=job, python=f"exit {code}")
    assert ("scontrol requeue 7" in done.stdout) == requeued


@pytest.mark.parametrize(("code", "requeued"), [(2, False), (3, True)])
def test_the_first_task_that_fails_decides_the_jobs_code(tmp_path, code, requeued):
    """The other fails when it has lost the first; then both shells are killed, which makes srun's 137."""
    job = dataclasses.replace(JOB, max_restarts=1)
    done = run_job(
        tmp_path,
        [],
        job=job,
        python=f"[ $RANK = 0 ] && exit {code}; until [ -e 0 ]; do /bin/sleep 0.02; done; exit 1",
        sleep="touch $SLURM_PROCID; until [ -e 1 ] && [ -e shells ]; do /bin/sleep 0.02; done",
        scancel="kill -9 $(cat shells)",
        srun="""\
shift
for task in 0 1; do SLURM_PROCID=$task "$@" & shells="$shells $!"; done
echo $shells > shells.part; mv shells.part shells
highest=0
for shell in $shells; do wait $shell; code=$?; [ $code -gt $highest ] && highest=$code; done
echo "srun: $highest"; exit $highest""",
    )
    assert done.stdout == "srun: 137\n" + "scontrol requeue 7\n" * requeued
    assert done.returncode == code


def test_slurms_signal_lets_the_trainer_save(tmp_path):
    """Slurm signals every process of a task, the shell around the trainer included."""
    done = run_job(
        tmp_path,
        [],
        python="trap 'echo saved; exit 75' USR1; touch up; /bin/sleep 9",
        srun='shift; set -m; "$@" & until [ -e up ]; do /bin/sleep 0.02; done; kill -USR1 -- -$!; wait $!',
    )
    assert (done.returncode, done.stdout) == (EXIT_STOPPED, "saved\nscontrol requeue 7\n")


# Running it here


@pytest.fixture
def stopper(tmp_path: Path) -> Stopper:
    """Without its handlers, which are for the whole process."""
    return Stopper(tmp_path / "stop")


def test_exit_code_of_the_command_is_passed_on(stopper):
    ends = Command(["sh", "-c", 'test "$DS_ACCELERATOR" = cuda && exit 75'], {})
    ends = dataclasses.replace(ends, environment={"DS_ACCELERATOR": "cuda"})
    assert run([ends], stopper) == 75
    assert run([Command(["sh", "-c", "kill -9 $$"], {})], stopper) == 128 + 9


def test_the_first_failure_ends_the_other_commands(stopper, monkeypatch):
    monkeypatch.setattr("launcher.local.PATIENCE", 0.5)
    fails, hangs = (Command(["sh", "-c", line], {}) for line in ("exit 3", "sleep 60; sleep 60"))
    assert run([hangs, fails], stopper) == 3
    assert run([hangs], stopper, lambda: True) == 128 + 9


def test_a_host_that_is_not_reached_is_named_even_if_no_other_is(stopper, monkeypatch, capfd):
    monkeypatch.setattr(Command, "program", lambda self: ["sh", "-c", "exit 255"])
    assert run([Command([], {}, "node01")], stopper) == 255
    assert capfd.readouterr().out == "node01 ended first: ssh lost it or did not reach it\n"


def test_a_signal_before_the_start_starts_nothing(stopper, tmp_path):
    stopper.reason = "SIGTERM"
    assert run([Command(["touch", str(tmp_path / "started")], {})], stopper) == EXIT_STOPPED
    assert not (tmp_path / "started").exists()


LAUNCH = """\
import sys
from pathlib import Path
from launcher.commands import Command
from launcher.local import Stopper, run
stop, child = sys.argv[1:]
with Stopper(Path(stop)) as stopper:
    sys.exit(run([Command(["python", "-c", child, stop], {})], stopper))
"""
START = """\
import subprocess, sys, time
from pathlib import Path
stop = Path(sys.argv[1])
print("up, asked to stop:", stop.exists(), flush=True)
"""
OBEYS = f"""{START}
while not (stop.exists() and stop.read_text()):
    time.sleep(0.02)
first = stop.read_text()
stop.unlink()  # as a trainer does with what may be an earlier request
while not (stop.exists() and stop.read_text()):
    time.sleep(0.02)
print("saved because of", first, flush=True)
sys.exit({EXIT_STOPPED})
"""
IGNORES = f"""{START}
subprocess.run(["sleep", "60"])
"""


def launch(stop: Path, child: str, *before: str) -> subprocess.Popen[str]:
    """`run` in a process of its own, with the child up."""
    argv = [*before, sys.executable, "-c", LAUNCH, str(stop), child]
    launched = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert launched.stdout is not None
    assert launched.stdout.readline() == "up, asked to stop: False\n"
    return launched


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_first_signal_asks_the_trainer_to_save_and_stop(tmp_path, name):
    launched = launch(tmp_path / "runs" / "cats" / "stop", OBEYS)
    launched.send_signal(signal.Signals[name])
    out, _ = launched.communicate(timeout=30)
    said, saved = out.splitlines()
    assert said.startswith(f"{name}: after this step")
    assert saved == f"saved because of {name}"
    assert launched.returncode == EXIT_STOPPED
    assert not (tmp_path / "runs" / "cats" / "stop").exists()  # the next start does not stop


def test_second_signal_ends_everything_at_once(tmp_path):
    stop = tmp_path / "stop"
    stop.write_text("an earlier run's")
    launched = launch(stop, IGNORES)
    launched.send_signal(signal.SIGTERM)
    assert launched.stdout.readline().startswith("SIGTERM: after this step")
    launched.send_signal(signal.SIGINT)
    # Ends only when the grandchild, which has the same output, is gone too.
    out, _ = launched.communicate(timeout=30)
    assert out == "SIGINT again: ending at once, without a checkpoint\n"
    assert launched.returncode == 128 + 9


def test_nothing_is_left_when_the_launcher_is_killed(tmp_path):
    launched = launch(tmp_path / "stop", IGNORES)
    launched.kill()
    launched.communicate(
        timeout=30
    )  # ends only when the grandchild, which has the same output, does


def test_a_keeper_ends_its_command_when_its_launcher_is_silent():
    argv = [sys.executable, "-m", "launcher.keeper", "0.5", "sleep", "60"]
    keeper = subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=ROOT)
    assert keeper.wait(timeout=30) == 128 + 9
    assert keeper.stdin is not None
    keeper.stdin.close()


def test_a_full_disk_does_not_keep_the_launcher_from_asking(stopper, monkeypatch, capfd):
    def full(path: Path, text: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    stopper.reason = "SIGINT"
    stopper.pass_on()
    assert (tmp := Path(stopper._file)).exists() and tmp.read_text() == ""


def test_nohup_is_respected(tmp_path):
    launched = launch(tmp_path / "stop", OBEYS, "nohup")
    launched.send_signal(signal.SIGHUP)
    launched.send_signal(signal.SIGTERM)
    out, _ = launched.communicate(timeout=30)
    assert "saved because of SIGTERM" in out


# The command line


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0)])
def test_usage_lists_the_commands(monkeypatch, capsys, argv, code):
    assert call(monkeypatch, *argv) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("usage: flux2-ds COMMAND")
    for command in ("prepare", "plan", "train", "slurm", "export", "sample", "tiny"):
        assert f"\n  {command} " in captured.out


def test_unknown_command_is_named(monkeypatch, capsys):
    assert call(monkeypatch, "trian", "--config", "x") == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_dry_run_prints_the_command_that_would_run(recipe):
    """As installed, in a process of its own."""
    program = Path(sys.executable).with_name("flux2-ds")
    arguments = [
        *["--config", recipe, "--objective.mean", "-1"],
        *["--preview.prompts", '["a cat", "b"]', "--steps=9"],
    ]
    argv = [program, "train", "--dry-run", *arguments[:2], "--gpus", "1", *arguments[2:]]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *plan, command = done.stdout.splitlines()
    assert "4 global = 2 micro × 2 accumulation × 1 processes" in "\n".join(plan)
    words = shlex.split(command)
    assert "DS_ACCELERATOR=cpu" in words
    deepspeed = words[words.index("deepspeed") :]
    assert deepspeed[:5] == ["deepspeed", "--log_level", "critical", "--num_gpus", "1"]
    # The recipe's arguments, in order, without the launcher's own.
    assert deepspeed[deepspeed.index("flux2_ds.train") + 1 :] == arguments
    parsed, _ = parse_recipe(recipe_parser("train", ""), arguments)
    assert (parsed.steps, parsed.objective.mean, parsed.preview.prompts) == (9, -1, ["a cat", "b"])


def test_gpus_may_be_written_with_an_equals_sign(recipe, monkeypatch, capsys):
    assert call(monkeypatch, "train", "--config", recipe, "--gpus=1", "--dry-run") == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.endswith(f"--module flux2_ds.train --config {recipe}")


@pytest.mark.parametrize("arguments", [["--dry"], ["--gpu", "1", "--dry-run"]])
def test_abbreviated_option_is_refused(recipe, monkeypatch, capsys, arguments):
    assert call(monkeypatch, "train", "--config", recipe, *arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def prepare(folder: Path) -> None:
    """An index of one shard, as far as the launcher reads it."""
    (folder / "shards").mkdir()
    (folder / "shards" / "x.tar").write_bytes(b"12345")
    (folder / "shards" / CONDITIONING_NAME).touch()
    shard = Shard("x.tar", Bucket(32, 32), 3, 5, "")
    write_index(folder / "shards", Index("klein", 8, {}, {}, [shard]))


def other_run(folder: Path) -> None:
    (folder / "runs" / "cats").mkdir(parents=True)
    (folder / "runs" / "cats" / "thesis.tex").touch()


def other_model(folder: Path) -> None:
    (folder / "models" / "klein").mkdir(parents=True)
    (folder / "models" / "klein" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')


def distilled_model(folder: Path) -> None:
    (folder / "models" / "klein").mkdir(parents=True)
    write_model(folder / "models" / "klein", "klein", {"is_distilled": True})


def other_settings(folder: Path) -> None:
    index = dataclasses.replace(read_index(folder / "shards"), settings={"resolution": 512})
    write_index(folder / "shards", index)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: None, None),
        (other_settings, "data.resolution is 1024, but data.shards shards were prepared with 512"),
        (distilled_model, "models/klein is step-distilled"),
        (other_run, "is not a run of flux2-ds"),
        (lambda folder: (folder / "shards" / "x.tar").unlink(), "x.tar is missing"),
        (lambda folder: (folder / "shards" / "index.json").unlink(), "flux2-ds prepare"),
        (other_model, "holds a FluxPipeline"),
    ],
)
def test_train_checks_what_it_reads_before_it_starts(
    recipe, tmp_path, monkeypatch, capsys, spoil, message
):
    prepare(tmp_path)
    spoil(tmp_path)
    started = []
    monkeypatch.setattr("launcher.supervise.run", lambda *call: started.append(call) or 75)
    assert call(monkeypatch, "train", "--config", recipe) == (75 if message is None else 2)
    assert len(started) == (message is None)
    captured = capsys.readouterr()
    if message is None:
        (command,), *_ = started[0]
        assert captured.out == f"{command}\n"
    else:
        assert message in captured.err
        assert call(monkeypatch, "train", "--config", recipe, "--dry-run") == 0
        refused = bool(
            list(tmp_path.glob("shards/index.json"))
        )  # or there is nothing to look at yet
        assert call(monkeypatch, "plan", "--config", recipe) == 2 * refused
        captured = capsys.readouterr()
        assert (message in captured.err) == refused


@pytest.mark.parametrize("command", ["train", "plan"])
def test_keys_that_deepspeed_does_not_know_are_refused(
    recipe, tmp_path, monkeypatch, capsys, command
):
    """Of a config of the user's own, which no shipped one is."""
    prepare(tmp_path)
    monkeypatch.setattr("launcher.supervise.run", lambda *call: 75)
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2, "typo": 1}}')
    argv = [command, "--config", recipe, "--deepspeed"]
    assert call(monkeypatch, *argv, str(tmp_path / "mine.json")) == 2
    assert "typo: Extra inputs are not permitted" in capsys.readouterr().err
    known = call(monkeypatch, *argv, "{zero_optimization: {stage: 2, overlap_comm: false}}")
    assert known == (75 if command == "train" else 0)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_previews_of_prompts_that_nobody_encoded_are_refused(
    recipe, tmp_path, monkeypatch, capsys, command
):
    prepare(tmp_path)
    monkeypatch.setattr("launcher.supervise.run", lambda *call: 75)
    argv = [command, "--config", recipe, "--preview.prompts=[a cat]", "--preview.every"]
    assert call(monkeypatch, *argv, "5") == 2
    assert "prompts.safetensors has no prompt 'a cat'" in capsys.readouterr().err
    assert call(monkeypatch, *argv, "null") == (75 if command == "train" else 0)
    save_file({"a cat": np.zeros(2)}, tmp_path / "shards" / PROMPTS_NAME, {"format": "np"})
    assert call(monkeypatch, *argv, "5") == (75 if command == "train" else 0)


def test_a_run_directory_in_use_is_refused(recipe, tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    monkeypatch.setattr("launcher.supervise.run", lambda *call: 75)
    for name in (".lock", ".launcher.lock"):  # the trainer's, and another launcher's
        with lock_run_dir(load_recipe(tmp_path / recipe), name):
            assert call(monkeypatch, "train", "--config", recipe) == 2
        assert "another process is training in run_dir runs/cats" in capsys.readouterr().err
    assert call(monkeypatch, "train", "--config", recipe) == 75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--node-rank", "2"], "--node-rank is 2; launch.hostfile hostfile has the hosts 0 to 1"),
        (["--node-rank", "0", "--max-restarts", "1"], "nor --max-restarts"),
        (["--node-rank", "0", "--launch.over", "pdsh"], "neither launch.over: pdsh"),
    ],
)
def test_a_part_that_cannot_be_started_is_refused(recipe, monkeypatch, capsys, options, message):
    Path("hostfile").write_text("node01 slots=1\nnode02 slots=1\n")
    hosts = ["--launch.hostfile", "hostfile", "--launch.processes", "null"]
    assert call(monkeypatch, "train", "--config", recipe, *hosts, *options) == 2
    assert message in capsys.readouterr().err


def test_each_host_starts_its_own_part(recipe, tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    Path("hostfile").write_text("node01 slots=1\nnode02 slots=1\n")
    hosts = ["--launch.hostfile", "hostfile", "--launch.processes", "null"]
    started = []
    monkeypatch.setattr(
        "launcher.supervise.run", lambda commands, *call: started.append(commands) or 75
    )
    monkeypatch.setenv("MASTER_PORT", "29511")
    # The first host's launcher holds the run directory.
    with lock_run_dir(load_recipe(tmp_path / recipe), ".launcher.lock"):
        argv = ["train", "--config", recipe, *hosts, "--node-rank"]
        assert call(monkeypatch, *argv, "0") == 2
        assert call(monkeypatch, *argv, "1") == 75
        for wrong in ("none", "0", "70000"):
            monkeypatch.setenv("MASTER_PORT", wrong)
            assert call(monkeypatch, *argv, "1") == 2
            assert f"MASTER_PORT is '{wrong}'; it must be a port" in capsys.readouterr().err
    ((command,),) = started
    assert command.host is None and command.environment["FLUX2_DS_SLOTS"] == "1"
    where = ["--node_rank", "1", "--master_addr", "node01", "--master_port", "29511"]
    assert command.argv[command.argv.index("--no_ssh") + 1 :][:6] == where


def test_more_processes_than_gpus_do_not_start(recipe, tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(cli, "supervise", lambda *call: pytest.fail("started"))
    argv = ["--config", recipe, *CUDA]
    assert call(monkeypatch, "train", *argv) == 2
    assert "2 processes (launch.processes or --gpus) need as many GPUs" in capsys.readouterr().err
    # To look at a plan for another machine is fine.
    assert call(monkeypatch, "train", *argv, "--dry-run") == 0
    assert call(monkeypatch, "plan", *argv) == 0


def test_bench_starts_as_train_does(recipe, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(cli, "run", lambda commands, stopper: started.append(commands) or 247)
    argv = ["bench", "--config", recipe, "--measure", "5", "--json"]
    assert call(monkeypatch, *argv, "--gpus", "2") == 247
    ((command,),) = started
    assert command.argv[3:5] == ["--num_gpus", "2"]
    end = ["--no_local_rank", "--module", "flux2_ds.bench", *argv[1:]]
    assert command.argv[-len(end) :] == end
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(command) in captured.err and "a process was killed" in captured.err
    monkeypatch.setattr("os.execve", lambda program, argv, environment: started.append(argv))
    monkeypatch.setattr(cli, "commands_here", lambda *call, **more: pytest.fail("launched"))
    with pytest.raises(pytest.fail.Exception):  # one process takes the launcher's place
        call(monkeypatch, *argv, "--launch.processes", "1")
    assert started[1][1:3] == ["-m", "flux2_ds.bench"]
    write_hostfile(tmp_path, "node01 slots=2\n")
    elsewhere = ["--launch.hostfile", "hostfile", "--launch.processes", "null"]
    assert call(monkeypatch, *argv, *elsewhere) == 2
    assert "launch.hostfile is hostfile, and bench times this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepared", "words"), [(True, "3 samples, 1 steps an epoch"), (False, "is not prepared yet")]
)
def test_plan_prints_the_arithmetic(recipe, tmp_path, monkeypatch, capsys, prepared, words):
    if prepared:
        prepare(tmp_path)
    assert call(monkeypatch, "plan", "--config", recipe) == 0
    out = capsys.readouterr().out
    assert "4 global = 2 micro × 1 accumulation × 2 processes" in out
    assert words in out


SLURM = ["--nodes", "2", "--gpus-per-node=1", "--time", "1:00:00", "--account", "lab"]
CUDA = ["--launch.accelerator", "cuda"]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("plan", ["--gpus=3"], "batch.global_size 4 "),
        ("plan", ["--gpus=0"], "launch.processes is 0|number of processes is 0"),
        ("plan", ["--gpus=-2"], "launch.processes is -2|number of processes is -2"),
        ("plan", ["--host=64GiB"], "--host is 64GiB, but only beside --gpu"),
        ("bench", ["--against=bare"], "--against bare .* Add --launch.processes 1"),
        (
            "bench",
            ["--gpus=1", "--against=bare"],
            "--against bare is plain torch.* deepspeed: zero0",
        ),
        ("bench", ["--width=100"], "--width 100 and --height 1024 must be multiples of 16"),
        ("bench", ["--gpus=3"], "batch.global_size 4 "),
        ("bench", CUDA, "2 processes .* this machine shows 0"),
        ("slurm", [*CUDA, "--nodes=0"], "--nodes must be at least 1"),
        ("slurm", ["--gpus-per-node=0"], "--gpus-per-node must be at least 1"),
        (
            "slurm",
            ["--launch.hostfile=h"],
            "hostfile is h, and Slurm chooses the hosts. Add --launch",
        ),
        ("slurm", ["--gpus-per-node=2"], "--gpus-per-node is 2, but launch.accelerator is cpu"),
        *(
            ("slurm", ["--job=prepare", f"{option}=1"], f"{option} is of a training")
            for option in ("--array", "--max-restarts", "--save-before")
        ),
        ("slurm", [*SLURM, *CUDA, "--submit"], "data.shards shards has no index.json"),
    ],
)
def test_what_cannot_run_ends_with_one_message(
    recipe, tmp_path, monkeypatch, capsys, command, options, message
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call(monkeypatch, command, "--config", recipe, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(f"error: .*({message})", captured.err)
    assert captured.err.count("\n") == 1


def test_slurm_prints_a_script_with_the_recipes_arguments(recipe, monkeypatch, capsys):
    assert call(monkeypatch, "slurm", "--config", recipe, *SLURM, *CUDA, "--steps", "5") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=cats\n#SBATCH --nodes=2\n" in script
    assert "#SBATCH --account=lab" in script
    assert f"-m flux2_ds.train --config {recipe} --launch.accelerator cuda --steps 5 " in script


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ([], 2),
        (["--gpus-per-node=1"], 1),
        (["--launch.processes=null", "--batch.global_size=16"], 8),
        (["--job=prepare"], 2),
        (["--job=prepare", "--prepare.processes=4"], 4),
    ],
)
def test_gpus_of_a_node_are_those_that_the_recipe_names(recipe, monkeypatch, capsys, options, gpus):
    assert call(monkeypatch, "slurm", "--config", recipe, *CUDA, *options) == 0
    assert f"#SBATCH --gpus-per-node={gpus}\n" in capsys.readouterr().out


def test_a_command_takes_the_launchers_place(tmp_path):
    """What signals the launcher signals the command, and its exit code is the launcher's."""
    (tmp_path / "told.py").write_text(
        "import os, sys\nprint(os.getpid(), *sys.argv[1:], os.environ['TOLD'], flush=True)\n"
        "sys.exit(3)"
    )
    call = (
        "from launcher.cli import run_module; print('first')\nrun_module('told', ['a b'], TOLD='x')"
    )
    launched = subprocess.Popen(
        [sys.executable, "-c", call],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )
    out, _ = launched.communicate(timeout=30)
    assert out == f"first\n{launched.pid} a b x\n"
    assert launched.returncode == 3


def test_script_is_handed_to_sbatch(recipe, tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = ["slurm", "--config", recipe, *SLURM, *CUDA, "--submit"]
    assert call(monkeypatch, *argv) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err
    (tmp_path / "sbatch").write_text("#!/bin/sh\n/bin/cat > submitted; exit 3\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert call(monkeypatch, *argv) == 3
    assert "#SBATCH --job-name=cats" in (tmp_path / "submitted").read_text()


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
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "deepspeed --log_level critical --num_gpus 2" in done.stdout
