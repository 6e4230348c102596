"""Run commands here and turn signals into a request to save and stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

from flux2_ds.errors import EXIT_STOPPED
from flux2_ds.ranks import checked_port
from flux2_ds.recipe import Launch
from launcher.commands import TRAIN_MODULE, Command, train_commands
from launcher.hosts import Hosts, pick_port

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
