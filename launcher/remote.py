"""`python -m launcher.remote COMMAND`: the far end of ssh.

Runs the command until the near end is gone. Its input is the near end's sign of life, a line every
second: when it ends, or is silent for a minute because the link is cut, everything that the command
started is killed, so that no training process is left holding GPUs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

_SILENCE = 60.0  # s


def main() -> None:
    """Run the command of the arguments and pass its exit code on."""
    slots = int(os.environ.pop("FLUX2_DS_SLOTS", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slots)))
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    heard = time.monotonic()
    while child.poll() is None:
        ready, _, _ = select.select([0], [], [], 0.2)
        if ready:
            heard = time.monotonic()
        if (ready and not os.read(0, 4096)) or time.monotonic() - heard > _SILENCE:
            break
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
