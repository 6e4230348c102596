"""`python -m launcher.reaper SECONDS COMMAND`: runs a command until its launcher is gone.

Its input is the launcher's sign of life, a line every fifth of a second. When the input ends because
the launcher was killed, or is silent for SECONDS because the link between them is cut, everything that
the command started is killed, so that no training process is left holding GPUs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time


def main() -> None:
    """Run the command of the arguments and pass its exit code on."""
    silence, argv = float(sys.argv[1]), sys.argv[2:]
    slots = os.environ.pop("FLUX2_DS_SLOTS", None)
    if slots is not None:
        cores = os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(slots))))
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
    heard = time.monotonic()
    while child.poll() is None:
        ready, _, _ = select.select([0], [], [], 0.2)
        if ready:
            heard = time.monotonic()
        if (ready and not os.read(0, 4096)) or time.monotonic() - heard > silence:
            break
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
