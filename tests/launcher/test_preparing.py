"""`flux2-ds prepare`: started, ended and told what is wrong like `train`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flux2_ds.config.recipe import Data, Launch, Model, Recipe
from flux2_ds.errors import UserError
from flux2_ds.prepare.folder import lock_folder
from launcher.hosts import Hosts
from launcher.preparing import prepare_shards
from launcher.slurm import SlurmJob, prepare_script

ROOT = Path(__file__).parents[2]


def test_a_slurm_job_starts_one_task_a_process(tmp_path):
    job = SlurmJob(nodes=2, tasks=8, time_limit="04:00:00", name="cats")
    told = tmp_path / "python"
    told.write_text('#!/bin/sh\necho "$RANK $LOCAL_RANK of $WORLD_SIZE at $MASTER_ADDR: $@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node01\n")
    (tmp_path / "srun").write_text(
        '#!/bin/sh\n[ "$1" = --kill-on-bad-exit=1 ] && shift\n'
        'for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@"; done\n'
    )
    for program in ("python", "srun", "scontrol"):
        (tmp_path / program).chmod(0o755)
    script = prepare_script(job, ["--config", "a b"], python=str(told))
    assert "#SBATCH --job-name=cats-prepare\n#SBATCH --nodes=2\n" in script
    assert "#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n" in script
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "17", "SLURM_CPUS_ON_NODE": "8",
             "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    out = subprocess.run(["bash", "-s", "--", "--more"], input=script, env=slurm, text=True,
                         capture_output=True, check=True).stdout  # fmt: skip
    common = "of 2 at node01: -m flux2_ds.prepare --config a b --more"
    assert out.splitlines() == [f"0 0 {common}", f"1 1 {common}"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    def prepare(shards: object) -> int:
        data = Data(images="photos", shards=str(shards))
        recipe = Recipe(run_dir="runs/cats", model=Model(path="model"), data=data,
                        launch=Launch(accelerator="cpu"))  # fmt: skip
        return prepare_shards(recipe, Hosts(1), [])

    (tmp_path / "mine.txt").touch()
    for shards, reason in ((tmp_path, "is not empty"), ("s3://bucket/shards", "is a URL")):
        with pytest.raises(UserError, match=rf"data\.shards .*{reason}"):
            prepare(shards)
    with (
        lock_folder(tmp_path / "shards"),
        pytest.raises(UserError, match="another prepare is writing"),
    ):
        prepare(tmp_path / "shards")


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
