"""Each rank says where it is and watches the others, so that a failure has a name.

    run_dir/logs/rank_3.log        what rank 3 printed
    run_dir/logs/rank_3.json       its heartbeat: host, pid, step, phase
    run_dir/logs/failure.json      the first rank that failed, and why

A rank that waits in a collective cannot be told that another one is gone. So a thread in each reads
these files: when a rank fails, is killed or stands still, all end within seconds. Whichever finds the
first cause records and prints it; the errors that follow from it stay in the logs. Durations are each
process's own, by its monotonic clock: no host's time of day takes part in them. No torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from flux2_ds.errors import EXIT_FAILURE, EXIT_USER_ERROR, UserError
from flux2_ds.run.atomic import PARTIAL, atomic_path
from flux2_ds.run.logging import clear_line, open_log

log = logging.getLogger("flux2_ds")

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
FAILURE_NAME = "failure.json"
_POLL = 1.0  # s between looks at the others
_BEAT = 5.0  # s between writes of the own heartbeat, sooner when the step has changed
_SILENT = 6 * _BEAT  # s without a write: a process is frozen, or its host is gone
_GRACE = 3.0  # s that a process gets to fail by itself after another one's failure
_PHASES = (
    *("waiting for data", "computing", "agreeing", "validating", "rendering", "saving"),
    *("encoding captions", "waiting for captions", "encoding images", "waiting for images"),
)
"""What a process does within a step of `train`, and a round of `prepare`, in this order."""
_LOST = re.compile(r"Connection (closed|reset|refused)|gloo|NCCL|Broken pipe|Socket Timeout", re.I)


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is, as it last wrote it."""

    rank: int
    host: str
    pid: int
    started: int
    """Clock ticks from the host's start to the process's."""
    step: int = 0
    phase: str = "starting"
    stalled: float = 0.0
    """s without progress when it was written, by the rank's own clock."""
    beats: int = 0
    """How often it has been written."""
    ended: bool = False

    def order(self) -> tuple[int, int]:
        """Ascending in the order in which a rank passes steps and phases."""
        return self.step, _PHASES.index(self.phase) if self.phase in _PHASES else -1

    def __str__(self) -> str:
        at = f" in step {self.step}" if self.step else ""
        return f"rank {self.rank} on {self.host}, {self.phase}{at}"

    def last_seen(self) -> str:
        """`str()` of a rank that may have moved on since."""
        return str(self).replace(", ", ", last seen ", 1)


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


def unended(logs: Path) -> list[Heartbeat]:
    """Return the last heartbeats of the ranks that did not end by themselves."""
    found = map(_heartbeat_in, sorted(logs.glob("rank_*.json")))
    return [beat for beat in found if beat is not None and not beat.ended]


def _heartbeat_in(path: Path) -> Heartbeat | None:
    try:
        return Heartbeat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not there yet, or cut off while written
        return None


def forget(logs: Path, first_rank: int = 0, before: float = float("inf")) -> None:
    """Remove an earlier start's failure, recorded before `before`, and the heartbeats of `first_rank`
    and all above it."""
    failure = first_failure(logs)
    if failure is None or failure.time < before:
        (logs / FAILURE_NAME).unlink(missing_ok=True)
    for path in logs.glob("rank_*.json"):
        rank = path.stem.removeprefix("rank_")
        if rank.isdecimal() and int(rank) >= first_rank:  # others are copies of the user's
            path.unlink(missing_ok=True)


def this_start() -> str:
    """Name this start of the run: the same in all its ranks and, as far as they can tell, in no other,
    such as one in the same run_dir that is refused while its other ranks still wait for it."""
    environment = os.environ
    here = environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE"))
    if "SLURM_JOB_ID" not in environment and here == environment.get("WORLD_SIZE"):
        return f"process {os.getppid()}"  # the launcher that started all of them
    names = ("SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(environment.get(name, "") for name in names)


def end_with_deepspeed() -> None:
    """Have the kernel kill this process when DeepSpeed's launcher, which started it, is killed: a rank that
    nobody supervises holds its GPU and the run directory. Under `flux2-ds` the reaper does so, too."""
    with contextlib.suppress(OSError):
        if b"deepspeed.launcher.launch" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Watchdog:
    """This rank's heartbeat, and its eye on the others; a context around all that may fail.

    An exception ends the process inside the context: with a `UserError`'s code, else 1.
    """

    def __init__(self, logs: Path, rank: int, world_size: int, *, hang_timeout_s: float) -> None:
        self._logs, self._world, self._hang_timeout = logs, world_size, hang_timeout_s
        self._start = this_start()
        pid = os.getpid()
        self._own = Heartbeat(rank, socket.gethostname(), pid, start_ticks(pid) or 0)
        self._clock = 0.0  # s that this process has run, as its thread counts them
        self._moved = 0.0  # the clock at the last progress
        self._beats, self._written, self._written_at = 0, 0, 0.0
        self._peers: dict[int, Heartbeat | None] = {rank: None}
        # While this rank stalls: the heartbeats of all, and the clock when each was first seen.
        self._seen: dict[int, tuple[Heartbeat, float]] = {}
        self._looked_at = 0.0
        self._writing, self._leaving = threading.Lock(), threading.Lock()
        logs.mkdir(parents=True, exist_ok=True)
        # Records of an earlier start are older than this by what it takes to import torch.
        started = time.time() - 2
        earlier = first_failure(logs)
        self._earlier = earlier if earlier and earlier.time < started else None
        if rank == 0:
            # The others may have started earlier: what is theirs, and recent, stays.
            forget(logs, world_size, before=started)
        self._console = keep_output(self._log(rank), rank)

    def __enter__(self) -> Watchdog:
        end_with_deepspeed()
        self._write()
        self._entered = self._heartbeat(self._own.rank).stat().st_mtime_ns
        self._find_killed()  # meets those that are there, however soon they are killed
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self._fail(error)
        self._end()

    def heartbeat(self, step: int, phase: str) -> None:
        """Say where this process is. Costs nothing; the thread writes it down.

        The same place again means that something moves there. What belongs to no step (0) may take as
        long as it likes.
        """
        self._own = replace(self._own, step=step, phase=phase)
        self._moved = self._clock

    def stall(self) -> tuple[float, str]:
        """Seconds without progress in a step, and where."""
        return self._clock - self._moved if self._own.step else 0.0, str(self._own)

    def failure(self) -> Failure | None:
        """The first cause, if this start of the run has failed."""
        failure = first_failure(self._logs)
        ours = failure is not None and failure.start == self._start and failure != self._earlier
        return failure if ours else None

    def _fail(self, error: BaseException) -> None:
        """End with this error, or with the one that it follows from."""
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # a full disk must not hide why
            self._end()
            with open_log(self._log(self._own.rank)) as file:
                file.write(text)
        if isinstance(error, UserError):
            self._claim(str(self._own), self._own.rank, str(error), error.code)
            self._leave(error.code)
        deadline = time.monotonic() + 2 * _GRACE
        reason = text.strip().splitlines()[-1]
        while _follows(error) and self.failure() is None and time.monotonic() < deadline:
            time.sleep(0.1)  # for someone to find the rank that this one has lost
            with contextlib.suppress(OSError):  # of two ranks there is no other to find it
                self._find_killed()
        if _follows(error):
            text, reason = "", f"it lost another process, which left no error: {reason}"
        self._claim(str(self._own), self._own.rank, reason, EXIT_FAILURE, text)
        self._leave()

    def _watch(self) -> None:
        complained, last = "", time.monotonic()
        while not self._own.ended:
            time.sleep(_POLL)
            now = time.monotonic()
            # While the machine was suspended, or this process stopped, nothing has hung.
            self._clock += min(now - last, 10 * _POLL)
            last = now
            try:
                quiet = self._clock - self._written_at
                if quiet >= _BEAT or (self._own.step != self._written and quiet >= 2 * _POLL):
                    self._write()
                self._find_killed()
                self._find_hang()
            except OSError as error:  # a full or stalled disk; look again, and say it once
                if str(error) != complained:
                    complained = str(error)
                    log.warning("cannot watch the other processes: %s", error)
            if self.failure() is not None:
                time.sleep(_GRACE)  # for the main thread to log its own error
                if not self._own.ended:
                    self._leave()

    def _find_killed(self) -> None:
        """Name a process of this host that is gone without having said why."""
        for rank in range(self._world):
            if rank not in self._peers:
                self._meet(rank)
            peer = self._peers.get(rank)
            if peer is None or start_ticks(peer.pid) == peer.started:
                continue
            self._peers[rank] = None
            last = self._read(rank)
            if last is not None and not last.ended:
                why = "it was killed, with no error of its own (out of memory? see dmesg)"
                self._claim(last.last_seen(), rank, why, EXIT_FAILURE)

    def _meet(self, rank: int) -> None:
        """Remember a rank if it runs on this host; heartbeats of an earlier start are passed over."""
        peer = self._read(rank)
        if peer is None:
            return
        if peer.host != self._own.host:
            self._peers[rank] = None
        elif start_ticks(peer.pid) == peer.started or self._written_since(rank):
            self._peers[rank] = peer

    def _written_since(self, rank: int) -> bool:
        """Whether a rank's heartbeat is newer than this one's first, so of the same start."""
        with contextlib.suppress(OSError):  # it is being replaced
            return self._heartbeat(rank).stat().st_mtime_ns >= self._entered
        return False

    def _find_hang(self) -> None:
        """Name the rank that the others wait for, if none has moved for too long."""
        # Rank 0 speaks first; the others only if it does not.
        patience = self._hang_timeout + (3 * _BEAT if self._own.rank else 0)
        stalled = self._clock - self._moved
        if not self._hang_timeout or not self._own.step or stalled < patience / 10:
            self._seen.clear()
            return
        if self._seen and self._clock - self._looked_at < _BEAT:
            return
        self._looked_at = self._clock
        for rank in range(self._world):
            beat, seen = self._read(rank), self._seen.get(rank)
            if beat is not None and (seen is None or seen[0] != beat):
                self._seen[rank] = beat, self._clock
        ages = {beat.rank: self._clock - at for beat, at in self._seen.values()}
        beats = [beat for beat, _ in self._seen.values()]
        running = [beat for beat in beats if not beat.ended]
        if stalled < patience or any(beat.stalled + ages[beat.rank] < patience for beat in running):
            return  # one of them moves, such as the one that writes for all
        behind, why = diagnose(beats, {rank for rank, age in ages.items() if age > _SILENT})
        why = f"no progress for {stalled:.0f} s (launch.hang_timeout_s is {self._hang_timeout:g}): {why}"
        self._claim(behind.last_seen(), behind.rank, why, EXIT_FAILURE)

    def _claim(self, where: str, rank: int, reason: str, code: int, text: str = "") -> None:
        """Record and print the first cause, unless another process has."""
        if self.failure() is not None:
            return
        failure, unrecorded = Failure(where, reason, code, time.time(), self._start), ""
        record = self._logs / FAILURE_NAME
        # Two threads of many processes may come here at a time.
        own = self._logs / f".{FAILURE_NAME}.{self._own.rank}.{threading.get_ident()}{PARTIAL}"
        try:
            own.unlink(missing_ok=True)
            own.write_text(json.dumps(asdict(failure)))
            earlier = first_failure(self._logs)
            if earlier and (earlier == self._earlier or earlier.start != self._start):
                record.unlink(missing_ok=True)
            try:
                record.hardlink_to(own)  # fails if another one was quicker
            except OSError:  # or on a file system without hard links
                with record.open("x") as file:
                    file.write(own.read_text())
        except FileExistsError:
            return
        except OSError as error:
            unrecorded = f"the other processes are not told: {error}\n"
        finally:
            own.unlink(missing_ok=True)
        message = f"{text}error: {failure}\n"
        if code != EXIT_USER_ERROR:
            message += f"its log: {self._log(rank)}\n"
        text = f"{message}{unrecorded}"
        os.write(self._console, clear_line(self._console) + text.encode(errors="backslashreplace"))

    def _leave(self, code: int = EXIT_FAILURE) -> NoReturn:
        """End this process, from whichever thread comes first; with `code` if no failure is on
        record."""
        self._leaving.acquire()  # never released
        cause = self.failure()
        try:
            self._end()
            with open_log(self._log(self._own.rank)) as file:
                file.write(f"error: {cause}\n")
                if threading.current_thread() is not threading.main_thread():
                    faulthandler.dump_traceback(file=file)  # where the main thread waits
        finally:
            # Exit handlers would wait for the lost process.
            os._exit(code if cause is None else cause.code)

    def _end(self) -> None:
        self._own = replace(self._own, ended=True)
        self._write()

    def _write(self) -> None:
        with self._writing:  # or the watching thread would overwrite that this process has ended
            self._beats += 1
            stalled = self._clock - self._moved
            beat = replace(self._own, beats=self._beats, stalled=stalled)
            self._written, self._written_at = beat.step, self._clock
            with atomic_path(self._heartbeat(beat.rank), writer=beat.pid) as partial:
                partial.write_text(json.dumps(asdict(beat)))

    def _read(self, rank: int) -> Heartbeat | None:
        return _heartbeat_in(self._heartbeat(rank))

    def _heartbeat(self, rank: int) -> Path:
        return self._logs / f"rank_{rank}.json"

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank_{rank}.log"


def diagnose(beats: list[Heartbeat], silent: set[int]) -> tuple[Heartbeat, str]:
    """The rank that the others wait for, and how one can tell; `silent` ones write no heartbeat."""
    running = [beat for beat in beats if not beat.ended] or beats
    last, first = max(running, key=Heartbeat.order), min(running, key=Heartbeat.order)
    for beat in running:
        if beat.rank in silent:
            return beat, f"it is frozen, or its host is lost (the furthest is {last})"
    if first.order() < last.order():
        return first, f"it is stuck there and the others wait for it (the furthest is {last})"
    hosts = ", ".join(sorted({beat.host for beat in running}))
    return first, f"all {len(running)} ranks wait there; is the network of {hosts} down?"


def keep_output(path: Path, rank: int) -> int:
    """Send what this process prints to its log; rank 0's stays on the console.

    Returns a descriptor of the console.
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    console = os.dup(2)
    with open_log(path) as file:
        file.write(f"== {now} process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        if rank:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
    return console


def start_ticks(pid: int) -> int | None:
    """Clock ticks from the host's start to that of a running process, which no change of the time of
    day moves. With the pid they name the process; None: it has ended."""
    try:
        # Bytes, because a program's name may be cut within a character.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in b"ZX" else int(fields[19])


def _follows(error: BaseException) -> bool:
    """Whether this is what a process says that lost another one."""
    of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    return of_torch or _LOST.search(str(error)) is not None
