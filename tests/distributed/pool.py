"""Worker processes of the tests, started once for each world size."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import measure_loading
import trajectory
from forked import Ranks

_POOLS: dict[int, Ranks] = {}


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
        _POOLS[world_size] = Ranks(trajectory.main, [()] * world_size)
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
    pool = Ranks(measure_loading.main, [(folder, results)] * world_size)
    assert pool.wait() == [0] * world_size, pool.said()
    return json.loads(results.read_text())


def end_all() -> None:
    for pool in _POOLS.values():
        pool.end()
    _POOLS.clear()
