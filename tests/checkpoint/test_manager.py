"""Checkpoints: all of it or none, damage is noticed, old ones go."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from tqdm import tqdm

from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.checkpoint import tensor_store
from flux2_ds.checkpoint.tensor_store import TensorShard
from flux2_ds.engine.host_memory import HostBuffers
from flux2_ds.errors import UserError

KINDS = ("weights", "exp_avg", "exp_avg_sq")


def tensors(step: int) -> Iterator[tuple[str, str, torch.Tensor]]:
    for number, kind in enumerate(KINDS):
        for name in ("a", "b.c"):
            yield kind, name, torch.full((3, 5), float(10 * step + number))


@pytest.fixture
def save(write_checkpoint: Callable[..., Path]) -> Callable[..., list[Path]]:
    def write(root: Path, *steps: int) -> list[Path]:
        return [write_checkpoint(root, step, tensors(step), {"updates": step}) for step in steps]

    return write


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def steps_left(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in root.glob("step_*"))


def test_what_is_saved_is_loaded_from_the_highest_step(tmp_path, save):
    _, path, _ = save(tmp_path / "checkpoints", 2, 12, 9)
    found, damaged = checkpoint.newest(tmp_path / "checkpoints")
    assert (found.path, found.step, damaged) == (path, 12, {})
    assert checkpoint.verify(found) is None
    assert found.state()["updates"] == 12
    assert found.state()["step"] == 12
    for kind, name, tensor in tensors(12):
        assert torch.equal(found.tensors(kind)[name], tensor)
    assert path.name == "step_00000012"
    files = json.loads((path / "state.json").read_text())["files"]
    assert set(files) == {f"{kind}.safetensors" for kind in KINDS}
    assert {file.name for file in path.iterdir()} == {*files, "state.json"}
    assert all(facts["bytes"] == (path / name).stat().st_size for name, facts in files.items())


def test_tensors_are_stored_in_fp32_whatever_they_come_in(tmp_path, write_checkpoint):
    exact = torch.tensor([1.0, 2.5, -0.125])
    rows = [("weights", "half", exact.bfloat16()), ("weights", "double", exact.double())]
    # A view of a larger tensor, as ZeRO's flat buffers give.
    rows.append(("weights", "view", torch.cat([exact, exact])[3:]))
    write_checkpoint(tmp_path, 1, rows, {})
    found = checkpoint.newest(tmp_path)[0].tensors("weights")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(tensor, exact) for tensor in found.values())


def test_a_buffer_that_is_used_again_is_copied_in_time(tmp_path, write_checkpoint):
    def one_buffer() -> Iterator[tuple[str, str, torch.Tensor]]:
        buffer = torch.zeros(2)
        for value in (1.0, 2.0):
            buffer.fill_(value)
            yield "weights", str(value), buffer

    write_checkpoint(tmp_path, 1, one_buffer(), {})
    found = checkpoint.newest(tmp_path)[0].tensors("weights")
    assert found["1.0"].tolist() == [1, 1]
    assert found["2.0"].tolist() == [2, 2]


@pytest.mark.parametrize("folder", [".", "absent"])
def test_no_checkpoints(tmp_path, folder):
    assert checkpoint.newest(tmp_path / folder) == (None, {})


def test_saving_again_replaces(tmp_path, save, write_checkpoint):
    save(tmp_path, 5)
    write_checkpoint(tmp_path, 5, [("weights", "new", torch.ones(1))], {"updates": 6})
    found, _ = checkpoint.newest(tmp_path)
    assert found.state()["updates"] == 6
    assert list(found.tensors("weights")) == ["new"]
    assert checkpoint.verify(found) is None


def test_failure_while_writing_leaves_the_one_before(tmp_path, save, write_checkpoint):
    save(tmp_path, 1)
    with pytest.raises(TypeError, match="JSON"):  # after the tensors are written
        write_checkpoint(tmp_path, 2, tensors(2), {"updates": object()})
    assert checkpoint.newest(tmp_path)[0].step == 1
    assert steps_left(tmp_path) == [1]


def test_a_file_system_that_syncs_no_directories_holds_checkpoints(tmp_path, save, monkeypatch):
    sync = os.fsync

    def files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    save(tmp_path, 1)
    assert checkpoint.newest(tmp_path)[0].step == 1


@pytest.mark.parametrize("name", ["2.partial", "7.partial", "7.removed"])
def test_leftover_of_a_process_that_was_killed_is_ignored_and_cleared(tmp_path, name, save):
    save(tmp_path, 1)
    leftover = tmp_path / f".step_0000000{name}"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    (leftover / "stale").touch()
    found, damaged = checkpoint.newest(tmp_path)
    assert (found.step, damaged) == (1, {})
    save(tmp_path, 2)
    checkpoint.remove_old(tmp_path, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    assert checkpoint.verify(checkpoint.newest(tmp_path)[0]) is None
    assert not list(tmp_path.rglob("stale"))


DAMAGES = [
    ("weights.safetensors", cut, "bytes instead of"),
    *((f"{kind}.safetensors", flip_a_byte, "sha256") for kind in KINDS),
    ("weights.safetensors", Path.unlink, "is missing"),
    ("state.json", Path.unlink, "is missing"),
    ("state.json", cut, "cannot be read"),
    ("state.json", lambda path: path.write_text("{}"), "cannot be read"),
    ("state.json", lambda path: path.write_text("[" * 10000), "cannot be read"),
    ("state.json", lambda path: change(path, updates=31), "sha256"),
    ("state.json", lambda path: change(path, files={}), "sha256"),
    ("state.json", lambda path: change(path, sha256=0), "sha256"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES)
def test_damage_is_said_and_the_one_before_is_used(tmp_path, name, damage, reason, save):
    *_, last = save(tmp_path, 10, 20, 30)
    damage(last / name)
    found, damaged = checkpoint.newest(tmp_path)
    assert (found.step, list(damaged)) == (20, [last])
    assert name in damaged[last]
    assert reason in damaged[last]


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path, save):
    *_, last = save(tmp_path, 10, 20)
    last.rename(tmp_path / "step_00000030")
    found, damaged = checkpoint.newest(tmp_path)
    assert (found.step, list(damaged.values())) == (10, ["state.json is of step 20"])


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors"])
def test_a_file_that_cannot_be_read_is_not_passed_over(tmp_path, name, save):
    """The checkpoint may be good; going on from the one before would lose it."""
    *_, last = save(tmp_path, 10, 20)
    (last / name).unlink()
    (last / name).symlink_to(name)  # a loop
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        checkpoint.newest(tmp_path)


def test_a_damaged_checkpoint_that_is_set_aside_is_kept_and_not_counted(tmp_path, save):
    for content in (b"first", b"second"):  # damaged, trained anew, damaged again
        *_, last = save(tmp_path, 10, 20, 30)
        (last / "weights.safetensors").write_bytes(content)
        aside = checkpoint.set_aside(last)
    assert aside == tmp_path / "step_00000030.damaged"
    assert (aside / "weights.safetensors").read_bytes() == b"second"
    checkpoint.remove_old(tmp_path, 1, None)
    assert {path.name for path in tmp_path.iterdir()} == {aside.name, "step_00000020"}
    assert checkpoint.newest(tmp_path)[1] == {}


def test_nothing_is_used_when_all_are_damaged(tmp_path, save):
    for path in save(tmp_path, 10, 20):
        flip_a_byte(path / "exp_avg.safetensors")
    with pytest.raises(
        UserError, match=r"no intact checkpoint is left \(.*step_00000020.*_00000010"
    ):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, None, [40]), (2, None, [30, 40]), (9, None, [10, 20, 30, 40]), (1, 20, [20, 40])],
)
def test_old_checkpoints_are_removed(tmp_path, keep_last, keep_every, left, save):
    save(tmp_path, 10, 20, 30, 40)
    assert checkpoint.best_step(tmp_path, [(10, math.nan), (20, 0.4), (30, 0.5)]) == 20
    checkpoint.remove_old(tmp_path, keep_last, keep_every)
    assert steps_left(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)  # no hidden leftovers either
    assert checkpoint.newest(tmp_path)[0].step == 40


def test_directories_of_the_users_own_are_left_alone(tmp_path, save):
    save(tmp_path, 10, 20)
    for name in ("step_00000010.bak", "step_best", "step_7"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path)[0].step == 20
    checkpoint.remove_old(tmp_path, 1, None)
    left = {"step_00000010.bak", "step_00000020", "step_7", "step_best"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_leftover_of_an_interrupted_removal_does_not_stop_the_next(tmp_path, save):
    save(tmp_path, 10, 20)
    leftover = tmp_path / ".step_00000010.removed"
    leftover.mkdir()
    (leftover / "weights.safetensors").touch()
    checkpoint.remove_old(tmp_path, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]


@pytest.mark.parametrize(("limit", "most"), [(math.inf, 12), (100, 5), (0, 2)])
def test_a_snapshot_is_that_of_its_moment_whole_or_in_pieces(
    tmp_path, limit, most, write_checkpoint, monkeypatch
):
    """Twelve files of 24 bytes; `most` of them are in host memory at a time, one of which is being filled."""
    monkeypatch.setattr(tensor_store, "FILE_BYTES", 24)
    parts = {name: torch.empty(6) for name in "abcd"}
    changed, write = threading.Event(), checkpoint.write_files

    def write_later(*what: Any) -> Any:
        assert limit < math.inf or changed.wait(60)  # pieces are not waited for that long
        return write(*what)

    def change() -> None:
        for part in parts.values():
            part.zero_()
        changed.set()

    monkeypatch.setattr(checkpoint, "write_files", write_later)
    buffers, found = HostBuffers(limit, torch.device("cpu")), []
    for given in (None, buffers, buffers):
        for number, part in enumerate(parts.values()):
            part.fill_(number)
        changed.clear() if given else changed.set()
        shards = (TensorShard(kind, n, p, 6, (12,)) for kind in KINDS for n, p in parts.items())
        root = tmp_path / str(len(found))
        path = write_checkpoint(root, 3, shards, sharded=True, buffers=given, meanwhile=change)
        found.append({file.name: file.read_bytes() for file in path.iterdir()})
        assert [path] == list(root.iterdir())
    assert len(found[0]) == 13
    assert found[0] == found[1] == found[2]
    allocated = sum(map(len, buffers._free.values()))
    assert allocated == most if most == 12 else allocated <= most


def test_killed_at_any_moment(tmp_path, save_alone):
    """Twenty processes that save without pause, each killed: what is there is always intact. Every other one
    saves in the background."""
    chance, fork = random.Random(0), multiprocessing.get_context("fork")
    last = 0
    for number in range(20):
        steps = itertools.count(last + 1)
        process = fork.Process(target=save_each, args=(save_alone, tmp_path, steps, number % 2))
        process.start()
        deadline = time.monotonic() + 60
        while max(steps_left(tmp_path), default=0) <= last:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        found, damaged = checkpoint.newest(tmp_path)
        assert damaged == {}
        assert found.step > last
        last = found.step
        for kind, name, tensor in tensors(last):
            assert torch.equal(found.tensors(kind)[name], tensor)
    process = fork.Process(target=save_each, args=(save_alone, tmp_path, [last + 1]))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 2  # no leftovers beside the last two


def save_each(
    save: Callable[..., Path], root: Path, steps: Iterable[int], background: int = 0
) -> None:
    # The default one is shared by forked processes, and stays locked if one is killed.
    tqdm.set_lock(threading.RLock())
    buffers = HostBuffers(math.inf, torch.device("cpu")) if background else None
    alone = {"backend": "gloo", "rank": 0, "world_size": 1}
    distributed.init_process_group(**alone, store=distributed.HashStore())
    for step in steps:
        save(root, step, tensors(step), buffers=buffers)
        checkpoint.remove_old(root, 2, None)
