"""How a command ends."""

import signal
import subprocess
import sys


def test_an_interrupt_is_one_line_and_no_traceback():
    script = "import flux2_ds; raise KeyboardInterrupt"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ended.stderr == "interrupted\n"
    assert ended.returncode == -signal.SIGINT
    script = "import flux2_ds; raise ValueError('a defect')"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "Traceback" in ended.stderr and "a defect" in ended.stderr
