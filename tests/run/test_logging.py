"""Rank 0's log, and the console beside a progress bar."""

import contextlib
import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

from flux2_ds.run.logging import once, stdout_to_stderr

ROOT = Path(__file__).parents[2]
PROGRAM = """\
import logging, resource, sys
from pathlib import Path
from flux2_ds.run.logging import set_up_log
set_up_log(Path(sys.argv[1]), 0)
log = logging.getLogger("flux2_ds")
log.info("first")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for number in range(999):
    log.info("line %d", number)
"""


def test_a_full_disk_is_said_once_and_the_console_has_everything(tmp_path):
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stderr.splitlines()
    said = [line for line in lines if "lines are missing" in line]
    assert len(said) == 1 and said[0].startswith(f"lines are missing in {tmp_path}/rank_0.log")
    assert "File too large" in said[0]
    assert [line.split(" ", 1)[1] for line in lines if line not in said] == [
        "first",
        *(f"line {number}" for number in range(999)),
    ]
    assert (tmp_path / "rank_0.log").read_text().endswith("first\n")


def test_what_libraries_print_leaves_stdout_to_the_result(capfd):
    with stdout_to_stderr():
        print("a library")
        subprocess.run(["echo", "its compiler"], check=True)
    print("the result")
    assert capfd.readouterr() == ("the result\n", "a library\nits compiler\n")


def test_a_message_that_repeats_passes_once(caplog):
    log = logging.getLogger("once")
    log.addFilter(once("cache flushes"))
    for number in (1, 2, 1):
        log.warning("%d cache flushes", number)
        log.warning("%d steps", number)
    assert caplog.messages == ["1 cache flushes", "1 steps", "2 steps", "1 steps"]


BAR = """\
import logging, sys, time
from pathlib import Path
from flux2_ds.run.logging import FILE_ONLY, progress_bar, set_up_log
set_up_log(Path(sys.argv[1]), 0)
log = logging.getLogger("flux2_ds")
bar = progress_bar("training", 3, "step", mininterval=0)
for number in range(3):
    bar.update()
    bar.set_postfix_str(f"loss {number}")
    log.info("line %d", number)
    log.info("detail %d", number, extra=FILE_ONLY)
bar.close()
log.info("done")
"""


def on_terminal(argv: list[str]) -> str:
    """What a command has written to a terminal of 24 lines of 100 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT) as process:
        os.close(slave)
        written = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other end
            while part := os.read(master, 65536):
                written += part
    os.close(master)
    assert process.returncode == 0
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines that a reader sees at last: what comes after a return overwrites the line."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            part = part.removeprefix("\x1b[K")
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_log_lines_stand_above_the_bar(tmp_path):
    written = on_terminal([sys.executable, "-c", BAR, str(tmp_path)])
    assert "training: 100%" in written and "3/3" in written and "loss 2" in written
    lines = [line.split(" ", 1)[-1] for line in screen(written) if line]
    assert lines == ["line 0", "line 1", "line 2", "done"]
    logged = (tmp_path / "rank_0.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in logged] == [
        *("line 0", "detail 0", "line 1", "detail 1", "line 2", "detail 2", "done")
    ]


def test_without_a_terminal_there_is_no_bar(tmp_path):
    argv = [sys.executable, "-c", BAR, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT)
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == [
        *("line 0", "line 1", "line 2", "done")
    ]


def test_a_message_of_another_process_takes_the_bars_place(tmp_path):
    program = (
        "import sys; sys.stderr.write('50% of a bar'); sys.stderr.flush()\n"
        "from launcher.supervise import print_line; print_line('SIGTERM: saving')"
    )
    argv = [sys.executable, "-c", program]
    assert screen(on_terminal(argv))[0] == "SIGTERM: saving"
    piped = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT)
    assert piped.stdout == "SIGTERM: saving\n"
