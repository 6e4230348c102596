"""When a run may continue in its directory, and what is written there."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from flux2_ds.config.parse import load_recipe
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Checkpoint, Data, Lora, Model, Optimizer, Recipe, recipe_values
from flux2_ds.errors import OutageError, UserError
from flux2_ds.run.logging import open_log
from flux2_ds.run.run_dir import (
    changed_settings,
    check_run_dir,
    export_path,
    lock_run_dir,
    newest_step,
    stop_file,
    trained_recipe,
    with_adapter_file,
    write_run_dir,
)


def make_recipe(run_dir: Path, **changes: Any) -> Recipe:
    recipe = Recipe(
        run_dir=str(run_dir), model=Model(path="m"), data=Data(images="photos", shards="shards")
    )
    return dataclasses.replace(recipe, **changes)


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """The directory of a run that has a checkpoint."""
    write_run_dir(make_plan(make_recipe(tmp_path / "run"), 1))
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    return tmp_path / "run"


def test_a_run_without_a_checkpoint_binds_nobody(started):
    (started / "checkpoints" / "step_00000002").rmdir()
    check_run_dir(make_recipe(started, seed=5))


def test_new_and_empty_directories_are_accepted(tmp_path):
    check_run_dir(make_recipe(tmp_path / "new"))
    assert not (tmp_path / "new").exists()  # checking writes nothing
    (tmp_path / "empty").mkdir()
    check_run_dir(make_recipe(tmp_path / "empty"))
    # What a training leaves that was stopped before its first file.
    lock_run_dir(make_recipe(tmp_path / "empty")).close()
    stop_file(make_recipe(tmp_path / "empty")).touch()
    check_run_dir(make_recipe(tmp_path / "empty"))


def test_a_directory_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run/.lock cannot be written \(Not a directory\)"):
        lock_run_dir(make_recipe(tmp_path / "file" / "run"))


def test_a_start_that_cannot_write_its_directory_says_so_and_blocks_no_other(tmp_path, monkeypatch):
    plan = make_plan(make_recipe(tmp_path / "run"), 1)
    write = Path.write_text

    def full(self: Path, *content: Any, **options: Any) -> int:
        if "versions" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *content, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OutageError, match=r"run_dir .*run cannot be written \(No space left"):
            write_run_dir(plan)
    (tmp_path / "run" / "recipe.yaml.partial").touch()  # as a killed process leaves it
    check_run_dir(plan.recipe)
    write_run_dir(plan)
    check_run_dir(plan.recipe)


def test_one_training_at_a_time_has_the_run_directory(tmp_path):
    recipe = make_recipe(tmp_path / "deep" / "run")
    with lock_run_dir(recipe):
        with pytest.raises(UserError, match=r"another process is training in run_dir .*run"):
            lock_run_dir(recipe)
        lock_run_dir(make_recipe(tmp_path / "other")).close()
    lock_run_dir(recipe).close()


def test_what_is_exported_is_what_was_trained(tmp_path, caplog):
    trained = make_recipe(tmp_path / "run", method="dora", lora=Lora(rank=4, targets="attention"))
    write_run_dir(make_plan(trained, 1))
    asked = make_recipe(tmp_path / "run", method="full", precision="fp16")
    assert trained_recipe(trained) == trained and not caplog.text
    assert trained_recipe(asked) == dataclasses.replace(trained, precision="fp16")
    assert "recipe.yaml; what else was given is ignored" in caplog.text
    with pytest.raises(UserError, match="holds no run"):
        trained_recipe(make_recipe(tmp_path / "absent"))


def test_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not a run of flux2-ds"):
        check_run_dir(make_recipe(tmp_path))
    with pytest.raises(UserError, match=r"thesis.tex cannot be read \(Not a directory\)"):
        check_run_dir(make_recipe(tmp_path / "thesis.tex"))


def test_checkpoints_that_cannot_be_read_are_not_none(started):
    """A run would start over."""
    (started / "checkpoints").rename(started / "elsewhere")
    (started / "checkpoints").touch()
    for reads in (check_run_dir, changed_settings, newest_step):
        with pytest.raises(UserError, match=r"checkpoints cannot be read \(Not a directory\)"):
            reads(make_recipe(started))


@pytest.mark.parametrize(
    "name", [".lock", "stop", "loss.png", "recipe.yaml.partial", "logs", "logs/rank_0.log", "checkpoints",
             "checkpoints/step_00000009", "export", "nonfinite"]
)  # fmt: skip
def test_links_that_would_be_written_through_are_refused(started, tmp_path, name):
    (tmp_path / "target").mkdir()
    if name == "checkpoints":
        (started / "checkpoints").rename(started / "elsewhere")
    (started / name).parent.mkdir(exist_ok=True)
    (started / name).symlink_to(tmp_path / "target" / "file")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        check_run_dir(make_recipe(started))


def test_a_run_dir_may_itself_be_a_link(started, tmp_path):
    (tmp_path / "link").symlink_to(started)
    (started / "wandb").mkdir()
    (started / "wandb" / "latest-run").symlink_to("run-1")  # W&B's own
    check_run_dir(make_recipe(tmp_path / "link"))


def test_no_link_is_followed(tmp_path):
    """Also one that was made since the check."""
    run_dir, target = tmp_path / "run", tmp_path / "precious"
    (run_dir / "logs").mkdir(parents=True)
    target.write_text("kept")
    for name in (".lock", "recipe.yaml.partial", "versions.json.partial", "logs/rank_0.log"):
        (run_dir / name).symlink_to(target)
    with pytest.raises(UserError, match=r"\.lock cannot be written"):
        lock_run_dir(make_recipe(run_dir))
    with pytest.raises(OSError, match="symbolic links"):
        open_log(run_dir / "logs" / "rank_0.log")
    write_run_dir(make_plan(make_recipe(run_dir), 1))
    assert target.read_text() == "kept"
    assert not (run_dir / "recipe.yaml").is_symlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "seed was 0, is 5"),
        ({"model": Model(path="n")}, "model.path was 'm', is 'n'"),
        ({"optimizer": Optimizer(betas=(0.9, 0.95))}, r"optimizer.betas was \[.*\], is \[.*\]"),
        ({"data": Data(images="photos", shards="shards", shuffle_window=2)}, "window was 8, is 2"),
    ],
)
def test_changed_recipe_is_refused_with_old_and_new(started, changes, message):
    with pytest.raises(UserError, match=message):
        check_run_dir(make_recipe(started, **changes))
    check_run_dir(make_recipe(started, **changes, accept_changes=True))
    check_run_dir(make_recipe(started, steps=2000, checkpoint=Checkpoint(every=7, keep_last=1)))


def test_every_change_is_named_and_nothing_else(started):
    with pytest.raises(UserError, match=r"lora.alpha was None.*lora.rank was.*seed was") as caught:
        check_run_dir(make_recipe(started, seed=5, lora=Lora(rank=4, alpha=8.0)))
    assert str(caught.value).count(" was ") == 3


def test_run_directory_says_what_ran(tmp_path):
    run_dir = tmp_path / "deep" / "été 猫"
    recipe = make_recipe(run_dir, seed=3, lora=Lora(rank=4))
    plan = make_plan(recipe, 2)
    write_run_dir(plan)
    check_run_dir(recipe)
    assert load_recipe(run_dir / "recipe.yaml") == recipe
    assert json.loads((run_dir / "deepspeed.json").read_text()) == plan.deepspeed
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions.keys() >= {"python", "torch", "deepspeed"}
    assert not list(run_dir.glob("*.partial"))


@pytest.mark.parametrize("content", ["", "seed: 0\n", "a: [", "text"])
def test_damaged_stored_recipe_is_refused(started, content):
    (started / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml is damaged"):
        check_run_dir(make_recipe(started))


def test_exports_are_named_after_the_run(tmp_path):
    recipe = make_recipe(tmp_path / "cats")
    assert (
        export_path(recipe, 40) == tmp_path / "cats/export/cats-step_00000040-diffusers.safetensors"
    )
    full = dataclasses.replace(recipe, method="full")
    assert export_path(recipe, 40, "ema").name == "cats-step_00000040-ema-diffusers.safetensors"
    assert export_path(full, 40, "ema").parent.name == "step_00000040-ema"
    assert export_path(full, 40) == tmp_path / "cats/export/step_00000040/transformer"


def test_a_run_that_continues_does_not_read_the_file_it_began_with(tmp_path):
    """Its adapter's settings are those in its own recipe; without a checkpoint the file decides."""
    run_dir, recipe = tmp_path / "run", make_recipe(tmp_path / "run")
    stored = dataclasses.replace(recipe, lora=Lora(rank=5, targets=["attn.to_q"], init_from="gone"))
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe_values(stored)))
    now = dataclasses.replace(recipe, lora=Lora(init_from="gone"))
    with pytest.raises(UserError, match=r"lora.init_from gone cannot be read"):
        with_adapter_file(now)
    (run_dir / "checkpoints/step_00000002").mkdir(parents=True)
    assert with_adapter_file(now) == stored
    with pytest.raises(UserError, match=r"lora.rank is 7, .* has 5"):
        with_adapter_file(dataclasses.replace(now, lora=Lora(init_from="gone", rank=7)))
    other = dataclasses.replace(now, lora=Lora(init_from="other"))
    assert with_adapter_file(other) == other
