"""One or several machines encode for one folder of shards.

The first machine decides what is to be done and finishes; all of them encode. They meet on the file
system that they share, in `data.shards`/prepared/team/START, START being a name that the launcher gives
to every start. A phase (captions, then pictures, then the next captions) is a folder of tasks there,
one file each. Who creates a task's `.claim` does it; O_EXCL makes that one process, on NFS, too. The
result is a `.done` file.

Nothing here outlives a start: what a shard is finished by is its note (ledger.py). A machine that dies
ends the start, by the launcher's doing, and the next start goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flux2_ds.config.buckets import Bucket
from flux2_ds.errors import UserError
from flux2_ds.prepare import manifest
from flux2_ds.prepare.manifest import Job
from flux2_ds.prepare.source_images import Picture, SourceImage
from flux2_ds.prepare.workers import Worker, run_tasks
from flux2_ds.run.atomic import atomic_write_text

log = logging.getLogger("flux2_ds")

_POLL = 0.5  # s between looks at the shared folder
_CAPTIONS_A_PROCESS = 64  # loading the text encoder once more must pay

Make = Callable[[torch.device], Worker[Any]]


@dataclass(frozen=True)
class Kind:
    """A sort of task: how it and its result are written as JSON, how many pictures or captions it has,
    and how many processes some tasks are worth."""

    name: str
    values: Callable[[Any], Any]
    of: Callable[[Any], Any]
    result_values: Callable[[Any], Any]
    result_of: Callable[[Any], Any]
    size: Callable[[Any], int]
    processes: Callable[[int, int], int]
    """Of the number of tasks and of all that is in them."""


def job_of(values: dict[str, Any]) -> Job:
    """A job from `asdict`'s values after their way through JSON."""
    pictures = [
        Picture(
            **(each | {"entry": SourceImage.of(each["entry"]), "bucket": Bucket(**each["bucket"])})
        )
        for each in values["pictures"]
    ]
    return Job(**(values | {"bucket": Bucket(**values["bucket"]), "pictures": pictures}))


CAPTIONS = Kind(
    "captions", list, list, dict, dict, len, lambda _, all_: -(-all_ // _CAPTIONS_A_PROCESS)
)
PICTURES = Kind(
    "pictures", asdict, job_of, manifest.note_values, manifest.note_of, lambda job: len(job.pictures),
    lambda tasks, _: tasks,
)  # fmt: skip


class Team:
    """Machine `node` of `nodes`. With one machine nothing is written and nobody waited for."""

    def __init__(self, node: int = 0, nodes: int = 1, start: str = "") -> None:
        if not 0 <= node < nodes or (nodes > 1 and not start):
            raise UserError(
                f"FLUX2_DS_NODE is {node}, FLUX2_DS_NODES {nodes} and FLUX2_DS_START {start!r}: "
                "machines are counted from 0, and several need a name for this start, the same on all."
            )
        self.node, self._nodes, self._start = node, nodes, start

    @classmethod
    def of_environment(cls) -> Team:
        """As the launcher sets it."""
        node, nodes = (os.environ.get(f"FLUX2_DS_{name}", "") for name in ("NODE", "NODES"))
        return cls(int(node or 0), int(nodes or 1), os.environ.get("FLUX2_DS_START", ""))

    @contextmanager
    def gathered(self, folder: Path) -> Iterator[None]:
        """On the first machine: open the meeting place of this start, and tell the others of the end."""
        place = folder / manifest.FOLDER / "team"
        shutil.rmtree(place, ignore_errors=True)  # of an earlier start
        if self._nodes == 1:
            yield
            return
        self._place = place / self._start
        self._phase = 0
        self._place.mkdir(parents=True)
        log.info("%d machines encode", self._nodes)
        try:
            yield
        finally:
            (place / f"{self._start}.over").touch()
            shutil.rmtree(self._place, ignore_errors=True)

    def run(
        self, kind: Kind, make: Make, devices: list[str], tasks: Sequence[Any], progress: tqdm
    ) -> Iterator[Any]:
        """On the first machine: the results of all tasks, in any order, whoever does them."""
        if self._nodes == 1:
            wanted = kind.processes(len(tasks), sum(map(kind.size, tasks)))
            yield from run_tasks(make, tasks, devices[:wanted], progress)
            return
        phase = self._hand_out(kind, tasks)
        waiting = {_name(number) for number in range(len(tasks))}

        def finished() -> Iterator[Any]:
            there = {path.name.removesuffix(".done") for path in phase.glob("*.done")} & waiting
            waiting.difference_update(there)
            for name in sorted(there):
                progress.update(kind.size(tasks[int(name)]))
                yield kind.result_of(json.loads((phase / f"{name}.done").read_text()))

        for _ in self._work(phase, make, devices):
            yield from finished()
        while waiting:
            time.sleep(_POLL)
            yield from finished()
        shutil.rmtree(phase, ignore_errors=True)  # another machine may have a file open

    def phases(self, folder: Path) -> Iterator[tuple[Kind, Callable[[Make, list[str]], None]]]:
        """On the other machines: every phase as it comes, with the call that does this machine's part,
        until the first machine is done."""
        place, last = folder / manifest.FOLDER / "team", ""
        while True:
            # Listings, because NFS remembers for a while that a single file was not there.
            starts = {path.name for path in place.glob("*")}
            opened = sorted(path for path in (place / self._start).glob("[0-9]*"))
            if not opened or opened[-1].name <= last:
                if f"{self._start}.over" in starts or (last and self._start not in starts):
                    return
                time.sleep(_POLL)
                continue
            phase, last = opened[-1], opened[-1].name

            def work(make: Make, devices: list[str], phase: Path = phase) -> None:
                for _ in self._work(phase, make, devices):
                    pass

            yield _kind_of(phase), work

    def _hand_out(self, kind: Kind, tasks: Sequence[Any]) -> Path:
        """Write the tasks; the folder appears with all of them."""
        self._phase += 1
        phase = self._place / f"{self._phase:04d}-{kind.name}"
        unfinished = self._place / "partial"
        unfinished.mkdir()
        for number, task in enumerate(tasks):
            (unfinished / f"{_name(number)}.task").write_text(json.dumps(kind.values(task)))
        items = sum(map(kind.size, tasks))
        (unfinished / "processes").write_text(str(kind.processes(len(tasks), items)))
        return unfinished.rename(phase)

    def _work(self, phase: Path, make: Make, devices: list[str]) -> Iterator[None]:
        """Do what nobody else does of a phase. It may be over before this machine is ready."""
        names = sorted(path.stem for path in phase.glob("*.task"))
        try:
            wanted = int((phase / "processes").read_text()) - self.node * len(devices)
        except FileNotFoundError:
            return
        if own := devices[: max(wanted, 0)]:
            yield from run_tasks(partial(Claiming, make, phase), names, own, tqdm(disable=True))


class Claiming:
    """Does those tasks of a phase that no other process does."""

    def __init__(self, make: Make, phase: Path, device: torch.device) -> None:
        self._worker = make(device)
        self._phase, self._kind = phase, _kind_of(phase)

    def __call__(self, name: str, tick: Callable[[int], Any]) -> None:
        """Do one task, or nothing."""
        try:
            (self._phase / f"{name}.claim").touch(exist_ok=False)
        except (FileExistsError, FileNotFoundError):  # somebody does it, or all are done
            return
        task = self._kind.of(json.loads((self._phase / f"{name}.task").read_text()))
        result = self._worker(task, self._check)
        atomic_write_text(
            self._phase / f"{name}.done", json.dumps(self._kind.result_values(result))
        )

    def _check(self, _: int) -> None:
        """Leave the folder to a later start: this one may be the rest of one that was killed."""
        if not self._phase.is_dir():
            raise UserError(f"{self._phase} is gone: this start is over, perhaps by another one.")


def _kind_of(phase: Path) -> Kind:
    return {kind.name: kind for kind in (CAPTIONS, PICTURES)}[phase.name.partition("-")[2]]


def _name(number: int) -> str:
    return f"{number:06d}"
