"""sbatch scripts, run by a shell."""

import argparse
import dataclasses
import subprocess
from pathlib import Path

import pytest

from flux2_ds.config.recipe import Data, Model, Recipe
from flux2_ds.errors import EXIT_STOPPED, UserError
from launcher.slurm import SlurmJob, add_options, batch_script, slurm_job

JOB = SlurmJob(
    module="flux2_ds.train",
    place="my runs/x",
    name="x",
    nodes=1,
    tasks=2,
    time_limit="1",
    save_before=120,
)


def test_slurm_is_asked_for_what_the_job_needs():
    job = dataclasses.replace(
        JOB, nodes=2, tasks=8, time_limit="04:00:00", name="cats", partition="gpu"
    )
    lines = batch_script(job, [], python="python").splitlines()
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
    lines = batch_script(dataclasses.replace(JOB, name=name), [], python="python").splitlines()
    assert lines[1] == f"#SBATCH --job-name={expected}"


@pytest.mark.parametrize("option", ["time", "partition", "account", "array"])
@pytest.mark.parametrize("value", ["x\n#SBATCH --uid=0", "1 --wrap=x", "$(x)", ""])
def test_what_would_be_more_than_one_word_for_slurm_is_refused(option, value):
    parser = argparse.ArgumentParser()
    add_options(parser)
    recipe = Recipe(run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s"))
    with pytest.raises(UserError, match=f"--{option} is "):
        slurm_job(recipe, parser.parse_args([f"--{option}={value}"]), {})


def run_job(
    folder: Path,
    arguments: list[str],
    cpus: int = 8,
    job: SlurmJob = JOB,
    **stand_ins: str,
) -> subprocess.CompletedProcess[str]:
    """The script itself, run by bash with stand-ins for Slurm's programs and the trainer."""
    script = batch_script(job, arguments, python=str(folder / "python"))
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


@pytest.mark.parametrize("run_dir", ["$(touch owned)", "it's; touch owned", "-rf", "a\nb", "`x`"])
def test_a_run_directorys_name_is_no_command(tmp_path, run_dir):
    job = dataclasses.replace(JOB, array="5", place=run_dir)
    done = run_job(tmp_path, [], job=job, python='printf "%s\\0" "$@"; exit 1')
    own = ["--run_dir", f"{run_dir}-5", "--seed", "5"]
    assert done.stdout.split("\0")[:-1] == ["-m", "flux2_ds.train", *own, "--steps", "a b"]
    assert done.stderr == ""
    assert not (tmp_path / "owned").exists()
    assert (tmp_path / f"{run_dir}-5" / "logs" / "slurm-7.0").read_text() == "1\n"


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


def test_a_job_that_prepares_runs_the_same_script(tmp_path):
    parser = argparse.ArgumentParser()
    add_options(parser)
    data = Data(images="i", shards=str(tmp_path / "shards"))
    recipe = Recipe(run_dir="runs/cats", model=Model(path="m"), data=data)
    job = slurm_job(recipe, parser.parse_args(["--job=prepare", "--gpus-per-node=2"]), {})
    done = run_job(tmp_path, ["--config", "x"], job=job, python='echo "$RANK: $@"; exit 3')
    assert done.stdout.startswith("1: -m flux2_ds.prepare --config x --steps a b\nscancel")
    assert (tmp_path / "shards" / "logs" / "slurm-7.0").read_text() == "3\n"
    script = batch_script(job, [], python="python")
    assert (
        "#SBATCH --job-name=cats-prepare\n" in script and "--signal" not in script.split("srun")[0]
    )
