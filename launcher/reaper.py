"""`python -m launcher.reaper SECONDS COMMAND`: runs a command and leaves nothing of it behind.

Its input is the launcher's sign of life, a line every fifth of a second. When the input ends because
the launcher was killed, or is silent for SECONDS because the link between them is cut, everything that
the command started is killed, so that no training process is left holding GPUs. Two processes watch
each other, so that it is also killed when one of them is.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from typing import NoReturn

_POLL = 0.2  # s


def main() -> None:
    """Run the command of the arguments and pass its exit code on."""
    silence, argv = float(sys.argv[1]), sys.argv[2:]
    slots = os.environ.pop("FLUX2_DS_SLOTS", None)
    if slots is not None:
        threads = (os.cpu_count() or 1) // int(slots)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    lifeline, held = os.pipe()  # its end tells the child that this process is gone
    child = os.fork()
    if child == 0:
        os.close(held)
        os.setsid()
        run(argv, lifeline)
    code, quiet = None, 0.0  # s without a sign, of those in which this process has run
    while code is None and quiet <= silence:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
        elif not select.select([0], [], [], _POLL)[0]:
            quiet += _POLL
        elif os.read(0, 4096):
            quiet = 0.0
        else:
            break
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(child, signal.SIGKILL)
    if code is None:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)


def run(argv: list[str], lifeline: int) -> NoReturn:
    """Run the command in this process's own group; kill the group when the other process is gone."""
    command = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    while command.poll() is None:
        if select.select([lifeline], [], [], _POLL)[0]:
            os.killpg(0, signal.SIGKILL)
    sys.exit(command.returncode if command.returncode >= 0 else 128 - command.returncode)


if __name__ == "__main__":
    main()
