"""A build that was killed does not hold up every later start."""

import os
import time
from pathlib import Path
from threading import Timer

import pytest

from flux2_ds.engine.engine import wait_for_build


@pytest.mark.parametrize(("age", "held"), [(0, True), (10_000, True), (0, False), (10_000, False)])
def test_the_lock_of_a_killed_build_is_removed(
    tmp_path: Path, age: int, held: bool, caplog
) -> None:
    """One that a process holds, or that is young, is waited for until its owner removes it."""
    lock = tmp_path / "lock"
    owner = os.open(lock, os.O_CREAT | os.O_EXCL)
    os.utime(lock, (time.time() - age,) * 2)
    if not held:
        os.close(owner)
    done = Timer(1.5, lock.unlink, kwargs={"missing_ok": True})
    done.start()
    wait_for_build(lock)
    assert ("was killed" in caplog.text) == (age > 0 and not held)
    assert not lock.exists()
    done.join()
    if held:
        os.close(owner)


def test_without_a_lock_nothing_waits(tmp_path: Path) -> None:
    wait_for_build(tmp_path / "lock")
