"""`flux2-ds prepare` over hosts and in a Slurm job: what every machine is started with."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from flux2_ds.config.recipe import Data, Launch, Model, Prepare, Recipe
from launcher.preparing import prepare_commands
from launcher.slurm import SlurmJob, prepare_script

ROOT = Path(__file__).parents[2]


def recipe_over(tmp_path: Path, processes: int | None = None, **launch: object) -> Recipe:
    (tmp_path / "hostfile").write_text("node01 slots=8\nnode02 slots=4\n")
    return Recipe(
        run_dir="runs/cats",
        model=Model(path="model"),
        data=Data(images="photos", shards="shards"),
        prepare=Prepare(processes=processes),
        launch=Launch(hostfile=str(tmp_path / "hostfile"), **launch),  # type: ignore[arg-type]
    )


def test_every_host_knows_its_place_and_its_processes(tmp_path):
    environment = {"HF_HOME": "/hub", "HF_TOKEN": "secret", "HOME": "/root"}
    recipe = recipe_over(tmp_path)
    first, second = prepare_commands(recipe, ["--config", "r.yaml"], environment, start="ab")
    assert (first.host, second.host) == ("node01", "node02")
    common = {"HF_HOME": "/hub", "FLUX2_DS_NODES": "2", "FLUX2_DS_START": "ab"}
    assert first.environment == common | {"FLUX2_DS_NODE": "0", "FLUX2_DS_SLOTS": "8"}
    assert second.environment == common | {"FLUX2_DS_NODE": "1", "FLUX2_DS_SLOTS": "4"}
    assert first.argv[1:] == ["-m", "flux2_ds.prepare", "--config", "r.yaml",
                              "--prepare.processes=8"]  # fmt: skip
    assert first.program()[0] == "ssh" and sys.executable in first.program()[-1]
    told = prepare_commands(recipe_over(tmp_path, processes=2), [], {}, start="ab")
    assert all("--prepare.processes" not in " ".join(each.argv) for each in told)


def test_a_slurm_job_starts_one_task_a_node(tmp_path):
    job = SlurmJob(nodes=2, tasks=8, time_limit="04:00:00", name="cats")
    told = tmp_path / "python"
    told.write_text('#!/bin/sh\necho "$FLUX2_DS_NODE of $FLUX2_DS_NODES in $FLUX2_DS_START: $@"\n')
    srun = tmp_path / "srun"
    srun.write_text(
        '#!/bin/sh\n[ "$1" = --kill-on-bad-exit=1 ] && shift\n'
        'for node in 0 1; do SLURM_NODEID=$node "$@"; done\n'
    )
    for program in (told, srun):
        program.chmod(0o755)
    script = prepare_script(job, ["--config", "a b"], python=str(told))
    assert "#SBATCH --job-name=cats-prepare\n#SBATCH --nodes=2\n" in script
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=8\n" in script
    assert "#SBATCH --exclusive\n" in script
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "17", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    out = subprocess.run(["bash", "-s", "--", "--more"], input=script, env=slurm, text=True,
                         capture_output=True, check=True).stdout  # fmt: skip
    common = "of 2 in 17.0: -m flux2_ds.prepare --config a b --more"
    assert out.splitlines() == [f"0 {common}", f"1 {common}"]


def test_a_signal_ends_prepare_with_what_it_has_started(tmp_path):
    """A stand-in for it starts a process, as `prepare` does for each of several GPUs."""
    (tmp_path / "stand_in.py").write_text(
        "import subprocess, sys\nprint(*sys.argv[1:], flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    launched = subprocess.Popen(
        [sys.executable, "-c",
         "import sys; from launcher import preparing\npreparing.PREPARE_MODULE = 'stand_in'\n"
         "sys.exit(preparing.prepare_here(['--config', 'a b']))"],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"})  # fmt: skip
    assert launched.stdout is not None
    assert launched.stdout.readline() == "--config a b\n"
    launched.send_signal(signal.SIGTERM)
    out, _ = launched.communicate(timeout=30)  # its output ends when all have ended
    assert (out, launched.returncode) == ("SIGTERM: ending at once\n", 128 + 15)


def test_a_signal_ends_all_hosts_at_once():
    launched = subprocess.Popen(
        [sys.executable, "-c",
         "import sys; from launcher.supervise import Stopper, run; from launcher.commands import Command\n"
         "with Stopper(None) as stopper:\n"
         "    sys.exit(run([Command(['sh', '-c', 'echo up; sleep 60'], {})] * 2, stopper))"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT)  # fmt: skip
    assert launched.stdout is not None
    assert [launched.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    launched.send_signal(signal.SIGTERM)
    out, _ = launched.communicate(timeout=30)
    assert (out, launched.returncode) == ("SIGTERM: ending at once\n", 128 + 15)
