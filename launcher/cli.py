"""`flux2-ds COMMAND`: reads the recipe, says what it will run, runs it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from flux2_ds.config import bench_options
from flux2_ds.config.model_spec import planned_spec, spec_here
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Launch, Recipe
from flux2_ds.data.dataset import build_order, check_run, read_data
from flux2_ds.data.index import Index, is_prepared
from flux2_ds.errors import EXIT_USER_ERROR, UserError, run_root
from flux2_ds.run.run_dir import lock_run_dir
from launcher.doctor import examine
from launcher.host_checks import check_zero
from launcher.hosts import Hosts, check_gpus, check_programs, count_gpus, find_hosts
from launcher.plan_report import plan_memory
from launcher.preparing import prepare_here, prepare_on_hosts
from launcher.slurm import job_of, prepare_script, train_script
from launcher.supervise import Stopper, commands_here, run, supervise

BENCH_MODULE = "flux2_ds.commands.bench"

USAGE = """usage: flux2-ds COMMAND --config RECIPE [--SETTING VALUE ...]

commands
  prepare     encode photographs and captions into shards
  inspect     show what will be trained on: prompt, latents, timesteps, targets
  plan        print what a run will do, without starting it
  doctor      look for what would go wrong, on all hosts
  train       train on this machine's GPUs, on CPU processes or over a hostfile
  slurm       print (or --submit) an sbatch script that trains
  export      write a checkpoint in the form diffusers loads
  sample      render prompts without and with the trained weights
  bench       time the recipe's training step, without model files or data
  quality     compare training over quantised bases with training over the plain one
  bench-data  measure the loader against the disk and plain WebDataset
  tiny        make a tiny FLUX.2 model directory, for tests

`flux2-ds COMMAND --help` lists the command's options and every setting."""


def main() -> None:
    """Entry point of `flux2-ds` and `python -m launcher`."""
    arguments = sys.argv[1:]
    commands: dict[str, Callable[[list[str]], None]] = {
        "plan": plan,
        "doctor": doctor,
        "train": train,
        "slurm": slurm,
        "prepare": prepare,
        "bench-data": lambda argv: run_module("flux2_ds.commands.bench_data", argv),
        "inspect": lambda argv: run_module("flux2_ds.commands.inspect", argv),
        "bench": bench,
        "quality": lambda argv: run_module("flux2_ds.commands.quality", argv),
        "export": lambda argv: run_module("flux2_ds.commands.export", argv),
        "sample": lambda argv: run_module("flux2_ds.commands.sample", argv),
        "tiny": lambda argv: run_module("flux2_ds.commands.tiny", argv, DS_ACCELERATOR="cpu"),
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    if arguments[0] not in commands:
        print(f"error: no command {arguments[0]!r}\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    run_root(lambda: commands[arguments[0]](arguments[1:]))


def prepare(argv: list[str]) -> None:
    """Prepare on this machine, or on those of the hostfile."""
    recipe, _, arguments = read(
        argv, "prepare", "Encode photographs and captions into shards.", lambda _: None
    )
    if recipe.launch.hostfile is None:
        sys.exit(prepare_here(arguments))
    sys.exit(prepare_on_hosts(recipe, arguments))


def plan(argv: list[str]) -> None:
    """Print the arithmetic of a run, and the memory it takes."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        add_gpus(parser)
        add = parser.add_argument
        add("--gpu", type=str, default=None, help="Memory of each GPU, such as 24GiB.")
        add(
            "--host",
            type=str,
            default=None,
            help="Memory of each host, such as 64GiB. It is shared by the processes of the hostfile's "
            "largest host; without a hostfile by launch.processes, or 8.",
        )
        add("--json", action="store_true", help="Print the memory as one JSON object.")

    recipe, options, _ = read(argv, "plan", "Print what a run will do.", add_options)
    if options.host and not options.gpu:
        raise UserError(
            f"--host is {options.host}, but only beside --gpu is it used. Add --gpu SIZE."
        )
    hosts = hosts_of(recipe, options.gpus)
    the_plan = make_plan(recipe, hosts.processes)
    data = read_data(recipe) if is_prepared(recipe.data.shards) else None
    index = data and data[0]
    try:
        memory = plan_memory(the_plan, hosts, index, options.gpu, options.host)
    except UserError as error:
        if options.gpu or options.host or options.json:
            raise
        print("\n".join([*the_plan.lines(), f"memory     not known: {error}"]))
    else:
        if options.json:
            print(json.dumps(memory.values(), indent=2))
        else:
            spec = planned_spec(recipe.model.path)
            print("\n".join([*the_plan.lines(spec), *memory.lines()]))
    if not options.json:
        print("\n".join(data_lines(recipe, data)))
    check_inputs(recipe, data)  # last: the figures are of use all the same


def data_lines(recipe: Recipe, data: tuple[Index, Index] | None) -> list[str]:
    """What is trained on and what is held out, for people."""
    if data is None:
        return [f"data       {recipe.data.shards} is not prepared yet"]
    index, held_out = data
    order = build_order(recipe, index)
    lines = [f"data       {index.samples} samples, {order.steps_per_epoch} steps an epoch"]
    return lines + [f"held out   {held_out.samples} samples"] * bool(held_out.samples)


def doctor(argv: list[str]) -> None:
    """Look at the machines, and at the recipe if one is given."""
    if {"-h", "--help"} & set(argv) or any(word.split("=")[0] == "--config" for word in argv):
        recipe, options, arguments = read(argv, "doctor", "Look for what would go wrong.", add_gpus)
        launch = recipe.launch
        hosts = hosts_of(recipe, options.gpus)
        sys.exit(0 if examine(recipe, launch, hosts, arguments) else EXIT_USER_ERROR)
    if argv:
        raise UserError(f"doctor {' '.join(argv)}: give --config RECIPE, or nothing.")
    gpus = count_gpus()
    launch = Launch(accelerator="cuda" if gpus else "cpu")
    sys.exit(0 if examine(None, launch, Hosts(gpus or 1), []) else EXIT_USER_ERROR)


def train(argv: list[str]) -> None:
    """Check the recipe, print the exact command, run it and pass its exit code on."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        add_gpus(parser)
        add = parser.add_argument
        add("--dry-run", action="store_true", help="Print plan and command, start nothing.")
        add(
            "--max-restarts",
            type=int,
            default=0,
            help="After a failure, start again from the last checkpoint; at most so many times in a "
            "row without reaching the next one.",
        )
        add(
            "--elastic",
            action="store_true",
            help="Restart without the hosts of the hostfile that do not answer.",
        )
        add(
            "--node-rank",
            type=int,
            default=None,
            help="Run the part of the hostfile's host N (from 0) here, without ssh: something else, "
            "such as Kubernetes, runs this command on every host.",
        )

    recipe, options, arguments = read(argv, "train", "Start training.", add_options)
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts is {options.max_restarts}; it must be 0 or more.")
    if options.elastic and not (recipe.launch.hostfile and options.max_restarts):
        raise UserError("--elastic needs launch.hostfile and --max-restarts of at least 1.")
    hosts = hosts_of(recipe, options.gpus)
    if options.node_rank is not None:
        check_node(recipe, hosts, options.node_rank, options.max_restarts)
    the_plan = make_plan(recipe, hosts.processes)
    if options.dry_run:
        commands = commands_here(recipe.launch, hosts, arguments, node=options.node_rank)
        print("\n".join([*the_plan.lines(), *map(str, commands)]))
        return
    check_inputs(recipe, read_data(recipe))
    if options.node_rank is None:
        check_programs(recipe.launch)
    if recipe.launch.accelerator == "cuda":
        check_gpus(hosts)
    with ExitStack() as held:
        if not options.node_rank:  # elsewhere the first host's launcher holds them
            # To the end: the trainer takes its own lock only after it has imported torch.
            held.enter_context(lock_run_dir(recipe, ".launcher.lock"))
            lock_run_dir(recipe).close()  # a trainer that was started by hand
        code = supervise(
            recipe,
            hosts,
            arguments,
            max_restarts=options.max_restarts,
            elastic=options.elastic,
            node=options.node_rank,
        )
    sys.exit(code)


def check_node(recipe: Recipe, hosts: Hosts, node: int, max_restarts: int) -> None:
    """Refuse a `--node-rank` that names no host, or with what it cannot be combined.

    Raises:
        UserError: naming the option.
    """
    if hosts.hostfile is None or recipe.launch.over != "ssh" or max_restarts:
        raise UserError(
            f"--node-rank {node} needs launch.hostfile, and neither launch.over: pdsh nor "
            "--max-restarts: whoever starts the hosts starts them again."
        )
    if not 0 <= node < len(hosts.slots):
        raise UserError(
            f"--node-rank is {node}; launch.hostfile {hosts.hostfile} has the hosts 0 to "
            f"{len(hosts.slots) - 1}."
        )


def bench(argv: list[str]) -> None:
    """Time the training step in as many processes as `train` would start on this machine."""
    recipe, options, arguments = read(
        argv,
        "bench",
        "Time the recipe's training step.",
        add_gpus,
        passed_on=bench_options.add_options,
    )
    launch = recipe.launch
    if launch.hostfile is not None:
        raise UserError(
            f"launch.hostfile is {launch.hostfile}, and bench times this machine alone. Add "
            "--launch.hostfile null."
        )
    hosts = hosts_of(recipe, options.gpus)
    bench_options.check_options(options, make_plan(recipe, hosts.processes))
    if launch.accelerator == "cuda":
        check_gpus(hosts)
    if hosts.processes == 1:
        run_module(BENCH_MODULE, arguments, DS_ACCELERATOR=launch.accelerator)
    commands = commands_here(launch, hosts, arguments, module=BENCH_MODULE)
    print(*commands, file=sys.stderr, flush=True)  # what is measured has the output to itself
    with Stopper(None) as stopper:
        code = run(commands, stopper)
        if code not in (0, EXIT_USER_ERROR) and stopper.reason is None:
            why = "without an error above, a process was killed (out of memory? see dmesg)"
            print(f"bench ended with code {code}; {why}", file=sys.stderr)
        sys.exit(code)


def slurm(argv: list[str]) -> None:
    """Print the sbatch script, or submit it."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--job", choices=["train", "prepare"], default="train", help="What the script runs.")
        add("--nodes", type=int, default=1, help="Number of nodes.")
        add(
            "--gpus-per-node",
            type=int,
            default=None,
            help="GPUs of each node. Default: the processes of a machine that the recipe names, or 8.",
        )
        add("--time", type=str, default="24:00:00", help="Time limit.")
        add("--save-before", type=int, default=None, help="Seconds to save before the limit (120).")
        add("--partition", type=str, default=None, help="Slurm partition.")
        add("--account", type=str, default=None, help="Slurm account.")
        add("--array", type=str, default=None, help="Task N: seed N, run directory RUN_DIR-N.")
        add("--max-restarts", type=int, default=0, help="Requeue so often after a failure.")
        add("--submit", action="store_true", help="Hand the script to sbatch.")

    recipe, options, arguments = read(argv, "slurm", "Write an sbatch script.", add_options)
    job = job_of(recipe, options, dict(os.environ))
    prepares = options.job == "prepare"
    make_plan(recipe, 1 if prepares else job.nodes * job.tasks)
    if prepares:
        script = prepare_script(job, arguments, python=sys.executable)
    else:
        script = train_script(job, recipe.run_dir, arguments, python=sys.executable)
    if not options.submit:
        print(script, end="")
        return
    if not prepares:
        check_inputs(recipe, read_data(recipe))
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine. Run this on a Slurm login node.")
    sys.exit(subprocess.run(["sbatch"], input=script, text=True, check=False).returncode)


def check_inputs(recipe: Recipe, data: tuple[Index, Index] | None) -> None:
    """What the training processes will refuse, said once and before they start; `data` is None while
    nothing is prepared.

    A model that is not in a local directory yet is recognised when it has been fetched.
    """
    spec = spec_here(recipe.model.path, allow_distilled=recipe.model.allow_distilled)
    check_run(recipe, data, spec, Path(recipe.model.path) if spec else None)
    check_zero(recipe)


def add_gpus(parser: argparse.ArgumentParser) -> None:
    """The option that overrides `launch.processes`."""
    parser.add_argument(
        "--gpus", type=int, default=None, help="Processes on this machine (launch.processes)."
    )


def hosts_of(recipe: Recipe, gpus: int | None) -> Hosts:
    """Where the recipe runs; `gpus` is the command line's word."""
    launch = recipe.launch
    return find_hosts(launch if gpus is None else dataclasses.replace(launch, processes=gpus))


def read(
    argv: list[str],
    command: str,
    description: str,
    add_options: Callable[[argparse.ArgumentParser], None],
    passed_on: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> tuple[Recipe, Any, list[str]]:
    """The recipe, the command's options, and the arguments for the processes: without its own options, but
    with those that are `passed_on`."""
    parser = recipe_parser(f"flux2-ds {command}", description)
    add_options(parser)
    passed_on(parser)
    recipe, options = parse_recipe(parser, argv)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(own)
    return recipe, options, own.parse_known_args(argv)[1]


def run_module(module: str, argv: list[str], **variables: str) -> NoReturn:
    """Become another command, which imports torch; signals and exit code are its own."""
    sys.stdout.flush()  # what is buffered would be lost
    command = [sys.executable, "-m", module, *argv]
    os.execve(sys.executable, command, {**os.environ, **variables})
