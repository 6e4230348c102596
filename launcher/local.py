"""Run a command here and pass signals on to the training processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType

import psutil

from launcher.commands import TRAIN_MODULE, Command


def run(command: Command) -> int:
    """Run `command` to its end and return its exit code.

    The first SIGINT, SIGTERM or SIGUSR1 asks the training processes to save and stop; the second
    ends everything at once. DeepSpeed's own launcher would signal the processes one after the other
    and kill those still saving after 30 s, so it is left out of this.
    """
    program = Path(sys.executable).with_name(command.argv[0])
    argv = [str(program) if program.exists() else command.argv[0], *command.argv[1:]]
    # A session of its own: Ctrl-C on the terminal reaches this process alone.
    child = subprocess.Popen(
        argv, env={**os.environ, **command.environment}, start_new_session=True
    )
    asked = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        workers = training_processes(child.pid)
        if asked or not workers:
            os.killpg(child.pid, signal.SIGKILL)
            return
        asked = True
        name = signal.Signals(number).name
        print(f"{name}: saving a checkpoint, then stopping (once more to kill)", flush=True)
        for worker in workers:
            worker.send_signal(signal.SIGUSR1)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    code = child.wait()
    return code if code >= 0 else 128 - code


def training_processes(root: int) -> list[psutil.Process]:
    """The processes below `root` that run the trainer itself, not a launcher of it."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            line = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(pair == ("-m", TRAIN_MODULE) for pair in pairwise(line)):
            found.append(process)
    return found
