"""`flux2-ds train` over two machines: equal to one machine, and back up after a loss.

Real ssh, a real hostfile and the tiny model. Needs root; `make test-multinode`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import program
from machines import Cluster, Machine

from flux2_ds.data.index import read_index

pytestmark = pytest.mark.multinode


@pytest.fixture(autouse=True)
def hostfile(cluster: Cluster, work: Path) -> None:
    hosts = "".join(f"{machine.name} slots=1\n" for machine in cluster.machines)
    (work / "hostfile").write_text(hosts)


def start(
    cluster: Cluster, work: Path, run_dir: str, *options: str, machine: int = 0
) -> subprocess.Popen[bytes]:
    """`flux2-ds train`, as a user of a machine types it."""
    argv = command("train", "--run_dir", run_dir, *options)
    with (work / f"{run_dir}.out").open("a") as out:
        return subprocess.Popen(
            cluster.machines[machine].inside(argv),
            cwd=work,
            env=cluster.environment | {"OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def command(name: str, *options: str) -> list[str]:
    over_both = ["--launch.hostfile", "hostfile", "--launch.processes", "null"]
    return [program(), name, "--config", "tiny.yaml", *over_both, *options]


def doctor(cluster: Cluster, work: Path) -> tuple[int, str]:
    done = subprocess.run(
        cluster.machines[0].inside(command("doctor")),
        cwd=work,
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def wait_for_step(process: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not path.is_file() or len(path.read_text().splitlines()) < step:
        assert process.poll() is None, run_dir.with_suffix(".out").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def training_processes(machine: Machine) -> list[int]:
    """Everything that a machine runs of the training."""
    return processes_of(machine, b"launcher.reaper", b"flux2_ds.train")


def processes_of(machine: Machine, *words: bytes) -> list[int]:
    """Processes on a machine whose command has one of the words."""
    listed = subprocess.run(
        ["ip", "netns", "pids", machine.name], capture_output=True, text=True, check=True
    )
    found = []
    for pid in map(int, listed.stdout.split()):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if any(word in line for word in words):
            found.append(pid)
    return found


def test_doctor_looks_at_both_machines(cluster, work):
    first, second = (machine.name for machine in cluster.machines)
    code, out = doctor(cluster, work)
    assert code == 0, out
    assert "2 hosts have the same of everything" in out
    assert "all 2 hosts: 16 samples in 4 shards" in out
    assert re.search(rf"link +{first} to {second}: [\d.]+ GB/s", out)
    cluster.link("down")
    try:
        code, out = doctor(cluster, work)
    finally:
        cluster.link("up")
    assert code == 2
    assert re.search(rf"failure +ssh +{second}: ", out)


def test_two_machines_prepare_as_one(cluster, work):
    """After the second machine's end, which ends both, the same command goes on."""
    argv = command("prepare", "--data.shards", "by_both", "--data.samples_per_shard", "1")
    environment = cluster.environment | {"OMP_NUM_THREADS": "1"}
    notes = work / "by_both" / "prepared"
    for killed in (True, False):
        with (work / "by_both.out").open("w") as out:
            prepare = subprocess.Popen(cluster.machines[0].inside(argv), cwd=work, env=environment,
                                       stdout=out, stderr=subprocess.STDOUT)  # fmt: skip
        deadline = time.monotonic() + 240
        while killed and not list(notes.glob("*.tar.json")):
            assert prepare.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        if killed:
            for pid in processes_of(cluster.machines[1], b"flux2_ds.prepare"):
                os.kill(pid, signal.SIGKILL)
        assert (prepare.wait(timeout=240) != 0) == killed, (work / "by_both.out").read_text()
    alone = [program(), "prepare", "--config", "tiny.yaml", "--data.shards", "by_one",
             "--data.samples_per_shard", "1"]  # fmt: skip
    subprocess.run(alone, cwd=work, check=True)
    one, both = (
        {path.name: path.read_bytes() for path in (work / name).glob("*.tar")}
        for name in ("by_one", "by_both")
    )
    assert one == both
    assert read_index(work / "by_one") == read_index(work / "by_both")


def test_two_machines_train_as_one(cluster, work, reference, losses):
    run = start(cluster, work, "both")
    wait_for_step(run, work / "both", 2)
    assert [len(training_processes(machine)) > 0 for machine in cluster.machines] == [True, True]
    # Ctrl-C: save together and stop, then go on with the same command.
    # (`ip netns exec`, `unshare` and the shell have replaced themselves with the launcher.)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 75
    assert training_processes(cluster.machines[1]) == []
    assert start(cluster, work, "both").wait(timeout=300) == 0
    assert losses(work / "both") == pytest.approx(reference, rel=1e-5)
    second = (work / "both" / "logs" / "rank_1.log").read_text()
    assert f"on {cluster.machines[1].name}" in second


def test_each_machine_starts_its_own_part_and_all_stop_when_one_is_asked_to(
    cluster, work, reference, losses
):
    """As the pods of a Kubernetes Job, of which one is evicted."""

    def parts() -> list[subprocess.Popen[bytes]]:
        ranks = range(len(cluster.machines))
        return [start(cluster, work, "parts", "--node-rank", str(n), machine=n) for n in ranks]

    runs = parts()
    wait_for_step(runs[0], work / "parts", 2)
    runs[1].send_signal(signal.SIGTERM)
    assert [run.wait(timeout=60) for run in runs] == [75, 75]
    assert [run.wait(timeout=300) for run in parts()] == [0, 0]
    assert losses(work / "parts") == pytest.approx(reference, rel=1e-5)


def test_nothing_is_left_when_the_launcher_is_killed(cluster, work):
    run = start(cluster, work, "launcher_killed")
    wait_for_step(run, work / "launcher_killed", 1)
    assert all(map(training_processes, cluster.machines))
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while any(map(training_processes, cluster.machines)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [training_processes(machine) for machine in cluster.machines] == [[], []]


def test_a_killed_machine_is_named_and_the_run_restarts(cluster, work, reference, losses):
    run = start(cluster, work, "killed", "--max-restarts", "1")
    wait_for_step(run, work / "killed", 6)
    for pid in training_processes(cluster.machines[1]):
        os.kill(pid, signal.SIGKILL)
    assert run.wait(timeout=300) == 0
    out = (work / "killed.out").read_text()
    assert "it lost another process" in out
    assert f"{cluster.machines[1].name} ended first" in out
    assert "restart 1 of 1 in 5 s from step 4" in out
    assert losses(work / "killed") == pytest.approx(reference, rel=1e-5)


def test_a_cut_link_is_named_and_the_run_goes_on_without_the_machine(
    cluster, work, reference, losses
):
    options = ["--launch.hang_timeout_s", "8", "--max-restarts", "1", "--elastic"]
    run = start(cluster, work, "cut", *options)
    wait_for_step(run, work / "cut", 6)
    assert training_processes(cluster.machines[1])
    cluster.link("down")
    try:
        assert run.wait(timeout=300) == 0
    finally:
        cluster.link("up")
    out = (work / "cut.out").read_text()
    first, second = (machine.name for machine in cluster.machines)
    assert f"is the network of {first}, {second} down?" in out
    assert "(launch.hang_timeout_s is 8)" in out
    assert f"{second} does not answer over ssh; going on without it" in out
    assert losses(work / "cut") == pytest.approx(reference, rel=1e-5)
    # Nothing is left on the machine that was cut off.
    deadline = time.monotonic() + 90
    while training_processes(cluster.machines[1]) and time.monotonic() < deadline:
        time.sleep(1)
    assert training_processes(cluster.machines[1]) == []
