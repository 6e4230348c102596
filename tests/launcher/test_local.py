"""Commands that run here, and the signals that reach them."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flux2_ds.errors import EXIT_STOPPED
from launcher.commands import Command
from launcher.supervise import Stopper, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stopper(tmp_path: Path) -> Stopper:
    """Without its handlers, which are for the whole process."""
    return Stopper(tmp_path / "stop")


def test_exit_code_of_the_command_is_passed_on(stopper):
    ends = Command(["sh", "-c", 'test "$DS_ACCELERATOR" = cuda && exit 75'], {})
    ends = dataclasses.replace(ends, environment={"DS_ACCELERATOR": "cuda"})
    assert run([ends], stopper) == 75
    assert run([Command(["sh", "-c", "kill -9 $$"], {})], stopper) == 128 + 9


def test_the_first_failure_ends_the_other_commands(stopper, monkeypatch):
    monkeypatch.setattr("launcher.supervise.PATIENCE", 0.5)
    fails, hangs = (Command(["sh", "-c", line], {}) for line in ("exit 3", "sleep 60; sleep 60"))
    assert run([hangs, fails], stopper) == 3
    assert run([hangs], stopper, lambda: True) == 128 + 9


def test_a_host_that_is_not_reached_is_named_even_if_no_other_is(stopper, monkeypatch, capfd):
    monkeypatch.setattr(Command, "program", lambda self: ["sh", "-c", "exit 255"])
    assert run([Command([], {}, "node01")], stopper) == 255
    assert capfd.readouterr().out == "node01 ended first: ssh lost it or did not reach it\n"


def test_a_signal_before_the_start_starts_nothing(stopper, tmp_path):
    stopper.reason = "SIGTERM"
    assert run([Command(["touch", str(tmp_path / "started")], {})], stopper) == EXIT_STOPPED
    assert not (tmp_path / "started").exists()


LAUNCH = """\
import sys
from pathlib import Path
from launcher.commands import Command
from launcher.supervise import Stopper, run
stop, child = sys.argv[1:]
with Stopper(Path(stop)) as stopper:
    sys.exit(run([Command(["python", "-c", child, stop], {})], stopper))
"""
START = """\
import subprocess, sys, time
from pathlib import Path
stop = Path(sys.argv[1])
print("up, asked to stop:", stop.exists(), flush=True)
"""
OBEYS = f"""{START}
while not (stop.exists() and stop.read_text()):
    time.sleep(0.02)
first = stop.read_text()
stop.unlink()  # as a trainer does with what may be an earlier request
while not (stop.exists() and stop.read_text()):
    time.sleep(0.02)
print("saved because of", first, flush=True)
sys.exit({EXIT_STOPPED})
"""
IGNORES = f"""{START}
subprocess.run(["sleep", "60"])
"""


def launch(stop: Path, child: str, *before: str) -> subprocess.Popen[str]:
    """`run` in a process of its own, with the child up."""
    argv = [*before, sys.executable, "-c", LAUNCH, str(stop), child]
    launched = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert launched.stdout is not None
    assert launched.stdout.readline() == "up, asked to stop: False\n"
    return launched


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_first_signal_asks_the_trainer_to_save_and_stop(tmp_path, name):
    launched = launch(tmp_path / "runs" / "cats" / "stop", OBEYS)
    launched.send_signal(signal.Signals[name])
    out, _ = launched.communicate(timeout=30)
    said, saved = out.splitlines()
    assert said.startswith(f"{name}: after this step")
    assert saved == f"saved because of {name}"
    assert launched.returncode == EXIT_STOPPED
    assert not (tmp_path / "runs" / "cats" / "stop").exists()  # the next start does not stop


def test_second_signal_ends_everything_at_once(tmp_path):
    stop = tmp_path / "stop"
    stop.write_text("an earlier run's")
    launched = launch(stop, IGNORES)
    launched.send_signal(signal.SIGTERM)
    assert launched.stdout.readline().startswith("SIGTERM: after this step")
    launched.send_signal(signal.SIGINT)
    # Ends only when the grandchild, which has the same output, is gone too.
    out, _ = launched.communicate(timeout=30)
    assert out == "SIGINT again: ending at once, without a checkpoint\n"
    assert launched.returncode == 128 + 9


def test_nothing_is_left_when_the_launcher_is_killed(tmp_path):
    launched = launch(tmp_path / "stop", IGNORES)
    launched.kill()
    launched.communicate(
        timeout=30
    )  # ends only when the grandchild, which has the same output, does


def test_a_keeper_ends_its_command_when_its_launcher_is_silent():
    argv = [sys.executable, "-m", "launcher.reaper", "0.5", "sleep", "60"]
    keeper = subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=ROOT)
    assert keeper.wait(timeout=30) == 128 + 9
    assert keeper.stdin is not None
    keeper.stdin.close()


def test_a_full_disk_does_not_keep_the_launcher_from_asking(stopper, monkeypatch, capfd):
    def full(path: Path, text: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    stopper.reason = "SIGINT"
    stopper.pass_on()
    assert (tmp := Path(stopper._file)).exists() and tmp.read_text() == ""


def test_nohup_is_respected(tmp_path):
    launched = launch(tmp_path / "stop", OBEYS, "nohup")
    launched.send_signal(signal.SIGHUP)
    launched.send_signal(signal.SIGTERM)
    out, _ = launched.communicate(timeout=30)
    assert "saved because of SIGTERM" in out
