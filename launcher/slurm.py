"""An sbatch script for a recipe. Pure."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from flux2_ds.errors import EXIT_STOPPED
from launcher.commands import TRAIN_MODULE


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm is asked for."""

    nodes: int
    gpus_per_node: int
    time_limit: str
    name: str
    partition: str | None = None
    account: str | None = None


def slurm_script(job: SlurmJob, arguments: list[str], *, python: str) -> str:
    """The sbatch script that trains with the recipe's `arguments`.

    One task a GPU, started by srun itself, so no ssh between nodes is needed and Slurm's signal
    reaches every process: two minutes before the time limit all save and exit with code 75, and the
    job requeues itself to continue.
    """
    options = {
        "job-name": re.sub(r"[^\w.-]+", "-", job.name) or "flux2-ds",
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus_per_node,
        "gpus-per-node": job.gpus_per_node,
        "time": job.time_limit,
        "signal": "USR1@120",
        "output": "%x-%j.log",
        "open-mode": "append",
        "partition": job.partition,
        "account": job.account,
    }
    header = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    train = shlex.join([python, "-m", TRAIN_MODULE, *arguments])
    # A task that stopped on request leaves the others to save; any other failure ends them all, or
    # they would wait for it in a collective.
    # The shell gets Slurm's signal, too, and has to outlive the trainer's saving.
    task = (
        f"trap : USR1 TERM INT; RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID {train}; code=$?; "
        f"if [ $code -ne 0 ] && [ $code -ne {EXIT_STOPPED} ]; then "
        "scancel --signal=KILL $SLURM_JOB_ID.$SLURM_STEP_ID; fi; exit $code"
    )
    return "\n".join(
        [
            "#!/bin/bash",
            *header,
            "#SBATCH --requeue",
            "#SBATCH --exclusive",
            "",
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "# A port that two jobs on one node are unlikely to share.",
            "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            "export WORLD_SIZE=$SLURM_NTASKS DS_ACCELERATOR=cuda",
            f"threads=$((SLURM_CPUS_ON_NODE / {job.gpus_per_node}))",
            "export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))",
            "",
            f"srun --kill-on-bad-exit=0 bash -c {shlex.quote(task)}",
            "code=$?",
            f'if [ "$code" -eq {EXIT_STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
            "",
        ]
    )
