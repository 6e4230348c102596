"""The first process's log."""

import logging
import subprocess
import sys
from pathlib import Path

from flux2_ds.run.logging import once

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
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=root)
    lines = done.stderr.splitlines()
    said = [line for line in lines if "lines are missing" in line]
    assert len(said) == 1 and said[0].startswith(f"lines are missing in {tmp_path}/rank_0.log")
    assert "File too large" in said[0]
    assert [line.split(" ", 1)[1] for line in lines if line not in said] == [
        "first",
        *(f"line {number}" for number in range(999)),
    ]
    assert (tmp_path / "rank_0.log").read_text().endswith("first\n")


def test_a_message_that_repeats_passes_once(caplog):
    log = logging.getLogger("once")
    log.addFilter(once("cache flushes"))
    for number in (1, 2, 1):
        log.warning("%d cache flushes", number)
        log.warning("%d steps", number)
    assert caplog.messages == ["1 cache flushes", "1 steps", "2 steps", "1 steps"]
