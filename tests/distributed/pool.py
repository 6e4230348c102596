"""Worker processes of the tests, started once for each world size and forked from a process that has imported
everything, because importing takes longest."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measure_loading
import trajectory

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preload"])
_POOLS: dict[int, Pool] = {}


class Pool:
    """`world_size` processes that work and talk over gloo."""

    def __init__(self, world_size: int, work: Callable[..., None], *arguments: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.logs = [
            Path(tempfile.mkstemp(suffix=f".rank{rank}.log", prefix="flux2_ds-")[1])
            for rank in range(world_size)
        ]
        self._orders: list[Connection] = []
        self.processes = []
        for rank, log in enumerate(self.logs):
            orders, ours = _CONTEXT.Pipe(duplex=False)
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = _CONTEXT.Process(
                target=_work, args=(variables, log, work, orders, *arguments), daemon=True
            )
            process.start()
            orders.close()
            self.processes.append(process)
            self._orders.append(ours)

    def ask(self, folder: Path) -> None:
        """Give every process a folder with cases."""
        for orders in self._orders:
            orders.send(folder)

    def ended(self) -> bool:
        return any(not process.is_alive() for process in self.processes)

    def end(self) -> list[int | None]:
        """Kill what still runs; exit codes."""
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)


def _work(
    variables: dict[str, str],
    log: Path,
    work: Callable[..., None],
    orders: Connection,
    *arguments: Any,
) -> None:
    os.environ |= variables
    sys.stdout.flush()
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    work(orders, *arguments)


def launch(
    world_size: int, cases: list[dict[str, Any]], folder: Path, *, killed: bool = False
) -> list[list[float]]:
    """Run the cases of trajectory.py in `world_size` processes; returns the losses of each.

    `killed`: one of them kills itself; the others are then ended, as the launcher does.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    for old in folder.glob("done-*"):
        old.unlink()
    if world_size not in _POOLS:
        _POOLS[world_size] = Pool(world_size, trajectory.main)
    pool = _POOLS[world_size]
    pool.ask(folder)
    while len(list(folder.glob("done-*"))) < world_size and not pool.ended():
        time.sleep(0.02)
    if pool.ended():
        time.sleep(0 if killed else 1)  # for the others' last words
        codes = _POOLS.pop(world_size).end()
        assert killed and -signal.SIGKILL in codes, f"{codes}\n{pool.said()}"
        return []
    assert not killed
    results: list[list[float]] = json.loads((folder / "results.json").read_text())
    return results


def measured_loading(world_size: int, folder: Path) -> Any:
    """What measure_loading.py finds in `world_size` new processes."""
    results = folder / "results.json"
    pool = Pool(world_size, measure_loading.main, folder, results)
    for process in pool.processes:
        process.join(timeout=900)
    assert pool.end() == [0] * world_size, pool.said()
    return json.loads(results.read_text())


def end_all() -> None:
    for pool in _POOLS.values():
        pool.end()
        for log in pool.logs:
            log.unlink()
    _POOLS.clear()
