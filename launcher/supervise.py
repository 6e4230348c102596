"""Run a job to its end: start it, forward signals, say what ended it, start it again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Launch, Recipe
from flux2_ds.data.index import INDEX_NAME
from flux2_ds.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from flux2_ds.prepare.folder import check_folder, lock_folder
from flux2_ds.prepare.manifest import manifest_paths
from flux2_ds.run.logging import clear_line
from flux2_ds.run.run_dir import (
    is_finished,
    lock_run_dir,
    logs_directory,
    newest_step,
    prepare_logs_directory,
    stop_file,
)
from flux2_ds.run.watchdog import Failure, first_failure, forget, unended
from launcher.commands import PREPARE, TRAIN, Command, ssh, start_commands
from launcher.hosts import Hosts, on_hosts

PATIENCE = 15.0  # s that the other hosts get to end by themselves after the first has failed
_PAUSE = 5.0  # s before a restart, for ports and GPU memory to be free again
ENDED_EARLY = "DeepSpeed's launcher ended too early, perhaps killed"
_POLL = 0.2  # s between looks at the commands
_EXIT_SSH = 255
_FAREWELL = 5.0  # s for a reaper to end its command; over a link that is cut it never hears of it
_REPEAT = 1.0  # s after which the request to stop is repeated
_VISIBLE = 60.0  # s after which a shared file system shows other hosts' files
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopper:
    """A context in which the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks the ranks to save and stop,
    and the second ends them at once.

    The request is `stop_file`, for which the ranks look at every step, on whatever host they are. It
    is repeated until they have ended, because a trainer that is just starting removes what it takes
    for an earlier request. DeepSpeed's own launchers would signal the processes one after the other
    and kill those still saving after 30 s, so they are left out of this. Without a `stop_file` there
    is nothing to save, and the first signal ends at once.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self._file = stop_file
        self._repeated = 0.0
        self.reason: str | None = None
        self.code: int | None = None
        """The exit code, once all is to be ended at once."""

    def __enter__(self) -> Stopper:
        self._forget()
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number in _SIGNALS:  # the work is done, and the exit code decided
            signal.signal(number, signal.SIG_IGN)
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
                    print_line(f"the ranks cannot be asked to stop: {error} (again: end at once)")

    def _forget(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._file is not None and self.reason is None:
            print_line(
                f"{name}: after this step or the next, save a checkpoint and stop (again: end at once)"
            )
        elif self.code is None:
            self.code = 128 + number
            again = "" if self._file is None else " again, without a checkpoint"
            print_line(f"{name}{again}: ending at once")
        self.reason = self.reason or name


def run(
    commands: list[Command],
    stopper: Stopper,
    failed: Callable[[], object] = lambda: None,
    output: int | None = None,
) -> int:
    """Run `commands` side by side to their end; return the exit code of the first that failed.

    When one has failed, or `failed` returns a failure of a rank, the others get some seconds to end by
    themselves. `output` is a descriptor to print to instead of the console's.
    """
    children: list[subprocess.Popen[bytes]] = []
    code, deadline = 0, float("inf")
    try:
        for command in commands:
            if stopper.reason is not None:
                return stopper.code or EXIT_STOPPED
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
                _name_hosts(commands, codes)
            if None not in codes or stopper.code or time.monotonic() > deadline:
                break
            stopper.pass_on()
            for child in children:
                _keep_alive(child)
            time.sleep(_POLL)
    finally:
        _end(children)
    code = code or next(filter(None, (child.returncode for child in children)), 0)
    return stopper.code or (code if code >= 0 else 128 - code)


def _name_hosts(commands: list[Command], codes: list[int | None]) -> None:
    """Name the hosts whose command has ended first, unless that was on request."""
    for command, code in zip(commands, codes, strict=True):
        if command.host and code and code != EXIT_STOPPED:
            why = "ssh lost it or did not reach it" if code == _EXIT_SSH else f"with code {code}"
            print_line(f"{command.host} ended first: {why}")


def _keep_alive(child: subprocess.Popen[bytes]) -> None:
    """Tell a command's reaper that this launcher is still there."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(b"\n")


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """Have their reapers kill what is left of the commands and of all that they started."""
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


def print_line(line: str) -> None:
    """Write a line in one call: a signal may come while another one's handler is writing, which a
    buffered stream does not survive. That nobody reads it does not end a run."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, clear_line(1) + f"{line}\n".encode())


@dataclass(frozen=True)
class Job:
    """A module that runs on all ranks, and what its files say of it."""

    module: str
    logs: Path
    stop_file: Path | None
    lock: Callable[..., IO[str]]
    """Holds its directory, under the name that is given or as rank 0 does."""
    progress: Callable[[], int]
    """Grows with what a restart need not do again."""
    reached: str
    """Says it in words."""
    missing: Callable[[], str]
    """Says why the job is not done; empty if it is."""
    fits: Callable[[int], object] = lambda processes: None
    """Refuses a number of processes that the job cannot have."""


def train_job(recipe: Recipe) -> Job:
    """Return the job that trains: done with a checkpoint of the last step."""

    def missing() -> str:
        newest = newest_step(recipe)
        if is_finished(recipe, newest):
            return ""
        return f"the newest checkpoint in {recipe.run_dir} is of step {newest}, steps is {recipe.steps}"

    return Job(
        TRAIN,
        logs_directory(recipe),
        stop_file(recipe),
        partial(lock_run_dir, recipe),
        partial(newest_step, recipe),
        "step {}",
        missing,
        partial(make_plan, recipe),
    )


def prepare_job(recipe: Recipe) -> Job:
    """Return the job that prepares: done with an index that it has written."""
    folder = check_folder(recipe.data.shards)
    index = folder / INDEX_NAME
    before = modified(index)  # every start that is not refused writes the index anew
    return Job(
        PREPARE,
        prepare_logs_directory(recipe),
        None,
        partial(lock_folder, folder),
        lambda: len(manifest_paths(folder)),
        "{} shards",
        lambda: "" if modified(index) != before else f"{index} has not been written",
    )


def modified(path: Path) -> int:
    """When a file was last written, in ns; 0 if there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def supervise(
    job: Job,
    launch: Launch,
    hosts: Hosts,
    arguments: list[str],
    *,
    max_restarts: int,
    elastic: bool,
    node: int | None,
) -> int:
    """Run the job, and run it again after a failure; return the last exit code.

    At most `max_restarts` failures in a row are answered that came without progress. With `elastic`,
    hosts of the hostfile that do not answer are left out of a restart, and back in a later one.
    `node`: only this host's part, here.
    """
    answered = 0
    now = hosts
    with Stopper(job.stop_file) as stopper:
        while True:
            commands = start_commands(job.module, launch, now, arguments, node=node)
            for command in commands:
                print_line(str(command))
            if commands[0].argv[0] == "deepspeed":
                print_line("loading torch and DeepSpeed takes some 10 s")
            if not node:
                forget(job.logs)
            before, started, clock = job.progress(), time.time(), time.monotonic()
            # Rank 0's launcher, which may start later, forgets an earlier start's failure.
            failed = partial(first_failure, job.logs, started if node else 0.0)
            code = run(commands, stopper, failed)
            if stopper.code:
                return stopper.code
            code = _judge(job, code, failed(), now, node)
            if code in (0, EXIT_STOPPED, EXIT_USER_ERROR) or stopper.reason is not None:
                return code
            step = job.progress()
            at = job.reached.format(step)
            answered = 0 if step > before else answered
            if answered == max_restarts:
                if max_restarts:
                    print_line(f"{max_restarts} restarts came no further than {at}; giving up")
                return code
            answered += 1
            print_line(
                f"ended after {time.monotonic() - clock:.0f} s; restart {answered} of {max_restarts} in "
                f"{_PAUSE:.0f} s from {at}"
            )
            _wait(_PAUSE, stopper)
            if elastic:
                now = remaining(job, hosts)


def _judge(job: Job, code: int, failure: Failure | None, hosts: Hosts, node: int | None) -> int:
    """Return the code that the job has earned, and say why if no rank has."""

    def missing() -> str:
        # Of the ranks of other launchers nobody here can tell when they end.
        ranks = [r for r in unended(job.logs) if node is None or r.host == socket.gethostname()]
        return job.missing() or "; ".join(map(str, ranks))

    if failure is not None:
        return failure.code
    if code in (EXIT_STOPPED, EXIT_USER_ERROR):
        return code
    if code == 0:
        # DeepSpeed's launcher ends with 0 when what started the ranks was killed. A rank may be killed while it makes
        # the last previews, too, after the last checkpoint.
        deadline = time.monotonic() + (0 if hosts.hostfile is None else _VISIBLE)
        while (why := missing()) and time.monotonic() < deadline:
            time.sleep(_POLL)
        if not why:
            return 0
        print_line(f"error: {ENDED_EARLY}: {why}")
    else:
        print_line(f"error: {what_ended(code, job.logs)}")
    return EXIT_FAILURE


def what_ended(code: int, logs: Path | None = None) -> str:
    """Say what a command's exit code means of whose failure no rank has left a record."""
    # 256 - N comes from DeepSpeed's launcher, which saw a rank end by signal N; 128 + N from the reaper.
    of_rank = 192 < code < _EXIT_SSH
    number = 256 - code if of_rank else code - 128
    if number not in {*signal.Signals}:
        return f"code {code}, without a record of it" + (f"; the logs: {logs}" if logs else "")
    ranks = [str(place) for place in unended(logs)] if logs and of_rank else []
    who = "; ".join(ranks) or ("a rank" if of_rank else "the launched process")
    memory = " (out of memory? see dmesg)" if number == signal.SIGKILL else ""
    return f"{who}: killed by {signal.Signals(number).name}{memory}"


def _wait(seconds: float, stopper: Stopper) -> None:
    """Sleep, but not on when asked to stop."""
    end = time.monotonic() + seconds
    while stopper.reason is None and time.monotonic() < end:
        time.sleep(0.1)


def remaining(job: Job, hosts: Hosts) -> Hosts:
    """Return the hosts that answer, with as many processes as the job can have.

    The data order does not depend on the number of processes, so the run stays the same.
    """
    if hosts.hostfile is None:
        return hosts
    alive = answering(list(hosts.slots))
    for name in hosts.slots.keys() - alive:
        print_line(f"{name} does not answer over ssh; going on without it")
    slots = fit(job.fits, {name: n for name, n in hosts.slots.items() if name in alive})
    if not slots:
        raise UserError(f"no host of {hosts.hostfile} answers over ssh.")
    if slots == hosts.slots:
        return hosts
    path = job.logs / "hostfile"
    path.parent.mkdir(parents=True, exist_ok=True)  # a host may have been down from the start
    path.write_text("".join(f"{name} slots={count}\n" for name, count in slots.items()))
    return on_hosts(path, slots)


def answering(names: list[str]) -> set[str]:
    """Return those of the hosts on which a command runs over ssh."""

    def answers(name: str) -> bool:
        argv = ssh(name, ["true"], {})
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(argv, capture_output=True, timeout=30).returncode == 0
        return False

    with ThreadPoolExecutor(32) as pool:
        return {name for name, there in zip(names, pool.map(answers, names), strict=True) if there}


def fit(fits: Callable[[int], object], slots: dict[str, int]) -> dict[str, int]:
    """Return the largest part of `slots`, in order, of which `fits` does not refuse the number."""
    for processes in range(sum(slots.values()), 0, -1):
        with contextlib.suppress(UserError):
            fits(processes)
            chosen, left = {}, processes
            for name, count in slots.items():
                chosen[name] = min(count, left)
                left -= chosen[name]
            return {name: count for name, count in chosen.items() if count}
    return {}
