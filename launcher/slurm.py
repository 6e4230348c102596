"""sbatch scripts for a recipe. Pure."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from flux2_ds.prepare.folder import check_folder
from launcher.commands import PREPARE, TRAIN, collective_timeout

_WORD = re.compile(r"[\w.,:%@+-]+", re.ASCII)
"""What may stand in an #SBATCH line: no space, no new line."""


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm is asked for. `tasks` are processes a node, one a GPU if `accelerator` is cuda."""

    module: str
    place: str
    """The directory of its logs."""
    name: str
    nodes: int
    tasks: int
    time_limit: str
    accelerator: str = "cuda"
    partition: str | None = None
    account: str | None = None
    array: str | None = None
    save_before: int | None = None
    """Seconds before the time limit at which the ranks are told to save; None if they cannot."""
    max_restarts: int = 0
    environment: tuple[tuple[str, str], ...] = ()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flux2-ds slurm`."""
    add = parser.add_argument
    add("--job", choices=["train", "prepare"], default="train", help="What the script runs.")
    add("--nodes", type=int, default=1, help="Number of nodes.")
    add(
        "--gpus-per-node",
        type=int,
        help="GPUs of each node. Default: the processes of a machine that the recipe names, or 8.",
    )
    add("--time", type=str, default="24:00:00", help="Time limit.")
    add("--save-before", type=int, help="Seconds to save before the limit (120).")
    add("--partition", type=str, help="Slurm partition.")
    add("--account", type=str, help="Slurm account.")
    add("--array", type=str, help="Task N: seed N, run directory RUN_DIR-N.")
    add("--max-restarts", type=int, default=0, help="Requeue so often after a failure.")
    add("--submit", action="store_true", help="Hand the script to sbatch.")


def slurm_job(recipe: Recipe, options: Any, environment: Mapping[str, str]) -> SlurmJob:
    """Return what a recipe and the options of `flux2-ds slurm` ask Slurm for."""
    for name in ("nodes", "gpus_per_node", "save_before"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
    for name in ("time", "partition", "account", "array"):
        value = getattr(options, name)
        if value is not None and not _WORD.fullmatch(value):
            raise UserError(
                f"--{name} is {value!r}; Slurm takes a word of letters, digits and .,:%@+-."
            )
    launch, prepares = recipe.launch, options.job == "prepare"
    if launch.hostfile is not None:
        raise UserError(
            f"launch.hostfile is {launch.hostfile}, and Slurm chooses the hosts. Add --launch.hostfile null."
        )
    for name in ("array", "save_before"):
        if prepares and getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')} is of a training; --job prepare has no use for it. Leave "
                "it out; a job that was ended goes on when it is submitted again."
            )
    # CPU processes, for a trial of the cluster, are counted by the recipe.
    if launch.accelerator == "cpu" and options.gpus_per_node:
        raise UserError(
            f"--gpus-per-node is {options.gpus_per_node}, but launch.accelerator is cpu. Leave it out: "
            "launch.processes says how many processes a node runs."
        )
    tasks = options.gpus_per_node or launch.processes or (8 if launch.accelerator == "cuda" else 1)
    name = Path(recipe.run_dir).name
    return SlurmJob(
        module=PREPARE if prepares else TRAIN,
        place=str(check_folder(recipe.data.shards)) if prepares else recipe.run_dir,
        name=f"{name}-prepare" if prepares else name,
        nodes=options.nodes,
        tasks=tasks,
        time_limit=options.time,
        accelerator=launch.accelerator,
        partition=options.partition,
        account=options.account,
        array=options.array,
        save_before=None if prepares else options.save_before or 120,
        max_restarts=options.max_restarts,
        environment=tuple(collective_timeout(launch, environment).items()),
    )


def batch_script(job: SlurmJob, arguments: list[str], *, python: str) -> str:
    """Return the sbatch script that runs the job with the recipe's `arguments`.

    One task a process, started by srun itself, so no ssh between nodes is needed and Slurm's signals
    reach every process: before the time limit, and when the job is preempted, all save and exit with
    code 75, and the job requeues itself to continue. The tasks of an array are runs of their own: task
    N has seed N and the run directory `place`-N.
    """
    place, own = shlex.quote(job.place), ""
    if job.array is not None:
        place += '-"$SLURM_ARRAY_TASK_ID"'
        own = f' --run_dir {place} --seed "$SLURM_ARRAY_TASK_ID"'
    rank = f'{shlex.join([python, "-m", job.module, *arguments])}{own} "$@"'
    # A task that stopped on request leaves the others to save; any other failure ends them all, or
    # they would wait for it in a collective.
    # The shell gets Slurm's signal, too, and has to outlive the rank's saving.
    # The others' codes follow from the first one's, so that decides (-C: created once, by one task).
    task = (
        f"trap : USR1 TERM INT; RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID {rank}; code=$?; "
        f"if [ $code -ne 0 ] && [ $code -ne {EXIT_STOPPED} ]; then "
        '(set -C; echo $code > "$FLUX2_DS_FAILED") 2> /dev/null; sleep 20; '
        "scancel --signal=KILL $SLURM_JOB_ID.$SLURM_STEP_ID; fi; exit $code"
    )
    again = f'[ "$code" -eq {EXIT_STOPPED} ]'
    if job.max_restarts:
        again += (
            f' || {{ [ "$code" -ne 0 ] && [ "$code" -ne {EXIT_USER_ERROR} ] && '
            f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; }}'
        )
    return "\n".join(
        [
            "#!/bin/bash",
            *header(job),
            "",
            *(f"export {name}={shlex.quote(value)}" for name, value in job.environment),
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "# A port that two jobs on one node are unlikely to share.",
            "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            f"export WORLD_SIZE=$SLURM_NTASKS DS_ACCELERATOR={job.accelerator}",
            f"threads=$((SLURM_CPUS_ON_NODE / {job.tasks}))",
            "export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))",
            f"export FLUX2_DS_FAILED={place}/logs/slurm-$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}",
            'mkdir -p -- "${FLUX2_DS_FAILED%/*}"',
            "",
            f'srun --kill-on-bad-exit=0 bash -c {shlex.quote(task)} task "$@"',
            "code=$?",
            'if [ -s "$FLUX2_DS_FAILED" ]; then code=$(< "$FLUX2_DS_FAILED"); fi',
            f'if {again}; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
            "",
        ]
    )


def header(job: SlurmJob) -> list[str]:
    """Return what sbatch reads: whole nodes, of which `--exclusive` alone would give all cores and
    GPUs, but only as much memory as the cluster's default."""
    options = {
        "job-name": re.sub(r"[^\w.-]+", "-", job.name) or "flux2-ds",
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks,
        "gpus-per-node": job.tasks if job.accelerator == "cuda" else None,
        "mem": 0,  # all of the node's
        "time": job.time_limit,
        "output": "%x-%j.log",  # %j differs for every task of an array, too
        "open-mode": "append",
        "partition": job.partition,
        "account": job.account,
        "array": job.array,
        "signal": f"USR1@{job.save_before}" if job.save_before else None,
    }
    asked = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    return [*asked, "#SBATCH --exclusive", "#SBATCH --requeue"]
