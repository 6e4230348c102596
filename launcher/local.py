"""Run a command here and turn signals into a request to save and stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from launcher.commands import Command


def run(command: Command, stop_file: Path) -> int:
    """Run `command` to its end and return its exit code.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 makes `stop_file`, which the training processes look
    for after every step, on whatever host they are; they save and stop. The second ends everything
    here at once. DeepSpeed's own launchers would signal the processes one after the other and kill
    those still saving after 30 s, so they are left out of this.
    """
    program = Path(sys.executable).with_name(command.argv[0])
    argv = [str(program) if program.exists() else command.argv[0], *command.argv[1:]]
    stop_file.unlink(missing_ok=True)
    # A session of its own: Ctrl-C on the terminal reaches this process alone.
    child = subprocess.Popen(
        argv, env={**os.environ, **command.environment}, start_new_session=True
    )
    asked = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        name = signal.Signals(number).name
        if asked:
            os.killpg(child.pid, signal.SIGKILL)
            say(f"{name} again: ending at once, without a checkpoint")
            return
        asked = True
        stop_file.parent.mkdir(parents=True, exist_ok=True)
        stop_file.write_text(name)
        say(f"{name}: after this step, save a checkpoint and stop (again: end at once)")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, pass_on)
    code = child.wait()
    return code if code >= 0 else 128 - code


def say(line: str) -> None:
    """Write a line in one call: a signal may come while another one's handler is writing, which a
    buffered stream does not survive."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())
