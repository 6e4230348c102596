"""`bench-data` reads every sample it counts, by every way; its figures are not tested."""

import json
import signal
import subprocess
import sys
import time
from argparse import Namespace

import psutil
import pytest

from flux2_ds.commands import bench_data


def test_the_report(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_data, "MODELS", {"tiny": (16, 160, 0.001)})
    monkeypatch.setattr(bench_data, "_INDEX_SAMPLES", (25_600,))
    asked = f"--json --gb 0.01 --rounds 1 --model tiny --from disk http s3 --work {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["bench-data", *asked.split()])
    bench_data.main()
    found = json.loads(capsys.readouterr().out)
    sources = [f"tiny from {kind}" for kind in ("disk", "http", "s3")]
    assert list(found)[1:4] == sources
    for source in sources:
        assert all(found[source][f"{name}, MB/s"] > 0 for name in ("raw read", "loader"))
        assert found[source]["loader, CPU ms a sample"] > 0
        assert ("loader, server's CPU ms" in found[source]) == ("disk" not in source)
        assert ("plain WebDataset, MB/s" in found[source]) == ("s3" not in source)
        assert found[source]["wait at 0.001 s a step"].endswith(" %")
    assert found["index of 25,600 samples"]["shards"] == 100
    assert not list(tmp_path.iterdir())


def test_a_reading_that_misses_samples_is_no_figure(monkeypatch, tmp_path):
    index = bench_data.make_shards(tmp_path / "x", 16, 160, 1)
    monkeypatch.setattr(bench_data, "plain_pipeline", lambda *_: iter([1]))
    with pytest.raises(RuntimeError, match="1 samples read of 2"):
        bench_data.measure("disk", tmp_path / "x", index, Namespace(num_workers=1, rounds=1), 0.0)


def running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_its_server_ends_with_it(tmp_path, number):
    argv = ["--gb", "0.02", "--model", "klein-4b", "--from", "http", "--rounds", "1000"]
    command = [sys.executable, "-m", "flux2_ds.commands.bench_data", *argv, "--work", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        servers: list[psutil.Process] = []
        while not servers and process.poll() is None:
            servers = psutil.Process(process.pid).children()
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    deadline = time.monotonic() + 30
    while any(map(running, servers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert servers and not any(map(running, servers))
    if number == signal.SIGTERM:
        assert (process.returncode, said) == (128 + number, "")
        assert not list(tmp_path.iterdir())
