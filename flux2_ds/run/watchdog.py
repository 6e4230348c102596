"""Each process says where it is and looks out for the others, so that a failure has a name.

    run_dir/logs/rank_3.log        what process 3 printed
    run_dir/logs/rank_3.json       where it is: host, pid, step, what it does
    run_dir/logs/failure.json      the first process that failed, and why

A process that waits in a collective cannot be told that another one is gone, so a thread in each
reads these files: when one fails, is killed or stands still, all end within seconds. Whoever finds
the first cause writes it down and prints it; the errors that follow from it stay in the logs. No
torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil

from flux2_ds.errors import EXIT_FAILURE, EXIT_USER_ERROR, UserError

log = logging.getLogger("flux2_ds")

FAILURE_NAME = "failure.json"
_POLL = 1.0  # s between looks at the others
_BEAT = 5.0  # s between writes of one's own place, sooner when the step has changed
_SILENT = (
    6 * _BEAT
)  # a process whose thread has not written for so long is frozen, or its host is gone
_GRACE = 3.0  # s that a process gets to fail by itself after another one's failure
_PHASES = ("waiting for data", "computing", "agreeing", "validating", "rendering", "saving")
"""What a process does within a step, in this order."""
_LOST = re.compile(r"Connection (closed|reset|refused)|gloo|NCCL|Broken pipe|Socket Timeout", re.I)


@dataclass(frozen=True)
class Heartbeat:
    """Where a process is. Times in seconds since the epoch."""

    rank: int
    host: str
    pid: int
    created: float
    step: int = 0
    phase: str = "starting"
    since: float = 0.0
    beat: float = 0.0
    ended: bool = False

    def order(self) -> tuple[int, int]:
        """Ascending in the order in which a process passes its places."""
        return self.step, _PHASES.index(self.phase) if self.phase in _PHASES else -1

    def __str__(self) -> str:
        at = f" in step {self.step}" if self.step else ""
        seen = "last seen " if time.time() - self.beat > _POLL else ""
        return f"rank {self.rank} on {self.host}, {seen}{self.phase}{at}"


@dataclass(frozen=True)
class Failure:
    """The first cause of a start's end: where, why, the exit code it leads to, and of which start."""

    where: str
    reason: str
    code: int
    time: float
    start: str = ""

    def __str__(self) -> str:
        return self.reason if self.code == EXIT_USER_ERROR else f"{self.where}: {self.reason}"


def first_failure(logs: Path, since: float = 0.0) -> Failure | None:
    """What was recorded after `since`, in seconds since the epoch."""
    try:
        failure = Failure(**json.loads((logs / FAILURE_NAME).read_text()))
    except (OSError, ValueError, TypeError):  # none, or it is being replaced
        return None
    return failure if failure.time >= since else None


def forget(logs: Path, first_rank: int = 0, before: float = float("inf")) -> None:
    """Remove an earlier start's failure, recorded before `before`, and the places of `first_rank`
    and all above it."""
    failure = first_failure(logs)
    if failure is None or failure.time < before:
        (logs / FAILURE_NAME).unlink(missing_ok=True)
    for path in logs.glob("rank_*.json"):
        if int(path.stem.removeprefix("rank_")) >= first_rank:
            path.unlink(missing_ok=True)


def this_start() -> str:
    """Names this start of the run: the same in all its processes and, as far as they can tell, in no
    other, such as one in the same run_dir that is refused while its other processes still wait for it."""
    environment = os.environ
    here = environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE"))
    if "SLURM_JOB_ID" not in environment and here == environment.get("WORLD_SIZE"):
        return f"process {os.getppid()}"  # the launcher that started all of them
    names = ("SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(environment.get(name, "") for name in names)


class Watchdog:
    """This process's place, and its eye on the others; a context around all that may fail.

    An exception ends the process inside the context: with a `UserError`'s code, else 1.
    """

    def __init__(self, logs: Path, rank: int, world_size: int, *, hang_timeout_s: float) -> None:
        self._logs, self._world, self._hang_after = logs, world_size, hang_timeout_s
        # Records of an earlier start are older than this by what it takes to import torch.
        self._started = time.time() - 2
        self._start = this_start()
        me = psutil.Process()
        self._place = Heartbeat(
            rank, socket.gethostname(), me.pid, me.create_time(), since=time.time()
        )
        self._written = 0  # the step in the file
        self._peers: dict[int, psutil.Process | None] = {rank: None}
        self._leaving = threading.Lock()
        logs.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            # The others may have started earlier: what is theirs, and recent, stays.
            forget(logs, world_size, before=self._started)
        self._console = keep_output(self._log(rank), rank)

    def __enter__(self) -> Watchdog:
        self._write()
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self._fail(error)
        self._end()

    def heartbeat(self, step: int, phase: str) -> None:
        """Say where this process is. Costs nothing; the thread writes it down.

        Said again at the same place it means that something moves there. What belongs to no step
        (0) may take as long as it likes.
        """
        self._place = replace(self._place, step=step, phase=phase, since=time.time())

    def _fail(self, error: BaseException) -> None:
        """End with this error, or with the one that it follows from."""
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # a full disk must not hide why
            self._end()
            with self._log(self._place.rank).open("a") as file:
                file.write(text)
        place = self._place
        if isinstance(error, UserError):
            self._claim(place, str(error), error.code)
            self._leave(error.code)
        else:
            deadline = time.time() + 2 * _GRACE
            reason = text.strip().splitlines()[-1]
            while _follows(error) and self.failure() is None and time.time() < deadline:
                time.sleep(0.1)  # for someone to find the process that this one has lost
            if _follows(error):
                text, reason = "", f"it lost another process, which left no error: {reason}"
            self._claim(place, reason, EXIT_FAILURE, text)
            self._leave()

    def failure(self) -> Failure | None:
        """The first cause, if this start of the run has failed."""
        failure = first_failure(self._logs, self._started)
        return failure if failure and failure.start == self._start else None

    def _look(self) -> None:
        complained = ""
        while not self._place.ended:
            time.sleep(_POLL)
            try:
                quiet = time.time() - self._place.beat
                if quiet >= _BEAT or (self._place.step != self._written and quiet >= 2 * _POLL):
                    self._write()
                self._look_for_the_vanished()
                self._look_for_a_hang()
            except OSError as error:  # a full or stalled disk; look again, and say it once
                if str(error) != complained:
                    complained = str(error)
                    log.warning("cannot look out for the other processes: %s", error)
            if self.failure() is not None:
                time.sleep(_GRACE)  # for the main thread to log its own error
                if not self._place.ended:
                    self._leave()

    def _look_for_the_vanished(self) -> None:
        """Name a process of this host that is gone without having said why."""
        for rank in range(self._world):
            if rank not in self._peers:
                self._meet(rank)
            process = self._peers.get(rank)
            if process is None or _runs(process):
                continue
            self._peers[rank] = None
            place = self._read(rank)
            if place is not None and not place.ended:
                why = "it was killed, with no error of its own (out of memory? see dmesg)"
                self._claim(place, why, EXIT_FAILURE)

    def _meet(self, rank: int) -> None:
        """Remember a process if it runs on this host; places of an earlier start are passed over."""
        place = self._read(rank)
        if place is None:
            return
        if place.host != self._place.host:
            self._peers[rank] = None
            return
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(place.pid)
            if abs(process.create_time() - place.created) < 1:
                self._peers[rank] = process

    def _look_for_a_hang(self) -> None:
        """Name the process that the others wait for, if none has moved for too long."""
        # The first process speaks first; the others only if it does not.
        patience = self._hang_after + (3 * _BEAT if self._place.rank else 0)
        stood = time.time() - self._place.since
        if not self._hang_after or not self._place.step or stood < patience:
            return
        self._write()
        places = [place for rank in range(self._world) if (place := self._read(rank))]
        moved = max((place.since for place in places if not place.ended), default=time.time())
        if time.time() - moved < patience:
            return  # one of them moves, such as the one that writes for all
        behind, why = diagnose(places, time.time())
        why = (
            f"no progress for {stood:.0f} s (launch.hang_timeout_s is {self._hang_after:g}): {why}"
        )
        self._claim(behind, why, EXIT_FAILURE)

    def _claim(self, place: Heartbeat, reason: str, code: int, text: str = "") -> None:
        """Record and print the first cause, unless another process has."""
        if self.failure() is not None:
            return
        failure = Failure(str(place), reason, code, time.time(), self._start)
        own, unrecorded = self._partial(FAILURE_NAME), ""
        try:
            own.write_text(json.dumps(asdict(failure)))
            earlier = first_failure(self._logs)
            if earlier and (earlier.time < self._started or earlier.start != self._start):
                (self._logs / FAILURE_NAME).unlink(missing_ok=True)
            (self._logs / FAILURE_NAME).hardlink_to(own)  # fails if another one was quicker
        except FileExistsError:
            return
        except OSError as error:
            unrecorded = f"the other processes are not told: {error}\n"
        finally:
            own.unlink(missing_ok=True)
        message = f"{text}error: {failure}\n"
        if code != EXIT_USER_ERROR:
            message += f"its log: {self._log(place.rank)}\n"
        os.write(self._console, f"{message}{unrecorded}".encode())

    def _leave(self, code: int = EXIT_FAILURE) -> None:
        """End this process, from whichever thread comes first; with `code` if no failure is on
        record."""
        self._leaving.acquire()  # never released
        cause = self.failure()
        try:
            self._end()
            with self._log(self._place.rank).open("a") as file:
                file.write(f"error: {cause}\n")
                if threading.current_thread() is not threading.main_thread():
                    faulthandler.dump_traceback(file=file)  # where the main thread waits
        finally:
            # Exit handlers would wait for the lost process.
            os._exit(code if cause is None else cause.code)

    def _end(self) -> None:
        self._place = replace(self._place, ended=True)
        self._write()

    def _write(self) -> None:
        self._place = replace(self._place, beat=time.time())
        self._written = self._place.step
        partial = self._partial(f"rank_{self._place.rank}.json")
        partial.write_text(json.dumps(asdict(self._place)))
        partial.replace(self._logs / f"rank_{self._place.rank}.json")

    def _read(self, rank: int) -> Heartbeat | None:
        try:
            return Heartbeat(**json.loads((self._logs / f"rank_{rank}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None  # not there yet

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank_{rank}.log"

    def _partial(self, name: str) -> Path:
        # Two threads of many processes may write it at a time.
        return self._logs / f".{name}.{self._place.rank}.{threading.get_ident()}"


def diagnose(places: list[Heartbeat], now: float) -> tuple[Heartbeat, str]:
    """The process that the others wait for, and how one can tell."""
    running = [place for place in places if not place.ended] or places
    last, first = max(running, key=Heartbeat.order), min(running, key=Heartbeat.order)
    silent = [place for place in running if now - place.beat > _SILENT]
    if silent:
        return silent[0], f"it is frozen, or its host is lost (the furthest is {last})"
    if first.order() < last.order():
        return first, f"it is stuck there and the others wait for it (the furthest is {last})"
    hosts = ", ".join(sorted({place.host for place in running}))
    return first, f"all {len(running)} processes wait there; is the network of {hosts} down?"


def keep_output(path: Path, rank: int) -> int:
    """Send what this process prints to its log; the first process's stays on the console.

    Returns a descriptor of the console.
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    console = os.dup(2)
    with path.open("a") as file:
        file.write(f"== {now} process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        if rank:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
    return console


def _follows(error: BaseException) -> bool:
    """Whether this is what a process says that lost another one."""
    of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    return of_torch or _LOST.search(str(error)) is not None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
