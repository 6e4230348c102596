"""Several machines prepare one folder: the shards are those of one machine, whatever was killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_prepare import add_photo, model, photos, recipe_for, report, run, shard_bytes, truncate

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_spec import read_spec
from flux2_ds.config.recipe import Prepare, Recipe, recipe_values
from flux2_ds.data.index import read_index
from flux2_ds.data.storage import Blob
from flux2_ds.errors import UserError
from flux2_ds.prepare import __main__ as root
from flux2_ds.prepare.manifest import Job
from flux2_ds.prepare.pictures import PictureWorker
from flux2_ds.prepare.source_images import Picture, SourceImage
from flux2_ds.prepare.team import PICTURES, Team
from flux2_ds.prepare.texts import TextWorker

__all__ = ["model", "photos"]  # fixtures

SLOW = """
import sys, time
from flux2_ds.prepare import __main__ as root, pictures
encode = pictures.latents.encode
pictures.latents.encode = lambda *a: (time.sleep(0.3), encode(*a))[1]
sys.argv = ["prepare", "--config", sys.argv[1]]
root.main()
"""


@pytest.fixture(autouse=True)
def _one_loads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While diffusers loads a model it patches torch's modules, in all threads; two at a time may leave that so."""
    lock = threading.Lock()
    for worker in (PictureWorker, TextWorker):

        def load(self: Any, *call: Any, init: Any = worker.__init__) -> None:
            with lock:
                init(self, *call)

        monkeypatch.setattr(worker, "__init__", load)


def together(recipe: Recipe, start: str) -> None:
    """Both machines as threads of this process."""
    model = Path(recipe.model.path)
    second = threading.Thread(
        target=root.assist, args=(recipe, model, read_spec(model), Team(1, 2, start)), daemon=True
    )
    second.start()
    root.prepare(recipe, model, read_spec(model), Team(0, 2, start))
    second.join(10)
    assert not second.is_alive()


def start_machine(config: Path, node: int) -> subprocess.Popen[bytes]:
    place = {"FLUX2_DS_NODE": str(node), "FLUX2_DS_NODES": "2", "FLUX2_DS_START": "first"}
    command = [sys.executable, "-c", SLOW, str(config)]
    return subprocess.Popen(command, env=os.environ | place, stderr=subprocess.DEVNULL)


def test_a_killed_machine_costs_no_finished_shard_and_changes_nothing(model, photos, tmp_path):
    for number in range(20):
        add_photo(photos, f"more{number}", (96, 96), f"caption {number}")
    truncate(photos / "a.png")
    run(recipe_for(model, photos, tmp_path / "whole"))

    recipe = recipe_for(model, photos, tmp_path / "cut")
    config, notes = tmp_path / "recipe.yaml", tmp_path / "cut" / "prepared"
    config.write_text(yaml.safe_dump(recipe_values(recipe)))
    machines = [start_machine(config, node) for node in range(2)]
    deadline = time.monotonic() + 120
    while len(list(notes.glob("*.tar.json"))) < 3:
        assert [machine.poll() for machine in machines] == [None, None]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for machine in reversed(machines):
        machine.send_signal(signal.SIGKILL)
        machine.wait()
    assert len(list((notes / "team" / "first").glob("*-pictures/*.claim"))) > 3
    finished = {path.name.removesuffix(".json") for path in notes.glob("*.tar.json")}
    times = {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in finished}

    together(recipe, "second")
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in finished} == times
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")
    assert read_index(tmp_path / "cut") == read_index(tmp_path / "whole")
    assert report(tmp_path / "cut")["skipped"] == report(tmp_path / "whole")["skipped"]
    left = {path.name for path in (tmp_path / "cut").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole").iterdir()}
    assert [path.name for path in (notes / "team").iterdir()] == ["second.over"]


def test_both_machines_encode_and_nothing_twice(model, photos, tmp_path, monkeypatch):
    for number in range(70):  # so many captions that a second text encoder pays
        (photos / f"copy{number}.png").symlink_to(photos / "a.png")
        (photos / f"copy{number}.txt").write_text(f"caption {number}")
    run(recipe_for(model, photos, tmp_path / "one", samples_per_shard=8))
    done = []
    for name in ("TextWorker", "PictureWorker"):
        worker = getattr(sys.modules["flux2_ds.prepare.encode"], name)

        def noted(self, task, tick, call=worker.__call__, name=name):
            time.sleep(0.02)  # time for the other to take the next
            what = task.name if name == "PictureWorker" else tuple(task)
            done.append((threading.current_thread() is threading.main_thread(), name, what))
            return call(self, task, tick)

        monkeypatch.setattr(worker, "__call__", noted)
    # A shard a round, then all at once: phases that the second machine is late for, and ones it is not.
    for scratch in (1e-9, 100.0):
        recipe = recipe_for(model, photos, tmp_path / str(scratch), samples_per_shard=8,
                            prepare=Prepare(scratch_gb=scratch))  # fmt: skip
        done.clear()
        together(recipe, "start")
        assert len(set(done)) == len({item[1:] for item in done}) == len(done)
        assert shard_bytes(tmp_path / str(scratch)) == shard_bytes(tmp_path / "one")
    assert {item[:2] for item in done} == {
        (first, name) for first in (True, False) for name in ("TextWorker", "PictureWorker")
    }


def test_a_machine_with_another_model_or_setting_does_not_encode(model, photos, tmp_path):
    recipe = recipe_for(model, photos, tmp_path / "s")
    other = dataclasses.replace(recipe, precision="bf16")
    team = Team(0, 2, "start")
    with root.claimed(tmp_path / "s", root.content_of(recipe, {})), team.gathered(tmp_path / "s"):
        team._hand_out(PICTURES, [])
        with pytest.raises(
            UserError, match=r"prepare\.text_weights was .*; the model's pipeline was"
        ):
            root.assist(other, model, read_spec(model), Team(1, 2, "start"))


def test_a_job_survives_its_way_to_another_machine():
    blob = Blob("photos/\udcff ü.png", 3, 9)
    entry = SourceImage(
        "me", "\udcff ü.png", "1:2", "an ü", blob, None, (30, 40), blob, (blob, blob)
    )
    plain = SourceImage("me", "b", "1:2", "b", Blob("b"))
    bucket = Bucket(32, 48)
    pictures = [Picture(each, "caption", bucket, 0.25) for each in (entry, plain)]
    job = Job("x.tar", "me", bucket, pictures, held_out=True)
    assert PICTURES.of(json.loads(json.dumps(PICTURES.values(job)))) == job


@pytest.mark.parametrize("place", [(2, 2, "x"), (-1, 1, ""), (0, 2, "")])
def test_a_place_that_cannot_be_is_refused(place, monkeypatch):
    for name, value in zip(("NODE", "NODES", "START"), place, strict=True):
        monkeypatch.setenv(f"FLUX2_DS_{name}", str(value))
    with pytest.raises(UserError, match="FLUX2_DS_NODE is"):
        Team.of_environment()
