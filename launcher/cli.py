"""`flux2-ds COMMAND`: reads the recipe, says what it will run, runs it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from flux2_ds.config import bench_options
from flux2_ds.config.cards import card_problem
from flux2_ds.config.model_spec import planned_spec, spec_here
from flux2_ds.config.parse import origin_lines, parse_recipe, recipe_lines, recipe_parser
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Launch, Recipe
from flux2_ds.config.validate import check_recipe
from flux2_ds.data.dataset import (
    build_order,
    check_run,
    data_warnings,
    in_steps,
    length_line,
    mask_and_reference_lines,
    read_data,
    validation_line,
)
from flux2_ds.data.index import Index, is_prepared
from flux2_ds.errors import (
    EXIT_FAILURE,
    EXIT_USER_ERROR,
    Arguments,
    UserError,
    counted,
    did_you_mean,
    run_root,
)
from flux2_ds.run.run_dir import with_adapter_file
from launcher.commands import BENCH, PREPARE, start_commands
from launcher.doctor import check_zero, examine
from launcher.hosts import Hosts, check_cards, check_gpus, check_ssh, count_gpus, find_hosts
from launcher.plan_report import find_card, plan_memory
from launcher.slurm import add_options as add_slurm_options
from launcher.slurm import batch_script, slurm_job
from launcher.supervise import (
    ENDED_EARLY,
    Job,
    Stopper,
    modified,
    prepare_job,
    print_line,
    run,
    supervise,
    train_job,
    what_ended,
)


def main() -> None:
    """Run the command of the arguments."""
    run_root(lambda: run_command(sys.argv[1:]))


def run_command(argv: list[str]) -> None:
    """Run the command that the first argument names with the others."""
    name, *arguments = argv or [""]
    if name in ("", "-h", "--help"):
        print(usage())
        sys.exit(0 if name else EXIT_USER_ERROR)
    if name == "--version":
        print(f"flux2-ds {importlib.metadata.version('flux2-ds')}")
    elif name in COMMANDS:
        COMMANDS[name][1](arguments)
    else:
        meant = did_you_mean(name, COMMANDS)
        raise UserError(
            f"there is no command {name!r}.{meant} The commands: {', '.join(COMMANDS)}."
        )


def usage() -> str:
    """Return what `flux2-ds --help` prints."""
    commands = [f"  {name:12}{summary}" for name, (summary, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flux2-ds COMMAND --config RECIPE [--SETTING VALUE ...]\n\ncommands",
            *commands,
            "\n`flux2-ds COMMAND --help` lists the command's options and every setting; `--version`.",
        ]
    )


def prepare(argv: list[str]) -> None:
    """Prepare as `train` trains."""
    recipe, options, arguments = read(argv, "prepare", add_start_options)
    check_recipe(recipe)
    hosts = start_hosts(recipe, options)
    start(prepare_job(recipe), recipe, hosts, options, arguments, [])


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    add_gpus(parser)
    parser.add_argument(
        "--gpu",
        type=str,
        help='Memory of each GPU, such as 24GiB, or its name, such as "RTX 4090".',
    )
    parser.add_argument(
        "--host",
        type=str,
        help="Memory of each host, such as 64GiB. It is shared by the processes of the hostfile's "
        "largest host; without a hostfile by launch.processes, or 8.",
    )
    parser.add_argument("--json", action="store_true", help="Print the memory as one JSON object.")


def plan(argv: list[str]) -> None:
    """Print the arithmetic of a run, and the memory it takes."""
    recipe, options, arguments = read(argv, "plan", add_plan_options)
    if options.host and not options.gpu:
        raise UserError(
            f"--host is {options.host}, but only beside --gpu is it used. Add --gpu SIZE."
        )
    card = None if options.gpu is None else find_card(options.gpu)
    hosts = hosts_of(recipe, options)
    data = None
    if is_prepared(recipe.data.shards):
        recipe, data = in_steps(recipe), read_data(recipe)
    the_plan = make_plan(recipe, hosts.processes)
    spec, memory, problems = None, None, []
    try:
        memory = plan_memory(the_plan, hosts, data and data[0], card, options.host)
        spec = planned_spec(recipe.model.path, recipe.model.revision)
    except UserError as error:
        problems.append(str(error))
    if not options.json:
        lines = [*the_plan.lines(spec), *(memory.lines() if memory else [])]
        print("\n".join([*lines, *data_lines(recipe, data), *origin_lines(argv)]))
    elif memory:
        print(json.dumps(memory.values(), indent=2))
    # Last, because the figures are of use all the same: what `train` would refuse.
    if memory and (reason := memory.refusal()):
        problems.append(reason)
    if card and (reason := card_problem(recipe, card)):
        problems.append(reason)
    if data is None:
        command = f"flux2-ds prepare {shlex.join(arguments)}"
        problems.append(f"data.shards {recipe.data.shards} is not prepared. Run: {command}")
    try:
        if card is None:
            check_cards(recipe, hosts)
        check_inputs(recipe, data)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\nerror: ".join(dict.fromkeys(problems)))


def data_lines(recipe: Recipe, data: tuple[Index, Index] | None) -> list[str]:
    """Return what is trained on and what validates, for people."""
    if data is None:
        waits = "is not prepared yet; reference images, which take memory, are counted then"
        return [f"data       {recipe.data.shards} {waits}"]
    index, validation = data
    order = build_order(recipe, index)
    lines = [
        f"data       {counted(index.samples, 'sample')}, {length_line(recipe, order)}",
    ]
    more = [
        *data_warnings(recipe, order, validation),
        *index.stored_lines(),
        *mask_and_reference_lines(recipe, index),
    ]
    lines += [f"           {line}" for line in more]
    return lines + [f"held out   {validation_line(recipe, validation)}"] * bool(validation.samples)


def doctor(argv: list[str]) -> None:
    """Look at the machines, and at the recipe if one is given."""
    if {"-h", "--help"} & set(argv) or any(word.split("=")[0] == "--config" for word in argv):
        recipe, options, arguments = read(argv, "doctor", add_gpus)
        healthy = examine(recipe, recipe.launch, hosts_of(recipe, options), arguments)
    elif argv:
        raise UserError(f"doctor {' '.join(argv)}: give --config RECIPE, or nothing.")
    else:
        gpus = count_gpus()
        launch = Launch(accelerator="cuda" if gpus else "cpu")
        healthy = examine(None, launch, Hosts(gpus or 1), [])
    sys.exit(0 if healthy else EXIT_USER_ERROR)


def add_start_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train` and `prepare`."""
    add_gpus(parser)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="Print plan and command, start nothing.")
    add(
        "--max-restarts",
        type=int,
        default=0,
        help="After a failure, start again from the last checkpoint (or finished shard); at most so "
        "many times in a row without reaching the next one.",
    )
    add(
        "--elastic",
        action="store_true",
        help="Restart without the hosts of the hostfile that do not answer.",
    )
    add(
        "--node-rank",
        type=int,
        help="Run the part of the hostfile's host N (from 0) here, without ssh: something else, such "
        "as Kubernetes, runs this command on every host.",
    )


def train(argv: list[str]) -> None:
    """Check the recipe, print the exact command, run it and pass its exit code on."""
    recipe, options, arguments = read(argv, "train", add_start_options)
    hosts = start_hosts(recipe, options)
    if not options.dry_run or is_prepared(recipe.data.shards):
        recipe = in_steps(recipe)
    plan = make_plan(recipe, hosts.processes)
    check_cards(recipe, hosts)
    if not options.dry_run:
        check_inputs(recipe, read_data(recipe))
    start(train_job(recipe), recipe, hosts, options, arguments, plan.lines())


def start(
    job: Job,
    recipe: Recipe,
    hosts: Hosts,
    options: Any,
    arguments: list[str],
    plan_lines: list[str],
) -> None:
    """Start the job on all its ranks, or with `--dry-run` print how."""
    launch, node = recipe.launch, options.node_rank
    if options.dry_run:
        commands = start_commands(job.module, launch, hosts, arguments, node=node)
        print("\n".join([*plan_lines, *map(str, commands)]))
        return
    if node is None:
        check_ssh(hosts)
    if launch.accelerator == "cuda":
        check_gpus(hosts)
    with ExitStack() as held:
        if not node:  # elsewhere the first host's launcher holds them
            # To the end: rank 0 takes its own lock only after it has started.
            held.enter_context(job.lock(".launcher.lock"))
            job.lock().close()  # ranks that were started by hand
        code = supervise(
            job,
            launch,
            hosts,
            arguments,
            max_restarts=options.max_restarts,
            elastic=options.elastic,
            node=node,
        )
    if code == 0 and job.module == PREPARE and not node:
        print_line(f"next       flux2-ds train {shlex.join(arguments)}")
    sys.exit(code)


def start_hosts(recipe: Recipe, options: Any) -> Hosts:
    """Return where a start runs; refuse options that do not go with each other or with the hosts."""
    hosts, node, restarts = hosts_of(recipe, options), options.node_rank, options.max_restarts
    if restarts < 0:
        raise UserError(f"--max-restarts is {restarts}; it must be 0 or more.")
    if options.elastic and not (recipe.launch.hostfile and restarts):
        raise UserError("--elastic needs launch.hostfile and --max-restarts of at least 1.")
    if node is None:
        return hosts
    if hosts.hostfile is None or restarts:
        raise UserError(
            f"--node-rank {node} needs launch.hostfile, and no --max-restarts: whoever starts the hosts "
            "starts them again."
        )
    if not 0 <= node < len(hosts.slots):
        raise UserError(
            f"--node-rank is {node}; launch.hostfile {hosts.hostfile} has the hosts 0 to "
            f"{len(hosts.slots) - 1}."
        )
    return hosts


def bench(argv: list[str]) -> None:
    """Time the training step in as many processes as `train` would start on this machine."""
    recipe, options, arguments = read(argv, "bench", add_gpus, bench_options.add_options)
    launch = recipe.launch
    if launch.hostfile is not None:
        raise UserError(
            f"launch.hostfile is {launch.hostfile}, and bench times this machine alone. Add "
            "--launch.hostfile null."
        )
    hosts = hosts_of(recipe, options)
    bench_options.check_options(options, make_plan(recipe, hosts.processes))
    if launch.accelerator == "cuda":
        check_gpus(hosts)
        check_cards(recipe, hosts)
    with TemporaryDirectory(prefix="flux2-ds-bench-") as folder, Stopper() as stopper:
        result = Path(options.result or Path(folder, "result.json"))
        if options.result is None:
            arguments += ["--result", str(result)]
        before = modified(result)
        commands = start_commands(BENCH, launch, hosts, arguments)
        print(*commands, file=sys.stderr, flush=True)  # what is measured has the output to itself
        code = run(commands, stopper)
        unfinished = code == 0 and modified(result) == before
    if unfinished or code not in (0, EXIT_USER_ERROR, stopper.code):
        why = f"{ENDED_EARLY}: there is no result" if unfinished else what_ended(code)
        print(f"error: {why}", file=sys.stderr)
        code = EXIT_FAILURE
    sys.exit(code)


def slurm(argv: list[str]) -> None:
    """Print the sbatch script, or submit it."""
    recipe, options, arguments = read(argv, "slurm", add_slurm_options)
    job = slurm_job(recipe, options, os.environ)
    trains = options.job == "train"
    if trains:
        make_plan(recipe, job.nodes * job.tasks)
    script = batch_script(job, arguments, python=sys.executable)
    if not options.submit:
        print(script, end="")
        return
    if trains:
        check_inputs(recipe, read_data(recipe))
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine. Run this on a Slurm login node.")
    sys.exit(subprocess.run(["sbatch"], input=script, text=True, check=False).returncode)


def check_inputs(recipe: Recipe, data: tuple[Index, Index] | None) -> None:
    """Refuse before the start what the ranks would; `data` is None while nothing is prepared.

    A model that is not on this machine yet is recognised when it has been fetched.
    """
    model = recipe.model
    spec = spec_here(model.path, model.revision, allow_distilled=model.allow_distilled)
    check_run(recipe, data, spec, Path(model.path) if Path(model.path).is_dir() else None)
    check_zero(recipe)


def add_gpus(parser: argparse.ArgumentParser) -> None:
    """Add the option that overrides `launch.processes`."""
    parser.add_argument("--gpus", type=int, help="Processes on this machine (launch.processes).")


def hosts_of(recipe: Recipe, options: Any) -> Hosts:
    """Return where the recipe runs, as `--gpus` has it."""
    launch = recipe.launch
    if options.gpus is not None:
        launch = dataclasses.replace(launch, processes=options.gpus)
    return find_hosts(launch)


def read(
    argv: list[str],
    command: str,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda _: None,
    passed_on: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> tuple[Recipe, Any, list[str]]:
    """Return the recipe, the command's options, and the arguments for the ranks: without its own options,
    but with those that are `passed_on`."""
    parser = recipe_parser(f"flux2-ds {command}", f"{COMMANDS[command][0].capitalize()}.")
    add_options(parser)
    passed_on(parser)
    recipe, options = parse_recipe(parser, argv)
    if command != "prepare":
        recipe = with_adapter_file(recipe)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(own)
    return recipe, options, own.parse_known_args(argv)[1]


def recipes(argv: list[str]) -> None:
    """List the shipped recipes, which `--config` takes by name."""
    Arguments("flux2-ds recipes").parse_args(argv)
    print("\n".join(recipe_lines()))


def run_module(module: str, argv: list[str], **variables: str) -> NoReturn:
    """Become another command, which imports torch; signals and exit code are its own."""
    sys.stdout.flush()  # what is buffered would be lost
    command = [sys.executable, "-m", module, *argv]
    os.execve(sys.executable, command, {**os.environ, **variables})


COMMANDS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "recipes": ("list the recipes that come with flux2-ds", recipes),
    "prepare": ("encode images and captions into shards", prepare),
    "inspect": (
        "show what will be trained on: prompt, latents, timesteps, targets",
        partial(run_module, "flux2_ds.commands.inspect"),
    ),
    "plan": ("print what a run will do, without starting it", plan),
    "doctor": ("look for what would go wrong, on all hosts", doctor),
    "train": ("train on this machine's GPUs, on CPU processes or over a hostfile", train),
    "slurm": ("print (or --submit) an sbatch script that trains", slurm),
    "export": (
        "write what was trained for diffusers, ComfyUI and other programs",
        partial(run_module, "flux2_ds.commands.export"),
    ),
    "sample": (
        "render prompts without and with the trained weights",
        partial(run_module, "flux2_ds.commands.sample"),
    ),
    "report": (
        "write what a run did as one HTML page, or several runs beside each other",
        partial(run_module, "flux2_ds.commands.report"),
    ),
    "dashboard": (
        "make a W&B workspace for a project's runs",
        partial(run_module, "flux2_ds.commands.dashboard"),
    ),
    "bench": ("time the recipe's training step, without model files or data", bench),
    "quality": (
        "compare training over quantized bases with training over the plain one",
        partial(run_module, "flux2_ds.commands.quality"),
    ),
    "bench-data": (
        "measure the loader against the disk and plain WebDataset",
        partial(run_module, "flux2_ds.commands.bench_data"),
    ),
    "tiny": (
        "make a tiny FLUX.2 model directory, for tests",
        partial(run_module, "flux2_ds.commands.tiny", DS_ACCELERATOR="cpu"),
    ),
}
