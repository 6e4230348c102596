"""Processes forked from one that has imported everything, as importing takes longest: ranks that talk over gloo,
and a whole launcher with all that it starts."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable
from importlib import import_module
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preload"])
_fork_exec = subprocess._fork_exec  # type: ignore[attr-defined]


class Ranks:
    """A process for each of `arguments`, which calls `work` with them; `orders` is its own and comes first."""

    def __init__(self, work: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        place = {"WORLD_SIZE": str(len(arguments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self._folder = tempfile.TemporaryDirectory(prefix="flux2_ds-")  # goes with this object
        self.logs, self._orders, self.processes = [], [], []
        for rank, given in enumerate(arguments):
            log = Path(self._folder.name, f"rank{rank}.log")
            log.touch()
            orders, ours = _CONTEXT.Pipe(duplex=False)
            environment = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _CONTEXT.Process(
                target=_work, args=(environment, log, work, orders, *given), daemon=True
            )
            _start(process)
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


def _start(process: Any) -> None:
    """Start a process, and the server if need be: it looks for `preload` where a new interpreter would (until
    Python 3.13 it forgets sys.path), and does without in silence."""
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        process.start()


def _work(
    environment: dict[str, str], log: Path, work: Callable[..., None], *arguments: Any
) -> None:
    os.environ |= environment
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdin.close()
    work(*arguments)


class ForkedTree:
    """A Python program whose Python children are forked, too: `subprocess` forks where it would execute, and what
    has been imported need not be again. Parents, pipes, sessions, signals and codes are as of executed ones."""

    def __init__(self, argv: list[str], out: Path, folder: Path, variables: dict[str, str]) -> None:
        self._process = _CONTEXT.Process(target=_root, args=(argv, out, folder, variables))
        _start(self._process)
        self.pid = self._process.pid

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired([], timeout)
        return self._process.exitcode


def _root(argv: list[str], out: Path, folder: Path, variables: dict[str, str]) -> None:
    os.chdir(folder)
    stream = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    subprocess._fork_exec = _fork_instead  # type: ignore[attr-defined]
    _become(argv, os.environ | variables, (os.open(os.devnull, os.O_RDONLY), stream, stream), True)


def _fork_instead(args: list[str], *how: Any) -> int:
    """`_posixsubprocess.fork_exec`, which executes what is not one of our Python programs."""
    environment, streams, session = how[4], (how[5], how[8], how[10]), how[14]
    words = [os.fsdecode(word) for word in args]
    reaches = words[0] == "ssh" and words[-1].startswith("cd ")
    if reaches:
        words = ["ssh", *shlex.split(words[-1])[5:]]
    if not reaches and "-m" not in words[:3] and Path(words[0]).name != "deepspeed":
        return _fork_exec(args, *how)
    if pid := os.fork():
        return pid
    pairs = dict(os.environ)
    if environment is not None:
        pairs = dict(os.fsdecode(each).split("=", 1) for each in environment)
    return _become(words, pairs, streams, session)


def _become(
    words: list[str], environment: dict[str, str], streams: tuple[int, ...], session: bool
) -> NoReturn:
    """Do in a new process what follows an `execve`."""
    code: Any = 1
    try:
        for target, source in enumerate(streams):
            if source not in (-1, target):
                os.dup2(source, target)
        os.closerange(3, 1024)
        resource_tracker._resource_tracker.__init__()  # type: ignore[misc]
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = (open(fd, "w", 1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        if session:
            os.setsid()
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # the parent removes its folders
        _name(words)
        if words[0] == "ssh":
            code = _ssh(words[1:])
        elif "-m" in words[:3]:
            place = words.index("-m")
            sys.argv = words[place + 1 :]
            sys.modules.pop(sys.argv[0], None)
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            code = 0
        else:
            sys.argv = words
            code = import_module("launcher.deepspeed_script").main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _ssh(words: list[str]) -> int:
    """What reaches another host: few variables, and a session of its own."""
    place = next(place for place, word in enumerate(words) if "=" not in word)
    variables = dict(word.split("=", 1) for word in words[:place])
    few = {name: os.environ[name] for name in ("HOME", "PATH")}
    return subprocess.Popen(words[place:], env=few | variables, start_new_session=True).wait()


def _name(words: list[str]) -> None:
    """Show the words as this process's command line, as far as there is room."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    text = b"\0".join(map(os.fsencode, words))[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)
