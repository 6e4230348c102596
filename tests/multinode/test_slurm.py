"""The sbatch script in a real Slurm of one node, on CPU processes. Needs root; `make test-multinode`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SEED
from slurm_machine import Slurm

from flux2_ds.config.parse import load_recipe
from flux2_ds.data.index import read_index
from flux2_ds.run.run_dir import lock_run_dir

pytestmark = pytest.mark.multinode


def submit(slurm: Slurm, work: Path, *options: str) -> str:
    """`flux2-ds slurm --submit`; the job's number."""
    program = str(Path(sys.executable).with_name("flux2-ds"))
    argv = [program, "slurm", "--config", "tiny.yaml", "--submit", "--time", "10", *options]
    done = subprocess.run(
        slurm.inside(argv),
        cwd=work,
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def wait(slurm: Slurm, job: str, fact: str, work: Path, seconds: float = 240) -> None:
    """Until `scontrol show job` says `fact`."""
    deadline = time.monotonic() + seconds
    while fact not in (told := slurm.told("scontrol", "show", "job", job)):
        logs = "".join(path.read_text() for path in work.glob("*.log"))
        assert "JobState=FAILED" not in told, logs
        assert time.monotonic() < deadline, told + logs
        time.sleep(0.5)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    path = run_dir / "metrics.jsonl"
    while not path.is_file() or len(path.read_text().splitlines()) < step:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_preempted_task_of_an_array_requeues_and_continues(slurm, work, reference, losses):
    job = submit(slurm, work, "--array", str(SEED), "--run_dir", "by_slurm")
    run_dir = work / f"by_slurm-{SEED}"
    wait_for_step(run_dir, 5)
    slurm.told("scancel", "--signal=USR1", job)  # as Slurm does before the time limit
    wait(slurm, job, "Restarts=1", work)
    wait(slurm, job, "JobState=COMPLETED", work)
    assert losses(run_dir) == pytest.approx(reference, rel=1e-5)
    log = next(work.glob("by_slurm-*.log")).read_text()
    assert "stopped by SIGUSR1 after step" in log
    assert "continuing after step" in log
    assert "on node01" in (run_dir / "logs" / "rank_1.log").read_text()


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, work):
    job = submit(slurm, work, "--run_dir", "cancelled")
    wait_for_step(work / "cancelled", 2)
    slurm.told("scancel", job)
    wait(slurm, job, "JobState=CANCELLED", work)
    time.sleep(8)  # longer than a requeued job waits for its start
    assert "JobState=CANCELLED" in slurm.told("scontrol", "show", "job", job)
    assert list((work / "cancelled" / "checkpoints").glob("step_*"))


def test_shards_are_prepared_by_a_job(slurm, work):
    job = submit(slurm, work, "--job", "prepare", "--data.shards", "by_job")
    wait(slurm, job, "JobState=COMPLETED", work)
    assert read_index(str(work / "by_job")).samples == read_index(str(work / "shards")).samples
    told = slurm.told("scontrol", "show", "job", job)
    assert "NumCPUs=4" in told and "mem=1000M" in told  # all of the node's


def test_what_asks_for_a_correction_is_not_tried_again(slurm, work):
    """The first process ends with code 2; the other one, which waits for it, is killed: 137."""
    recipe = replace(load_recipe(work / "tiny.yaml"), run_dir=str(work / "in_use"))
    with lock_run_dir(recipe):
        job = submit(slurm, work, "--run_dir", "in_use", "--max-restarts", "1")
        wait(slurm, job, "JobState=FAILED", work, seconds=60)
    told = slurm.told("scontrol", "show", "job", job)
    assert "ExitCode=2:0" in told and "Restarts=0" in told
    assert "another process is training" in next(work.glob("in_use-*.log")).read_text()


def test_a_killed_process_fails_the_job_with_its_name(slurm, work):
    job = submit(slurm, work, "--run_dir", "killed_by_slurm")
    wait_for_step(work / "killed_by_slurm", 2)
    place = json.loads((work / "killed_by_slurm" / "logs" / "rank_1.json").read_text())
    os.kill(place["pid"], 9)
    wait(slurm, job, "JobState=FAILED", work, seconds=60)
    log = next(work.glob("killed_by_slurm-*.log")).read_text()
    assert "error: rank 1 on node01" in log
    assert "it was killed" in log
