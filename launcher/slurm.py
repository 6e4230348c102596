"""sbatch scripts for a recipe. Pure."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from launcher.commands import TRAIN, collective_timeout
from launcher.preparing import PREPARE

_WORD = re.compile(r"[\w.,:%@+-]+", re.ASCII)
"""What may stand in an #SBATCH line: no space, no new line."""


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm is asked for. `tasks` are processes a node, one a GPU if `accelerator` is cuda."""

    nodes: int
    tasks: int
    time_limit: str
    name: str
    accelerator: str = "cuda"
    partition: str | None = None
    account: str | None = None
    array: str | None = None
    save_before: int = 120
    """Seconds before the time limit at which the trainer is told to save."""
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


def job_of(recipe: Recipe, options: Any, environment: dict[str, str]) -> SlurmJob:
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
    for name in ("array", "save_before", "max_restarts"):
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
    return SlurmJob(
        nodes=options.nodes,
        tasks=tasks,
        time_limit=options.time,
        name=Path(recipe.run_dir).name,
        accelerator=launch.accelerator,
        partition=options.partition,
        account=options.account,
        array=options.array,
        save_before=options.save_before or 120,
        max_restarts=options.max_restarts,
        environment=tuple(collective_timeout(launch, environment).items()),
    )


def train_script(job: SlurmJob, run_dir: str, arguments: list[str], *, python: str) -> str:
    """The sbatch script that trains with the recipe's `arguments`.

    One task a process, started by srun itself, so no ssh between nodes is needed and Slurm's signals
    reach every process: before the time limit, and when the job is preempted, all save and exit with
    code 75, and the job requeues itself to continue. The tasks of an array are runs of their own: task
    N has seed N and the run directory `run_dir`-N.
    """
    place, own = shlex.quote(run_dir), ""
    if job.array is not None:
        place += '-"$SLURM_ARRAY_TASK_ID"'
        own = f' --run_dir {place} --seed "$SLURM_ARRAY_TASK_ID"'
    train = f'{shlex.join([python, "-m", TRAIN, *arguments])}{own} "$@"'
    # A task that stopped on request leaves the others to save; any other failure ends them all, or
    # they would wait for it in a collective.
    # The shell gets Slurm's signal, too, and has to outlive the trainer's saving.
    # The others' codes follow from the first one's, so that decides (-C: created once, by one task).
    task = (
        f"trap : USR1 TERM INT; RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID {train}; code=$?; "
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
    options = {"signal": f"USR1@{job.save_before}"}
    return "\n".join(
        [
            *header(job, job.name, options, nodes=job.nodes, tasks=job.tasks),
            "#SBATCH --requeue",
            "",
            *exports(job),
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


def prepare_script(job: SlurmJob, arguments: list[str], *, python: str) -> str:
    """The sbatch script that prepares the recipe's shards, one task a process."""
    prepare = shlex.join([python, "-m", PREPARE, *arguments])
    task = f'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec {prepare} "$@"'
    return "\n".join(
        [
            *header(job, f"{job.name}-prepare", {}, nodes=job.nodes, tasks=job.tasks),
            "",
            *exports(job),
            f'srun --kill-on-bad-exit=1 bash -c {shlex.quote(task)} task "$@"',
            "",
        ]
    )


def exports(job: SlurmJob) -> list[str]:
    """The variables by which the processes of a job meet, and their share of the cores."""
    return [
        *(f"export {name}={shlex.quote(value)}" for name, value in job.environment),
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# A port that two jobs on one node are unlikely to share.",
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
        f"export WORLD_SIZE=$SLURM_NTASKS DS_ACCELERATOR={job.accelerator}",
        f"threads=$((SLURM_CPUS_ON_NODE / {job.tasks}))",
        "export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))",
    ]


def header(job: SlurmJob, name: str, more: dict[str, str], *, nodes: int, tasks: int) -> list[str]:
    """The first line and what sbatch reads: whole nodes, of which `--exclusive` alone would give all
    cores and GPUs, but only as much memory as the cluster's default."""
    options = {
        "job-name": re.sub(r"[^\w.-]+", "-", name) or "flux2-ds",
        "nodes": nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": job.tasks if job.accelerator == "cuda" else None,
        "mem": 0,  # all of the node's
        "time": job.time_limit,
        "output": "%x-%j.log",  # %j differs for every task of an array, too
        "open-mode": "append",
        "partition": job.partition,
        "account": job.account,
        "array": job.array,
        **more,
    }
    asked = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    return ["#!/bin/bash", *asked, "#SBATCH --exclusive"]
