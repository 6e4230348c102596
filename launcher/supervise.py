"""Run a job to its end: start it, forward signals, say what ended it, start it again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Launch, Recipe
from flux2_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from flux2_ds.run.environment import checked_port
from flux2_ds.run.run_dir import logs_directory, newest_step, stop_file
from flux2_ds.run.watchdog import first_failure, forget
from launcher.commands import TRAIN_MODULE, Command, ssh, train_commands
from launcher.hosts import Hosts, on_hosts, pick_port

_POLL = 0.2  # s between looks at the commands
PATIENCE = 15.0  # s that the others get to end by themselves after the first has failed
_EXIT_SSH = 255
_FAREWELL = 5.0  # s for a keeper to end its command; over a link that is cut it never hears of it
_REPEAT = 1.0  # s after which the request to stop is repeated


class Stopper:
    """The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks to save and stop, the second ends at once.

    The request is `stop_file`, which the training processes look for at every step, on whatever
    host they are. It is repeated until they have ended, because a trainer that is just starting
    removes what it takes for an earlier request. DeepSpeed's own launchers would signal the processes
    one after the other and kill those still saving after 30 s, so they are left out of this. Without a
    `stop_file` there is nothing to save, and the first signal ends at once.
    """

    def __init__(self, stop_file: Path | None) -> None:
        self._file = stop_file
        self._repeated = 0.0
        self.reason: str | None = None
        self.at_once = False

    def __enter__(self) -> Stopper:
        self._forget()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._forget()

    def pass_on(self) -> None:
        """Repeat the request, if there is one."""
        due = time.monotonic() - self._repeated > _REPEAT
        if self._file is not None and self.reason is not None and due:
            self._repeated = time.monotonic()
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._file.write_text(self.reason)
            except OSError as error:
                # A full disk has room for an empty file, which is enough.
                if not self._file.exists():
                    say(f"the training cannot be asked to stop: {error} (again: end at once)")

    def _forget(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._file is None:
            self.reason, self.at_once = name, True
            say(f"{name}: ending at once")
        elif self.reason is None:
            self.reason = name
            say(
                f"{name}: after this step or the next, save a checkpoint and stop (again: end at once)"
            )
        elif not self.at_once:
            self.at_once = True
            say(f"{name} again: ending at once, without a checkpoint")


def commands_here(
    launch: Launch,
    hosts: Hosts,
    arguments: list[str],
    module: str = TRAIN_MODULE,
    node: int | None = None,
) -> list[Command]:
    """`train_commands` as started from this machine and this environment; `node`: only the part of
    this host, without ssh, at a port that all hosts know.

    Raises:
        UserError: MASTER_PORT is none.
    """
    port = (
        pick_port(hosts) if node is None else checked_port(os.environ.get("MASTER_PORT", "29500"))
    )
    commands = train_commands(
        launch,
        hosts,
        arguments,
        cores=os.cpu_count() or 1,
        port=port,
        environment=dict(os.environ),
        module=module,
    )
    return commands if node is None else [replace(commands[node], host=None)]


def run(
    commands: list[Command],
    stopper: Stopper,
    failed: Callable[[], object] = lambda: None,
    output: int | None = None,
) -> int:
    """Run `commands` side by side to their end; returns the exit code of the first that failed.

    When one has failed, or `failed` gives a failure of the training, the others get some seconds to end by
    themselves. `output` is a descriptor to print to instead of the console's.
    """
    children: list[subprocess.Popen[bytes]] = []
    code, deadline = 0, float("inf")
    try:
        for command in commands:
            if stopper.reason is not None:
                return EXIT_STOPPED
            # A session of its own: Ctrl-C on the terminal reaches this process alone.
            children.append(
                subprocess.Popen(
                    command.program(),
                    env={**os.environ, **command.environment},
                    stdin=subprocess.PIPE,
                    bufsize=0,
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        while True:
            codes = [child.poll() for child in children]
            code = code or next(filter(None, codes), 0)
            if deadline == float("inf") and (code or failed()):
                deadline = time.monotonic() + PATIENCE
                _say_who(commands, codes)
            if None not in codes:
                break
            if stopper.at_once or time.monotonic() > deadline:
                break
            stopper.pass_on()
            for child in children:
                _keep_alive(child)
            time.sleep(_POLL)
    finally:
        _end(children)
    code = code or next(filter(None, (child.returncode for child in children)), 0)
    return code if code >= 0 else 128 - code


def _say_who(commands: list[Command], codes: list[int | None]) -> None:
    """Name the hosts whose command has ended first, unless that was on request."""
    for command, code in zip(commands, codes, strict=True):
        if command.host and code and code != EXIT_STOPPED:
            why = "ssh lost it or did not reach it" if code == _EXIT_SSH else f"with code {code}"
            say(f"{command.host} ended first: {why}")


def _keep_alive(child: subprocess.Popen[bytes]) -> None:
    """Tell a command's keeper that this launcher is still there; see keeper.py."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(b"\n")


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """Have their keepers kill what is left of the commands and of all that they started."""
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    deadline = time.monotonic() + _FAREWELL
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def say(line: str) -> None:
    """Write a line in one call: a signal may come while another one's handler is writing, which a
    buffered stream does not survive."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


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
