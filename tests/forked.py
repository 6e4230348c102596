"""Ranks that talk over gloo, forked from a process that has imported everything: importing takes longest."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preload"])


class Ranks:
    """A process for each of `arguments`, which calls `work` with them; `orders` is its own and comes first."""

    def __init__(self, work: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        place = {"WORLD_SIZE": str(len(arguments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.logs, self._orders, self.processes = [], [], []
        for rank, given in enumerate(arguments):
            log = Path(tempfile.mkstemp(suffix=f".rank{rank}.log", prefix="flux2_ds-")[1])
            orders, ours = _CONTEXT.Pipe(duplex=False)
            environment = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _CONTEXT.Process(
                target=_work, args=(environment, log, work, orders, *given), daemon=True
            )
            process.start()
            orders.close()
            self.logs.append(log)
            self._orders.append(ours)
            self.processes.append(process)

    def ask(self, what: Any) -> None:
        """Send every process something; it gets EOFError when these tests have ended."""
        for orders in self._orders:
            orders.send(what)

    def ended(self) -> bool:
        return any(not process.is_alive() for process in self.processes)

    def wait(self) -> list[int | None]:
        """Exit codes."""
        for process in self.processes:
            process.join(timeout=900)
        return [process.exitcode for process in self.processes]

    def end(self) -> list[int | None]:
        """Kill what still runs; exit codes."""
        for process in self.processes:
            process.kill()
        return self.wait()

    def said(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)


def _work(
    environment: dict[str, str], log: Path, work: Callable[..., None], *arguments: Any
) -> None:
    os.environ |= environment
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdin.close()
    work(*arguments)
