"""Restarts, and hosts that are left out."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from flux2_ds.config.recipe import Batch, Data, Launch, Model, Recipe
from flux2_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from launcher import supervise
from launcher.hosts import Hosts, on_hosts

SLOTS = {"node01": 8, "node02": 8, "node03": 8, "node04": 8}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(supervise, "_PAUSE", 0.0)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    return Recipe(
        run_dir=str(tmp_path / "run"),
        model=Model(path="m"),
        data=Data(images="p", shards="s"),
        batch=Batch(global_size=64, micro_size=1),
        launch=Launch(accelerator="cpu"),
    )


def attempts(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, outcomes: list[tuple[int, int]], restarts: int
) -> tuple[int, int]:
    """(last exit code, starts) with (exit code, newest checkpoint) of each start given."""
    left = iter(outcomes)
    starts = []

    def run(commands, stopper, failed):
        starts.append(commands)
        code, step = next(left)
        (Path(recipe.run_dir) / "checkpoints" / f"step_{step:08d}").mkdir(
            parents=True, exist_ok=True
        )
        return code

    monkeypatch.setattr(supervise, "run", run)
    arguments = {"max_restarts": restarts, "elastic": False}
    return supervise.supervise(recipe, Hosts(2), [], **arguments), len(starts)


@pytest.mark.parametrize(
    ("outcomes", "restarts", "expected"),
    [
        ([(1, 0)], 0, (1, 1)),
        ([(1, 0), (0, 10)], 1, (0, 2)),
        ([(1, 0), (1, 0), (0, 10)], 1, (1, 2)),
        # Progress since the last failure makes it count anew.
        ([(1, 10), (1, 20), (137, 30), (0, 40)], 1, (0, 4)),
        ([(1, 10), (1, 10), (1, 10), (0, 40)], 2, (1, 3)),
        ([(EXIT_USER_ERROR, 0), (0, 1)], 3, (EXIT_USER_ERROR, 1)),
        ([(EXIT_STOPPED, 0), (0, 1)], 3, (EXIT_STOPPED, 1)),
    ],
)
def test_restarts_are_counted_from_the_last_progress(
    monkeypatch, recipe, outcomes, restarts, expected
):
    assert attempts(monkeypatch, recipe, outcomes, restarts) == expected


def test_the_recorded_failure_decides_the_code(monkeypatch, recipe, capsys):
    failure = SimpleNamespace(code=EXIT_USER_ERROR)
    monkeypatch.setattr(supervise, "first_failure", lambda logs, since: failure)
    assert attempts(monkeypatch, recipe, [(137, 0)], 3) == (EXIT_USER_ERROR, 1)
    assert "left no error" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("alive", "fitting"),
    [
        (SLOTS.keys(), SLOTS),
        ({"node01", "node02", "node04"}, {"node01": 8, "node02": 8}),  # 64 over 24 does not go
        ({"node02", "node03"}, {"node02": 8, "node03": 8}),
        ({"node03"}, {"node03": 8}),
    ],
)
def test_the_remaining_hosts_divide_the_batch(monkeypatch, recipe, tmp_path, alive, fitting):
    monkeypatch.setattr(supervise, "answering", lambda names: set(alive))
    hosts = on_hosts(tmp_path / "hostfile", SLOTS)
    now = supervise.remaining(recipe, hosts)
    assert now.slots == fitting
    assert now.address == next(iter(fitting))
    if fitting != SLOTS:
        assert now.hostfile is not None
        lines = now.hostfile.read_text().splitlines()
        assert lines == [f"{name} slots=8" for name in fitting]


def test_no_host_left_is_an_error(monkeypatch, recipe, tmp_path):
    monkeypatch.setattr(supervise, "answering", lambda names: set())
    with pytest.raises(UserError, match="no host of"):
        supervise.remaining(recipe, on_hosts(tmp_path / "hostfile", SLOTS))
