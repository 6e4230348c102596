"""A request to stop: by a file, by a signal, and what the ranks tell each other of it."""

import os
import signal

import pytest
import torch

from flux2_ds import distributed as agreement
from flux2_ds.distributed import Process
from flux2_ds.training.stop import StopRequest

RANK0, RANK1 = (Process(rank, 2, torch.device("cpu")) for rank in (0, 1))


def test_a_stop_file_is_seen_once_and_by_rank_0(tmp_path):
    stop, other = StopRequest(tmp_path / "stop"), StopRequest(tmp_path / "stop")
    assert not stop.seen(RANK0)
    stop.file.write_text("SIGTERM")
    assert not other.seen(RANK1)
    assert stop.seen(RANK0)
    assert stop.reason == "SIGTERM"
    assert not stop.file.exists()  # the next start does not stop
    assert stop.seen(RANK0)
    stop.file.touch()  # by hand
    assert stop.seen(RANK0)
    assert stop.reason == "stop"
    stop.file.write_bytes(b"\xff")
    assert stop.seen(RANK0) and not stop.file.exists()
    stop.file.mkdir()  # what cannot be read ends no run
    assert not other.seen(RANK0)


def test_a_stop_file_of_an_earlier_run_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    stop = StopRequest(tmp_path / "stop")
    stop.file.touch()
    stop.listen()
    assert stop.file.exists()  # meant for this process
    os.utime(stop.file, (0, 0))
    stop.listen()
    assert not stop.file.exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_seen_by_any_process(tmp_path, name):
    number = signal.Signals[name]
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    stop = StopRequest(tmp_path / "stop")
    try:
        stop.listen()
        os.kill(os.getpid(), number)
        assert stop.seen(RANK1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stop.reason == name


@pytest.mark.parametrize(("processes", "late"), [(1, True), (2, False)])
def test_several_processes_look_for_a_stop_when_asked_and_one_alone_when_it_is_needed(
    processes, late, monkeypatch
):
    monkeypatch.setattr(agreement.distributed, "get_world_size", lambda: processes)
    monkeypatch.setattr(agreement.distributed, "all_reduce", lambda value, op: None)
    flags = {"up": False}
    answer = agreement.any_rank(lambda: flags["up"], torch.device("cpu"))
    flags["up"] = True
    assert answer() == late
    monkeypatch.setattr(agreement.distributed, "all_reduce", lambda value, op: value.fill_(1))
    assert agreement.any_rank(lambda: processes == 1, torch.device("cpu"))()
