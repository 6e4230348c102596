"""Worker processes of the tests: started once for each world size, because starting takes longest."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trajectory

_POOLS: dict[int, Pool] = {}


class Pool:
    """`world_size` processes that run a worker script and talk over gloo."""

    def __init__(self, world_size: int, *command: str | Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.logs = [
            Path(tempfile.mkstemp(suffix=f".rank{rank}.log", prefix="flux2_ds-")[1])
            for rank in range(world_size)
        ]
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command],
                env={
                    **os.environ,
                    **common,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "DS_ACCELERATOR": "cpu",
                    "OMP_NUM_THREADS": "1",
                },
                stdin=subprocess.PIPE,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, log in enumerate(self.logs)
        ]

    def ask(self, text: str) -> None:
        """Give every process a line."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(text + "\n")
            process.stdin.flush()

    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def end(self) -> list[int]:
        """Kill what still runs; exit codes."""
        codes = []
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            codes.append(process.wait())
            assert process.stdin is not None
            process.stdin.close()
        return codes

    def said(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)


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
        _POOLS[world_size] = Pool(world_size, trajectory.__file__)
    pool = _POOLS[world_size]
    pool.ask(str(folder))
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


def run_once(world_size: int, worker: str, argument: Path, folder: Path) -> Any:
    """Run `worker ARGUMENT RESULTS.json` in `world_size` new processes; returns the results."""
    pool = Pool(world_size, worker, argument, folder / "results.json")
    codes = [process.wait(timeout=900) for process in pool.processes]
    pool.end()
    assert codes == [0] * world_size, pool.said()
    return json.loads((folder / "results.json").read_text())


def end_all() -> None:
    for pool in _POOLS.values():
        pool.end()
        for log in pool.logs:
            log.unlink()
    _POOLS.clear()
