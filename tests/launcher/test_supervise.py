"""Jobs of real processes: signals, kills, restarts, and hosts that are left out."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flux2_ds.config.recipe import Batch, Data, Launch, Model, Recipe
from flux2_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from launcher import supervise
from launcher.commands import Command
from launcher.hosts import on_hosts
from launcher.supervise import Stopper, prepare_job, run, train_job

ROOT = Path(__file__).parents[2]
SLOTS = {"node01": 8, "node02": 8, "node03": 8, "node04": 8}
RANK = """\
'''One rank: has reached a step, and obeys the files of its run directory.'''
import os, sys, time
from pathlib import Path
from flux2_ds.errors import EXIT_STOPPED, UserError
from flux2_ds.run.watchdog import Watchdog

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
with Watchdog(folder / "logs", rank, int(os.environ["WORLD_SIZE"]), hang_timeout_s=0) as watchdog:
    watchdog.heartbeat(7, "computing")
    started = len(list(folder.glob("up.*"))) + 1
    print(f"up {started}", flush=True)
    (folder / f"up.{started}.{os.getpid()}").touch()
    if rank == 0:
        plan = (folder / "plan").read_text().split() if (folder / "plan").exists() else []
        if len(plan) >= started:
            code, step = map(int, plan[started - 1].split(":"))
            (folder / "step").write_text(str(step))
            if code == 2:
                raise UserError("a setting is wrong")
            sys.exit(code)
    def asked():
        return (folder / "stop").exists() and (folder / "stop").read_text()
    while not asked():
        time.sleep(0.02)
    (folder / "stop").unlink()  # the first may be an earlier run's
    while not (reason := asked()):
        time.sleep(0.02)
    print("saved because of", reason, flush=True)
    sys.exit(EXIT_STOPPED)
"""
DRIVE = """\
import sys
from pathlib import Path
from flux2_ds.config.recipe import Launch
from launcher import supervise
from launcher.hosts import Hosts

folder, processes, restarts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
supervise._PAUSE = 0.1
def step():
    return int((folder / "step").read_text()) if (folder / "step").exists() else 0
job = supervise.Job("rank", folder / "logs", folder / "stop", None, step, "step {}",
                    lambda: "" if step() == 40 else f"step {step()} of 40")
sys.exit(supervise.supervise(job, Launch(accelerator="cpu"), Hosts(processes), [str(folder)],
                             max_restarts=restarts, elastic=False, node=None))
"""
DEEPSPEED = """\
#!{python}
'''Starts processes as DeepSpeed does: a runner, a launcher, the ranks, and their exit codes.'''
import os, subprocess, sys, time
argv = sys.argv[1:]
if argv[0] != "launch":
    launch = subprocess.Popen([sys.executable, __file__, "launch", *argv])
    launch.wait()
    sys.exit(max(launch.returncode, 0))
module, size = argv[argv.index("--module") + 1:], int(argv[argv.index("--num_gpus") + 1])
ranks = [subprocess.Popen([sys.executable, "-u", "-m", *module],
                          env={{**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size)}})
         for rank in range(size)]
while any(rank.poll() is None for rank in ranks):
    failed = next((rank for rank in ranks if rank.returncode), None)
    if failed:
        for rank in ranks:
            rank.terminate()
        sys.exit(failed.returncode)
    time.sleep(0.05)
sys.exit(next((rank.returncode for rank in ranks if rank.returncode), 0))
"""


class Launched:
    """A launcher and all that it has started."""

    def __init__(self, folder: Path, argv: list[str], environment: dict[str, str]) -> None:
        self.folder = folder
        self._out = (folder / "out").open("a")
        self.launcher = subprocess.Popen(
            argv, stdout=self._out, stderr=self._out, env=environment, cwd=ROOT
        )

    def wait_until_up(self, ranks: int) -> None:
        deadline = time.monotonic() + 120
        while len(list(self.folder.glob("up.*"))) < ranks:
            assert self.launcher.poll() is None, self.out()
            assert time.monotonic() < deadline, self.out()
            time.sleep(0.05)
        self.family = psutil.Process(self.launcher.pid).children(recursive=True)

    def find(self, *words: str) -> list[psutil.Process]:
        """The processes whose command begins with these words, the oldest first."""
        found = [each for each in self.family if each.cmdline()[1:][: len(words)] == [*words]]
        return sorted(found, key=lambda each: each.create_time())

    def wait(self, seconds: float = 60) -> int:
        """The exit code, with nothing left behind."""
        code = self.launcher.wait(seconds)
        _, alive = psutil.wait_procs(self.family, timeout=10)
        assert not [each.cmdline() for each in alive]
        return code

    def out(self) -> str:
        return (self.folder / "out").read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts a job of some ranks under the supervisor; over a stand-in for DeepSpeed or the real one."""
    started: list[Launched] = []

    def start(ranks: int = 1, restarts: int = 0, real: bool = False, *before: str) -> Launched:
        python = tmp_path / "python"
        if not python.exists():
            (tmp_path / "rank.py").write_text(RANK)
            # The launcher takes the program beside its Python.
            program = Path(sys.executable).with_name("deepspeed")
            text = program.read_text() if real else DEEPSPEED.format(python=sys.executable)
            (tmp_path / "deepspeed").write_text(text)
            (tmp_path / "deepspeed").chmod(0o755)
            drive = DRIVE.replace(
                "import sys\n", f"import sys\nsys.executable = {str(python)!r}\n", 1
            )
            (tmp_path / "drive.py").write_text(drive)
            python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
            python.chmod(0o755)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
        argv = [*before, sys.executable, str(tmp_path / "drive.py"), str(tmp_path)]
        started.append(Launched(tmp_path, [*argv, str(ranks), str(restarts)], environment))
        return started[-1]

    yield start
    for each in started:
        each.launcher.kill()
        each.launcher.wait()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_first_signal_asks_the_ranks_to_save_and_stop(start, tmp_path, name):
    job = start()
    job.wait_until_up(1)
    job.launcher.send_signal(signal.Signals[name])
    assert job.wait() == EXIT_STOPPED
    assert f"{name}: after this step" in job.out()
    assert f"saved because of {name}" in job.out()
    assert not (tmp_path / "stop").exists()  # the next start does not stop


def test_second_signal_ends_everything_at_once(start, tmp_path):
    (tmp_path / "stop").write_text("an earlier run's")
    job = start(2)
    job.wait_until_up(2)
    for each in job.find("-u", "-m", "rank"):
        each.suspend()
    for number, said in ((signal.SIGTERM, "after this step"), (signal.SIGINT, "ending at once")):
        job.launcher.send_signal(number)
        deadline = time.monotonic() + 20
        while said not in job.out() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert job.wait() == 128 + signal.SIGINT


def test_nohup_is_respected(start):
    job = start(1, 0, False, "nohup")
    job.wait_until_up(1)
    job.launcher.send_signal(signal.SIGHUP)
    job.launcher.send_signal(signal.SIGTERM)
    assert job.wait() == EXIT_STOPPED
    assert "saved because of SIGTERM" in job.out()


def kill_launcher(job: Launched) -> psutil.Process:
    return psutil.Process(job.launcher.pid)


def kill_reaper(job: Launched) -> psutil.Process:
    return job.find("-m", "launcher.reaper")[0]


def kill_reapers_child(job: Launched) -> psutil.Process:
    return job.find("-m", "launcher.reaper")[1]


def kill_runner(job: Launched) -> psutil.Process:
    return job.find(str(job.folder / "deepspeed"))[0]


def kill_deepspeeds_launcher(job: Launched) -> psutil.Process:
    return kill_runner(job).children()[0]


def wait_for_heartbeats(job: Launched) -> None:
    deadline, ranks = time.monotonic() + 60, len(job.find("-u", "-m", "rank"))
    logs = job.folder / "logs"
    while sum('"step": 7' in path.read_text() for path in logs.glob("rank_*.json")) < ranks:
        assert time.monotonic() < deadline, job.out()
        time.sleep(0.1)  # it is written every few seconds


def kill_rank(job: Launched) -> psutil.Process:
    wait_for_heartbeats(job)
    return job.find("-u", "-m", "rank")[-1]


def kill_after_the_last_checkpoint(job: Launched) -> psutil.Process:
    wait_for_heartbeats(job)
    (job.folder / "step").write_text("40")
    return kill_deepspeeds_launcher(job)


@pytest.mark.parametrize(
    ("ranks", "victim", "real", "code", "said"),
    [
        (2, kill_launcher, False, -9, ""),
        (2, kill_reaper, False, 1, "the launched process: killed by SIGKILL"),
        (2, kill_reapers_child, False, 1, "the launched process: killed by SIGKILL"),
        (2, kill_runner, False, 1, "the launched process: killed by SIGKILL"),
        (2, kill_deepspeeds_launcher, True, 1, "ended too early, perhaps killed: step 0 of 40"),
        (2, kill_after_the_last_checkpoint, True, 1, "perhaps killed: rank 0 on"),
        (2, kill_rank, False, 1, "it was killed"),
        (1, kill_rank, True, 1, "computing in step 7: killed by SIGKILL (out of memory?"),
    ],
)  # fmt: skip
def test_whoever_is_killed_nothing_is_left_and_the_last_error_says_it(
    start, ranks, victim, real, code, said
):
    job = start(ranks, real=real)
    job.wait_until_up(ranks)
    victim(job).kill()
    assert job.wait() == code
    errors = [line for line in job.out().splitlines() if line.startswith("error: ")]
    assert said in (errors or [""])[-1]


def test_a_reaper_ends_its_command_when_its_launcher_is_silent():
    argv = [sys.executable, "-m", "launcher.reaper", "0.5", "sleep", "60"]
    reaper = subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=ROOT)
    assert reaper.wait(timeout=30) == 128 + 9
    assert reaper.stdin is not None
    reaper.stdin.close()


def test_a_reaper_that_was_suspended_does_not_count_that_as_silence():
    argv = [sys.executable, "-m", "launcher.reaper", "3", "sh", "-c", "echo up; sleep 60"]
    reaper = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert reaper.stdin is not None and reaper.stdout is not None
    assert reaper.stdout.readline() == b"up\n"
    reaper.stdin.write(b"\n")
    reaper.stdin.flush()
    while any(fcntl.ioctl(reaper.stdin, termios.FIONREAD, bytes(4))):
        time.sleep(0.01)  # what it has not read would be a sign when it goes on
    reaper.send_signal(signal.SIGSTOP)
    time.sleep(4)
    reaper.send_signal(signal.SIGCONT)
    time.sleep(0.6)  # the kernel lets it wait for what was left of a poll
    assert reaper.poll() is None
    reaper.stdin.close()
    assert reaper.wait(timeout=30) == 128 + 9


@pytest.mark.parametrize(
    ("plan", "restarts", "expected"),
    [
        ("1:0", 0, (1, 1)),
        ("1:0 0:40", 1, (0, 2)),
        ("1:0 1:0 0:40", 1, (1, 2)),
        # Progress since the last failure makes it count anew.
        ("1:10 1:20 9:30 0:40", 1, (0, 4)),
        ("1:10 1:10 1:10 0:40", 2, (1, 3)),
        ("0:10 0:40", 1, (0, 2)),  # an exit code alone is not done
        ("2:0 0:40", 3, (EXIT_USER_ERROR, 1)),
        ("75:0 0:40", 3, (EXIT_STOPPED, 1)),
    ],
)
def test_restarts_are_counted_from_the_last_progress(start, tmp_path, plan, restarts, expected):
    (tmp_path / "plan").write_text(plan)
    job = start(1, restarts)
    code = job.launcher.wait(timeout=120)
    assert (code, len(list(tmp_path.glob("up.*")))) == expected, job.out()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (247, "a rank: killed by SIGKILL (out of memory? see dmesg)"),
        (245, "a rank: killed by SIGSEGV"),
        (137, "the launched process: killed by SIGKILL (out of memory? see dmesg)"),
        (255, "code 255, without a record of it"),  # ssh's
        (3, "code 3, without a record of it"),
    ],
)
def test_an_exit_code_is_put_into_words(code, said):
    assert supervise.what_ended(code) == said


@pytest.fixture
def stopper(tmp_path: Path) -> Stopper:
    """Without its handlers, which are for the whole process."""
    return Stopper(tmp_path / "stop")


def test_the_first_failure_ends_the_other_commands(stopper, monkeypatch):
    monkeypatch.setattr("launcher.supervise.PATIENCE", 0.5)
    fails, hangs = (Command(["sh", "-c", line], {}) for line in ("exit 3", "sleep 60; sleep 60"))
    assert run([hangs, fails], stopper) == 3
    assert run([hangs], stopper, lambda: True) == 128 + 9


def test_a_host_that_is_not_reached_is_named(stopper, tmp_path, monkeypatch, capfd):
    (tmp_path / "ssh").write_text("#!/bin/sh\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), ":")
    assert run([Command(["true"], {}, "node01")], stopper) == 255
    assert capfd.readouterr().out == "node01 ended first: ssh lost it or did not reach it\n"


def test_a_signal_before_the_start_starts_nothing(stopper, tmp_path):
    stopper.reason = "SIGTERM"
    assert run([Command(["touch", str(tmp_path / "started")], {})], stopper) == EXIT_STOPPED
    assert not (tmp_path / "started").exists()


def test_a_full_disk_does_not_keep_the_launcher_from_asking(stopper, tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    stopper.reason = "SIGINT"
    stopper.pass_on()
    assert (tmp_path / "stop").read_text() == ""


@pytest.mark.parametrize(
    ("alive", "fitting"),
    [
        (SLOTS.keys(), SLOTS),
        ({"node01", "node02", "node04"}, {"node01": 8, "node02": 8}),  # 64 over 24 does not go
        ({"node02", "node03"}, {"node02": 8, "node03": 8}),
        ({"node03"}, {"node03": 8}),
        (set(), None),
    ],
)
def test_the_remaining_hosts_divide_the_batch(tmp_path, monkeypatch, alive, fitting):
    """Over a stand-in for ssh that reaches some."""
    (tmp_path / "ssh").write_text(
        f'#!/bin/sh\nfor word; do case " {" ".join(alive)} " in *" $word "*) exit 0;; esac; done\nexit 255\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), ":")
    job = train_job(
        Recipe(
            run_dir=str(tmp_path / "run"),
            model=Model(path="m"),
            data=Data(images="p", shards="s"),
            batch=Batch(global_size=64, micro_size=1),
            launch=Launch(accelerator="cpu"),
        )
    )
    hosts = on_hosts(tmp_path / "hostfile", SLOTS)
    if fitting is None:
        with pytest.raises(UserError, match="no host of"):
            supervise.remaining(job, hosts)
        return
    now = supervise.remaining(job, hosts)
    assert now.slots == fitting
    assert now.address == next(iter(fitting))
    if fitting != SLOTS:
        assert now.hostfile is not None
        lines = now.hostfile.read_text().splitlines()
        assert lines == [f"{name} slots=8" for name in fitting]


def test_a_folder_that_prepare_cannot_have_is_refused_before_anything_starts(tmp_path):
    def job(shards: object) -> supervise.Job:
        data = Data(images="photos", shards=str(shards))
        return prepare_job(Recipe(run_dir="runs/cats", model=Model(path="model"), data=data))

    (tmp_path / "mine.txt").touch()
    for shards, reason in ((tmp_path, "is not empty"), ("s3://bucket/shards", "is a URL")):
        with pytest.raises(UserError, match=rf"data\.shards .*{reason}"):
            job(shards)
    prepares = job(tmp_path / "shards")
    with prepares.lock(), pytest.raises(UserError, match="another prepare is writing"):
        prepares.lock()
    assert prepares.missing()
    (tmp_path / "shards" / "index.json").touch()
    assert not prepares.missing()


def test_a_signal_ends_all_hosts_at_once():
    launched = subprocess.Popen(
        [sys.executable, "-c",
         "import sys; from launcher.supervise import Stopper, run; from launcher.commands import Command\n"
         "with Stopper(None) as stopper:\n"
         "    sys.exit(run([Command(['sh', '-c', 'echo up; sleep 60'], {})] * 2, stopper))"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT)  # fmt: skip
    assert launched.stdout is not None
    assert [launched.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    launched.send_signal(signal.SIGTERM)
    out, _ = launched.communicate(timeout=30)
    assert (out, launched.returncode) == ("SIGTERM: ending at once\n", 128 + 15)
