"""The processes of `prepare`."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

# A file, because a spawned process imports it.
PROGRAM = """
import os, time
from tqdm import tqdm
from flux2_ds.prepare.workers import run_tasks

class Sleeper:
    def __init__(self, device):
        os.write(1, b"%d\\n" % os.getpid())

    def __call__(self, task, tick):
        time.sleep(3600)

if __name__ == "__main__":
    list(run_tasks(Sleeper, range(9), ["cpu", "cpu"], tqdm(disable=True)))
"""


def test_a_killed_prepare_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        assert len(set(workers)) == 2
        parent.kill()
        try:
            # The end of the output comes when nobody is left who could write to it.
            assert parent.communicate(timeout=20) == ("", None)
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
