"""Run a training to its end: start it, say what ended it, start it again, on fewer hosts if need be."""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from flux2_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from flux2_ds.lookout import first_failure, forget
from flux2_ds.plan import make_plan
from flux2_ds.recipe import Recipe
from flux2_ds.rundir import logs_directory, newest_step, stop_file
from launcher.commands import ssh
from launcher.hosts import Hosts, on_hosts
from launcher.local import Stopper, commands_here, run

_PAUSE = 5.0  # s before a restart, for ports and GPU memory to be free again


def supervise(
    recipe: Recipe,
    hosts: Hosts,
    arguments: list[str],
    *,
    max_restarts: int,
    elastic: bool,
    node: int | None = None,
) -> int:
    """Train, and train again after a failure; returns the last exit code.

    At most `max_restarts` failures in a row are answered that came before the next checkpoint. With
    `elastic`, hosts of the hostfile that do not answer are left out of a restart, and back in a later
    one. `node`: only this host's part, here.
    """
    logs = logs_directory(recipe)
    answered = 0
    now = hosts
    with Stopper(stop_file(recipe)) as stopper:
        while True:
            commands = commands_here(recipe.launch, now, arguments, node=node)
            for command in commands:
                report(str(command))
            if not node:
                forget(logs)
            before, started = newest_step(recipe), time.time()
            # The first host's launcher, which may start later, forgets an earlier start's failure.
            failed = partial(first_failure, logs, started if node else 0.0)
            code = run(commands, stopper, failed)
            failure = failed()
            if failure is not None:
                code = failure.code
            elif code not in (0, EXIT_STOPPED, EXIT_USER_ERROR) and not stopper.reason:
                report(f"the training ended with code {code} and left no error; its logs: {logs}")
            if code in (0, EXIT_STOPPED, EXIT_USER_ERROR) or stopper.reason is not None:
                return code
            step = newest_step(recipe)
            answered = 0 if step > before else answered
            if answered == max_restarts:
                if max_restarts:
                    report(f"{max_restarts} restarts came no further than step {step}; giving up")
                return code
            answered += 1
            report(
                f"ended after {time.time() - started:.0f} s; restart {answered} of {max_restarts} in "
                f"{_PAUSE:.0f} s from step {step}"
            )
            wait(_PAUSE, stopper)
            if elastic:
                now = remaining(recipe, hosts)


def report(line: str) -> None:
    """A line of the launcher's own."""
    print(line, flush=True)


def wait(seconds: float, stopper: Stopper) -> None:
    """Sleep, but not on when asked to stop."""
    end = time.monotonic() + seconds
    while stopper.reason is None and time.monotonic() < end:
        time.sleep(0.1)


def remaining(recipe: Recipe, hosts: Hosts) -> Hosts:
    """The hosts that answer, with as many processes as divide the global batch.

    The data order does not depend on the number of processes, so the run stays the same.

    Raises:
        UserError: no host answers.
    """
    if hosts.hostfile is None:
        return hosts
    alive = answering(list(hosts.slots))
    for name in hosts.slots.keys() - alive:
        report(f"{name} does not answer over ssh; going on without it")
    slots = {name: count for name, count in hosts.slots.items() if name in alive}
    fitting = fit(recipe, slots)
    if not fitting:
        raise UserError(f"no host of {hosts.hostfile} answers over ssh.")
    if fitting == hosts.slots:
        return hosts
    path = logs_directory(recipe) / "hostfile"
    path.parent.mkdir(parents=True, exist_ok=True)  # a host may have been down from the start
    path.write_text("".join(f"{name} slots={count}\n" for name, count in fitting.items()))
    return on_hosts(path, fitting)


def answering(names: list[str]) -> set[str]:
    """Those of the hosts on which a command runs over ssh."""

    def answers(name: str) -> bool:
        try:
            asked = subprocess.run(
                ssh(name, ["true"]), capture_output=True, check=False, timeout=30
            )
        except subprocess.TimeoutExpired:
            return False
        return asked.returncode == 0

    with ThreadPoolExecutor(32) as pool:
        return {name for name, there in zip(names, pool.map(answers, names), strict=True) if there}


def fit(recipe: Recipe, slots: dict[str, int]) -> dict[str, int]:
    """The largest part of `slots`, in order, whose processes divide the global batch."""
    for processes in range(sum(slots.values()), 0, -1):
        try:
            make_plan(recipe, processes)
        except UserError:
            continue
        chosen, left = {}, processes
        for name, count in slots.items():
            chosen[name] = min(count, left)
            left -= chosen[name]
        return {name: count for name, count in chosen.items() if count}
    return {}
