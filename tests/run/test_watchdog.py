"""What a failing, killed or stuck process leaves for the others."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flux2_ds.run import watchdog
from flux2_ds.run.watchdog import Failure, Heartbeat, diagnose, first_failure, forget

ROOT = Path(watchdog.__file__).parents[2]
PROCESS = """\
import sys, time
from pathlib import Path
from flux2_ds.run import watchdog
from flux2_ds.errors import OutageError, UserError
watchdog._BEAT, watchdog._SILENT, watchdog._GRACE = 0.1, 1.0, 0.5
watchdog._POLL = float(sys.argv[5])
logs, rank, hang_timeout_s, program = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
with watchdog.Watchdog(logs, rank, 2, hang_timeout_s=hang_timeout_s) as me:
    while not (logs / f"rank_{1 - rank}.json").exists():
        time.sleep(0.02)
    me.heartbeat(7, "computing")
    time.sleep(0.3)  # both know each other
    exec(program)
"""
WAITS = "time.sleep(60)"
NO_LINKS = """
def refused(*_): raise PermissionError(1, 'a file system without hard links')
Path.hardlink_to = refused
"""
LOSES = "time.sleep(0.1); raise RuntimeError('[gloo/pair.cc] Connection closed by peer')"


def pair(
    logs: Path, first: str, second: str, hang_timeout_s: float = 0.0, poll: float = 0.05
) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, (logs, rank, hang_timeout_s, program, poll))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(watchdog.__file__).parents[2],
        )
        for rank, program in enumerate((first, second))
    ]


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    outputs = [process.communicate(timeout=30)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize(("other", "prelude"), [(WAITS, NO_LINKS), (LOSES, "")])
def test_the_first_cause_alone_reaches_the_console(tmp_path, other, prelude):
    fails = f"{prelude}raise ValueError('a bad shard')"
    codes, (first, second) = ended(pair(tmp_path, other, fails))
    assert codes == [1, 1]
    assert first == ""  # the process that only lost its peer
    assert second.startswith("Traceback")
    assert ", computing in step 7: ValueError: a bad shard\n" in second
    assert second.endswith(f"its log: {tmp_path}/rank_1.log\n")
    assert "a bad shard" in (tmp_path / "rank_1.log").read_text()
    assert ("Connection closed" in (tmp_path / "rank_0.log").read_text()) == (other == LOSES)
    assert "rank 1" in str(first_failure(tmp_path))


def test_a_user_error_is_one_line_from_all_processes_together(tmp_path):
    refuse = r"raise UserError('data.shards x\udcff is wrong')"  # a byte of a file's name that is no UTF-8
    codes, outputs = ended(pair(tmp_path, refuse, refuse))
    assert codes == [2, 2]
    assert "".join(outputs) == "error: data.shards x\\udcff is wrong\n"


def test_an_outage_is_one_line_that_a_restart_may_mend(tmp_path):
    codes, outputs = ended(pair(tmp_path, "raise OutageError('the store is away')", WAITS))
    assert codes == [1, 1]
    assert "Traceback" not in outputs[0]
    assert outputs[0].startswith("error: rank 0 on ") and "the store is away\n" in outputs[0]


def test_another_starts_failure_ends_nothing_and_hides_nothing(tmp_path):
    foreign = """
from dataclasses import asdict
import json
failure = watchdog.Failure('rank 1', 'connection refused', 1, time.time(), 'another start')
(logs / watchdog.FAILURE_NAME).write_text(json.dumps(asdict(failure)))
time.sleep(1)
"""
    codes, outputs = ended(pair(tmp_path, foreign, "time.sleep(1)"))
    assert (codes, outputs) == ([0, 0], ["", ""])
    codes, outputs = ended(pair(tmp_path, foreign + "raise ValueError('own')", WAITS))
    assert codes == [1, 1] and "ValueError: own" in outputs[0]
    found = first_failure(tmp_path)
    assert found is not None and "own" in found.reason


@pytest.mark.parametrize(
    ("variables", "same"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, f"process {os.getppid()}"),
        ({"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MASTER_PORT": "5"}, " here 5"),
        ({"WORLD_SIZE": "4", "MASTER_PORT": "5"}, " here 5"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_JOB_ID": "9"}, "9 here "),
    ],
)
def test_all_processes_of_a_start_name_it_alike(monkeypatch, variables, same):
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"MASTER_ADDR": "here"} | variables).items():
        monkeypatch.setenv(name, value)
    assert watchdog.this_start() == same


@pytest.mark.parametrize(("kind", "code"), [("ValueError", 1), ("UserError", 2)])
def test_a_full_disk_does_not_hide_the_error(tmp_path, kind, code):
    fails = f"""
import pathlib
def full(*_): raise OSError(28, 'No space left on device')
pathlib.Path.write_text = full
raise {kind}('what went wrong')
"""
    (process, other) = pair(tmp_path, fails, "pass")
    out = process.communicate(timeout=30)[0]
    assert process.returncode == code
    assert "what went wrong" in out
    assert "the other processes are not told: [Errno 28] No space left on device" in out
    other.communicate()


@pytest.mark.parametrize("poll", [0.05, 5.0])  # killed after the others have looked, and before
def test_a_killed_process_is_named_by_the_others(tmp_path, poll):
    killed = "import os; os.kill(os.getpid(), 9)"
    codes, (first, _) = ended(pair(tmp_path, LOSES, killed, poll=poll))
    assert codes == [1, -9]
    assert "rank 1 on" in first
    assert "it was killed" in first
    assert "Connection closed" not in first


def test_a_process_that_ends_is_not_missed(tmp_path):
    codes, outputs = ended(pair(tmp_path, "time.sleep(1)", "pass"))
    assert (codes, outputs) == ([0, 0], ["", ""])
    assert first_failure(tmp_path) is None


def test_the_process_that_the_others_wait_for_is_named(tmp_path):
    stuck = "me.heartbeat(8, 'waiting for data'); time.sleep(60)"
    waiting = "me.heartbeat(8, 'computing'); time.sleep(60)"
    codes, outputs = ended(pair(tmp_path, waiting, stuck, hang_timeout_s=1))
    assert codes == [1, 1]
    assert "rank 1 on" in outputs[0]
    assert "waiting for data in step 8: no progress for 1 s" in outputs[0]
    # Where it was, for whoever looks into it.
    assert "most recent call first" in (tmp_path / "rank_1.log").read_text()


def test_a_process_that_moves_keeps_the_others_waiting(tmp_path):
    """One writes a checkpoint for all, tensor by tensor; then it is stuck."""
    waits = "me.heartbeat(8, 'saving'); time.sleep(60)"
    writes = "for _ in range(30): me.heartbeat(8, 'saving'); time.sleep(0.1)\ntime.sleep(60)"
    started = time.monotonic()
    codes, (first, _) = ended(pair(tmp_path, waits, writes, hang_timeout_s=2))
    assert codes == [1, 1]
    assert "saving in step 8: no progress for" in first
    assert time.monotonic() - started > 5  # 3 of writing and 2 of standing still


def test_what_belongs_to_no_step_is_no_hang(tmp_path):
    ends = "me.heartbeat(0, 'closing the metrics'); time.sleep(2)"
    assert ended(pair(tmp_path, ends, ends, hang_timeout_s=1)) == ([0, 0], ["", ""])


def test_a_frozen_process_is_named(tmp_path):
    processes = pair(tmp_path, WAITS, "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", 2)
    out, _ = processes[0].communicate(timeout=30)
    assert processes[0].returncode == 1
    assert "rank 1 on" in out and "it is frozen, or its host is lost" in out
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].communicate()


def test_a_suspended_machine_is_no_hang(tmp_path):
    """All its processes stand still for longer than the hang timeout, and then go on."""
    works = """
for _ in range(6):
    for _ in range(10):
        time.sleep(0.05)
    me.heartbeat(8, 'computing')
"""
    processes = pair(tmp_path, works, works, hang_timeout_s=1.5)
    while "computing" not in state_of(tmp_path, 1):
        time.sleep(0.02)
    time.sleep(0.5)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.kill(process.pid, number)
        time.sleep(3 if number == signal.SIGSTOP else 0)
    assert ended(processes) == ([0, 0], ["", ""])


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_clock_that_is_set_is_no_hang_and_hides_no_failure(tmp_path, seconds):
    is_set = f"""
real = time.time
time.time = lambda: real() + {seconds}
time.sleep(0.5)
for _ in range(20):
    me.heartbeat(8, 'computing')
    time.sleep(0.1)
"""
    fails = is_set + "raise ValueError('a bad shard')"
    codes, (first, second) = ended(pair(tmp_path, is_set + WAITS, fails, hang_timeout_s=1))
    assert (codes, first) == ([1, 1], "")
    assert "a bad shard" in second


def state_of(logs: Path, rank: int) -> str:
    path = logs / f"rank_{rank}.json"
    return path.read_text() if path.exists() else ""


def test_diagnosis():
    beats = [Heartbeat(rank, f"node{rank // 2}", 1, 0, 12, "computing") for rank in range(4)]
    behind, why = diagnose(beats, set())
    assert "all 4 ranks wait there; is the network of node0, node1 down?" in why
    behind, why = diagnose([*beats[:3], replace(beats[3], step=11, phase="saving")], set())
    assert behind.rank == 3 and "stuck" in why
    behind, why = diagnose([replace(beats[0], ended=True, step=1), *beats[1:]], set())
    assert "all 3 ranks" in why
    behind, why = diagnose(beats, {1})
    assert behind.rank == 1 and "frozen" in why


def test_a_process_of_any_name_is_known():
    name, ticks = Path(f"/proc/{os.getpid()}/comm"), watchdog.start_ticks(os.getpid())
    before = name.read_bytes()
    name.write_bytes(b"pytest \xc3) Z 1")  # cut within a character, and like another process
    try:
        assert watchdog.start_ticks(os.getpid()) == ticks is not None
    finally:
        name.write_bytes(before)


def test_an_earlier_start_is_forgotten(tmp_path):
    old = Failure("rank 0", "x", 1, time.time() - 60)
    (tmp_path / watchdog.FAILURE_NAME).write_text(json.dumps(vars(old)))
    (tmp_path / "rank_0.json").write_text("{}")
    (tmp_path / "rank_7.json").write_text("{}")
    (tmp_path / "rank_7-copy.json").write_text("{}")
    (tmp_path / "rank_0.log").write_text("kept")
    assert first_failure(tmp_path) == old
    assert first_failure(tmp_path, time.time() - 30) is None
    forget(tmp_path, 1, before=old.time)
    assert first_failure(tmp_path) == old
    forget(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("rank_0.json", "rank_0.log", "rank_7-copy.json")
    }


@pytest.mark.parametrize(("name", "ends"), [("deepspeed.launcher.launch", True), ("sh", False)])
def test_a_rank_goes_with_deepspeeds_launcher_but_not_with_a_shell(tmp_path, name, ends):
    rank = (
        "import sys, time; from pathlib import Path; from flux2_ds.run.watchdog import Watchdog\n"
        "with Watchdog(Path(sys.argv[1]), 0, 1, hang_timeout_s=0):\n    time.sleep(4)"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[2:]])"
    launcher = subprocess.Popen([sys.executable, "-c", parent, name, rank, str(tmp_path)], cwd=ROOT)
    while not (tmp_path / "rank_0.json").exists():
        time.sleep(0.05)
    pid = json.loads((tmp_path / "rank_0.json").read_text())["pid"]
    launcher.kill()
    launcher.wait()
    time.sleep(1)
    alive = psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    assert alive != ends
