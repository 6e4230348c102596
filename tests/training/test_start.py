"""What a start of the trainer refuses, and what it goes on from."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from flux2_ds import train
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import Memory
from flux2_ds.config.model_files import fingerprint, part_digest
from flux2_ds.config.model_spec import RELEASED, read_spec
from flux2_ds.config.parse import load_recipe
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import (
    Batch,
    Data,
    Lora,
    Model,
    Optimizer,
    Preservation,
    Preview,
    Recipe,
    Validation,
    recipe_values,
)
from flux2_ds.data.dataset import build_order, check_previews, check_shards, check_sources, in_steps
from flux2_ds.data.index import CONDITIONING_NAME, Index, Shard, write_index
from flux2_ds.data.shards import write_prompts
from flux2_ds.distributed import Process
from flux2_ds.errors import OutageError, UserError
from flux2_ds.run.metrics import metrics_digest
from flux2_ds.run.run_dir import lock_run_dir
from flux2_ds.training import checkpoints, inputs
from flux2_ds.training.checkpoints import note_base_files, resume
from flux2_ds.training.inputs import Inputs
from flux2_ds.training.lifecycle import failures_told
from flux2_ds.training.stop import StopRequest

KINDS = ("weights", "exp_avg", "exp_avg_sq")
ALONE, RANK1 = Process(0, 1, torch.device("cpu")), Process(1, 2, torch.device("cpu"))
INDEX = Index("klein", 32, {}, {}, [Shard("x.tar", Bucket(32, 32), 3, 5, "ab")])
pytestmark = pytest.mark.usefixtures("process_group")


def test_a_second_start_touches_nothing_of_a_running_one(tmp_path, monkeypatch):
    """Its refusal must not look like a failure of the processes that train."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: m}\ndata: {images: i, shards: s}\n")
    monkeypatch.setattr(
        "sys.argv", ["train", "--config", str(recipe), "--run_dir", str(tmp_path / "r")]
    )
    monkeypatch.setattr(StopRequest, "listen", lambda self: None)
    with (
        lock_run_dir(load_recipe(recipe, [f"--run_dir={tmp_path / 'r'}"])),
        pytest.raises(UserError, match="another process is training"),
    ):
        train.main()
    assert [path.name for path in (tmp_path / "r").iterdir()] == [".lock"]


def test_processes_that_read_different_indexes_are_refused(monkeypatch):
    recipe = Recipe(run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s"))
    inputs.check_same(INDEX, recipe, ALONE)
    monkeypatch.setattr(inputs, "broadcast_from_rank0", lambda value, device: value + 1)
    with pytest.raises(UserError, match=r"index of data.shards s on .* is not rank 0's"):
        inputs.check_same(INDEX, recipe, ALONE)


def test_epochs_become_steps_of_the_prepared_data(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"12345")
    (tmp_path / CONDITIONING_NAME).touch()
    write_index(tmp_path, Index("klein", 32, {}, {}, [Shard("x.tar", Bucket(32, 32), 40, 5, "ab")]))
    recipe = Recipe(
        run_dir="r",
        epochs=10,
        model=Model(path="m"),
        data=Data(images="i", shards=str(tmp_path), weights={"": 2.0}),
        validation=Validation(every_epochs=0.5),
        preview=Preview(every_epochs=1.26),
    )
    found = in_steps(recipe)  # an epoch is 10 batches of 8
    assert (found.steps, found.validation.every, found.preview.every) == (100, 5, 13)
    assert in_steps(found) is found  # what the run directory holds, and a resume compares with
    assert recipe.preview.in_training and found.preview.in_training
    with pytest.raises(UserError, match=r"epochs is 10 and steps is 5\. Leave out one"):
        make_plan(dataclasses.replace(recipe, steps=5), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"weights": {"b": 2.0}}}, "data.weights.b: there is no such source with images"),
        ({"objective": {"source_shift": {"b": 2.0}}}, r"objective.source_shift.b: .* there are a, p"),
        ({"preservation": {"sources": ["empty"]}}, "preservation.sources.empty: there is no such"),
        ({"preservation": {"sources": ["a", "p"]}}, "sources is a, p, .* nothing is left to learn"),
        ({"preservation": {"sources": ["p"]}, "data": {"weights": {"a": 0.0}}}, "nothing is left to"),
        ({"data": {"weights": {"a": 0.0, "p": 0.0}}}, r"data.weights is 0 for a, p, .* to train on"),
        ({"preservation": {"sources": ["p"]}, "data": {"weights": {"p": 0.5}}}, None),
    ],
)  # fmt: skip
def test_sources_without_images_to_train_on_are_refused(changes, message):
    shard = INDEX.shards[0]
    shards = [dataclasses.replace(shard, source=name) for name in "ap"]
    recipe = recipe_for(Path())
    sections = {n: dataclasses.replace(getattr(recipe, n), **v) for n, v in changes.items()}
    recipe = dataclasses.replace(recipe, **sections)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_sources(recipe, dataclasses.replace(INDEX, shards=shards))


def test_prompts_to_preserve_that_are_not_encoded_are_refused(tmp_path):
    recipe = recipe_for(tmp_path, preservation=Preservation(prompts=["a cat"], share=0.2))
    data = dataclasses.replace(recipe.data, shards=str(tmp_path))
    recipe = dataclasses.replace(recipe, data=data)
    check_previews(recipe, None, prepared=False)
    with pytest.raises(
        UserError, match=r"preservation.prompts is set, and .* no prompt 'a cat'\. Run"
    ):
        check_previews(recipe, None, prepared=True)
    write_prompts(tmp_path, {"a cat": torch.zeros(512, 32)})
    check_previews(recipe, None, prepared=True)


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    recipe = Recipe(
        run_dir=str(folder / "run"),
        model=Model(path=str(folder / "model")),
        data=Data(images="photos", shards="shards"),
    )
    return dataclasses.replace(recipe, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        (
            {"settings": {"resolution": 512}},
            "data.resolution is 1024, but data.shards shards .* 512",
        ),
        ({"settings": {"max_upscale": 1.5}}, r"data.max_upscale is 1.05, .* prepared with 1\.5"),
        ({"text_width": 48}, "text width 48"),
        ({"fingerprint": {"vae": "0"}}, "made by another model"),
        ({"fingerprint": {"padding": "none"}}, "their padding is none"),
    ],
)
def test_shards_that_do_not_belong_to_the_recipe_are_refused(tmp_path, tiny_model, change, message):
    spec, recipe = read_spec(tiny_model), recipe_for(tmp_path)
    data = recipe.data
    settings = {"resolution": data.resolution, "max_upscale": data.max_upscale}
    index = Index(spec.variant, spec.text_width, fingerprint(tiny_model), settings)
    index = dataclasses.replace(index, **change)
    if message is None:
        check_shards(index, spec, tiny_model, recipe)
    else:
        with pytest.raises(UserError, match=message):
            check_shards(index, spec, tiny_model, recipe)


def save(
    write: Callable[..., Path], recipe: Recipe, step: int, index: Index = INDEX, **more: Any
) -> Path:
    tensor_shards = [(kind, "a", torch.full((2,), float(step))) for kind in KINDS]
    state = {"updates": step - 1, "index": index.digest, "recipe": recipe_values(recipe)}
    run_dir = Path(recipe.run_dir)
    state |= {"metrics": metrics_digest(run_dir), "base": part_digest(run_dir, "transformer")}
    return write(Path(recipe.run_dir) / "checkpoints", step, tensor_shards, state | more)


def test_a_new_run_starts_at_the_beginning(tmp_path):
    assert resume(Mock(), recipe_for(tmp_path), INDEX, ALONE, tmp_path) == 0


def test_a_run_goes_on_from_the_newest_intact_checkpoint(tmp_path, caplog, write_checkpoint):
    recipe, engine = recipe_for(tmp_path), Mock()
    for step in (10, 20, 30):
        last = save(write_checkpoint, recipe, step)
    (last / "exp_avg.safetensors").unlink()
    assert resume(engine, recipe, INDEX, ALONE, tmp_path) == 20
    assert "exp_avg.safetensors is missing" in caplog.text
    (loaded,) = engine.state.load.call_args.args
    assert loaded.tensors("weights")["a"].tolist() == [20, 20]
    assert (loaded.kinds(), loaded.state()["updates"]) == (sorted(KINDS), 19)
    assert not last.exists()
    assert last.with_name(f"{last.name}.damaged").is_dir()


def test_other_shards_are_refused_unless_the_change_is_accepted(tmp_path, write_checkpoint, caplog):
    save(write_checkpoint, recipe_for(tmp_path), 10)
    other = dataclasses.replace(INDEX, shards=[*INDEX.shards, *INDEX.shards])
    engine = Mock()
    with pytest.raises(UserError, match=f"index {other.digest}, was {INDEX.digest}"):
        resume(engine, recipe_for(tmp_path), other, ALONE, tmp_path)
    engine.state.load.assert_not_called()
    assert resume(engine, recipe_for(tmp_path, accept_changes=True), other, ALONE, tmp_path) == 10
    assert f"accepted: other shards in data.shards shards (index {other.digest}, was" in caplog.text


@pytest.mark.parametrize(
    ("before", "now"),
    [("adamw", "adafactor"), ("adamw", "muon"), ("prodigy", "adamw"), ("adamw8bit", "adamw")],
)
def test_another_optimizer_is_refused_before_anything_changes(
    tmp_path, write_checkpoint, before, now
):
    save(write_checkpoint, recipe_for(tmp_path, optimizer=Optimizer(name=before)), 10)
    other = recipe_for(tmp_path, optimizer=Optimizer(name=now), accept_changes=True)
    engine = Mock()
    with pytest.raises(UserError, match=f"optimizer.name was {before}, is {now}"):
        resume(engine, other, INDEX, ALONE, tmp_path)
    engine.state.load.assert_not_called()


def test_a_base_that_has_changed_is_refused(tmp_path, write_checkpoint, caplog):
    recipe = recipe_for(tmp_path)
    save(write_checkpoint, recipe, 10)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"the transformer of model\.path .* is not the one"):
        resume(Mock(), recipe, INDEX, ALONE, tmp_path)
    accepting = recipe_for(tmp_path, accept_changes=True)
    assert resume(Mock(), accepting, INDEX, ALONE, tmp_path) == 10
    assert "accepted: another transformer" in caplog.text


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda file: None, False),
        (os.utime, False),  # another time of change, the same contents
        (lambda file: flip(file, 100_000), True),  # where no probe looks
        (lambda file: file.with_name("more.safetensors").write_bytes(b"x"), True),
        (lambda file: file.unlink(), True),
    ],
)
def test_a_byte_of_the_base_that_has_changed_is_refused(
    tmp_path, write_checkpoint, change, refused
):
    recipe = recipe_for(tmp_path)
    file = tmp_path / "transformer" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(bytes(range(256)) * 4096)
    os.utime(file, ns=(5, 5))
    state: dict[str, Any] = {}
    note_base_files(state, recipe, 0, tmp_path)
    while state["base_files"] is None:
        time.sleep(0.01)
    base = part_digest(tmp_path, "transformer")
    save(write_checkpoint, recipe, 10, base=base, **state)
    change(file)
    if refused:
        named = "more.safetensors" if len(list(file.parent.iterdir())) > 1 else file.name
        with pytest.raises(UserError, match=rf"is not the one .*[(;] ?{named} differs\)"):
            resume(Mock(), recipe, INDEX, ALONE, tmp_path)
    else:
        assert resume(Mock(), recipe, INDEX, ALONE, tmp_path) == 10


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_eight_bit_adamw_may_be_paged_from_a_checkpoint_on(tmp_path, write_checkpoint):
    save(write_checkpoint, recipe_for(tmp_path, optimizer=Optimizer(name="adamw8bit")), 10)
    paged = recipe_for(tmp_path, optimizer=Optimizer(name="adamw8bit_paged"), accept_changes=True)
    assert resume(Mock(), paged, INDEX, ALONE, tmp_path) == 10


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], Any]:
    """`train.train` with stand-ins for the data, the model and the loop; returns run_steps()'s."""
    index = Mock(digest=INDEX.digest, largest_tokens=1)

    def read(recipe: Recipe, process: Process) -> Any:
        return Inputs(make_plan(recipe, 1), process, Path("m"), Mock(), index, Mock(), Mock(), {})

    stand_ins = {
        "init_process_group": lambda accelerator: ALONE,
        "read_inputs": read,
        "build_model": lambda *_, **__: (Mock(), Memory({}, {})),
        "build_run": lambda inputs, *_: Mock(recipe=inputs.recipe, process=ALONE, metrics=None),
    }
    for name in (
        "log_plan",
        "log_banner",
        "destroy_process_group",
        "build_engine",
        "warm_up",
        "run_steps",
    ):
        monkeypatch.setattr(train, name, Mock())
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(train, name, stand_in)

    def starts(recipe: Recipe) -> Any:
        train.train(recipe, Mock(), Mock())
        return train

    return starts


def test_a_card_that_is_too_small_for_a_step_is_answered_with_settings(
    tmp_path, start, monkeypatch
):
    """With another exit code than a recipe that is wrong, for a restart may find more memory."""
    expected = Memory({"CUDA graphs": 1}, {})
    monkeypatch.setattr(train, "build_model", lambda *_, **__: (Mock(), expected))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB.\nstack")
    monkeypatch.setattr(train, "run_steps", Mock(side_effect=error))
    with pytest.raises(
        OutageError, match=r"not enough for a step .*Tried 9 GiB.\). Set .*cuda_graphs: false"
    ) as raised:
        start(recipe_for(tmp_path))
    assert raised.value.code == 1 and "stack" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (UserError("the loss is nan"), UserError, r"the loss is nan"),
        (torch.OutOfMemoryError("no"), OutageError, r"not enough for a step \(no\)\. Set "),
        (ZeroDivisionError("division by zero"), ZeroDivisionError, "ZeroDivisionError: division"),
    ],
)
def test_an_alert_tells_what_ended_a_run(tmp_path, error, raised, told):
    run = Mock(recipe=recipe_for(tmp_path))
    with pytest.raises(raised), failures_told(run, Memory({}, {})):
        raise error
    ((title, text),) = [call.args for call in run.metrics.alert.call_args_list]
    assert title == "the run has ended" and re.search(told, text)
    run.checkpoints.wait.assert_called_once()


def test_a_refused_start_leaves_the_run_directory_as_it_was(
    tmp_path, start, write_checkpoint, caplog
):
    recipe = recipe_for(tmp_path)
    start(recipe)
    save(write_checkpoint, recipe, 10)
    written = {path: path.read_text() for path in (tmp_path / "run").glob("*.*")}
    assert {path.name for path in written} == {
        *("recipe.yaml", "deepspeed.json", "versions.json"),
        "report.html",
    }
    changed = recipe_for(tmp_path, lora=Lora(rank=8), accept_changes=True)
    train.build_engine().state.load.side_effect = UserError("does not fit")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="does not fit"):
        start(changed)
    assert {path: path.read_text() for path in (tmp_path / "run").glob("*.*")} == written
    assert "accepted" not in caplog.text

    train.build_engine().state.load.side_effect = None  # type: ignore[attr-defined]
    start(changed)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").lora.rank == 8
    assert "accepted: lora.rank was 32, is 8" in caplog.text


@pytest.mark.parametrize(
    ("schedule", "remedy"), [("constant", "raise steps"), ("cosine", "raise steps and set accept_")]
)
def test_a_run_that_is_past_its_steps_says_where_it_is(
    tmp_path, start, write_checkpoint, caplog, schedule, remedy
):
    recipe = recipe_for(tmp_path, steps=7, optimizer=Optimizer(schedule=schedule))
    save(write_checkpoint, recipe, 10)
    with caplog.at_level(logging.INFO, logger="flux2_ds"):
        start(recipe).warm_up.assert_not_called()
    assert f"newest checkpoint is of step 10, and steps is 7. To go on, {remedy}" in caplog.text


def test_a_process_that_does_not_see_the_checkpoint_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "broadcast_from_rank0", lambda value, device: 10)
    with pytest.raises(UserError, match=r"rank 1 does not see .*step_00000010"):
        resume(Mock(), recipe_for(tmp_path), INDEX, RANK1, tmp_path)


def test_the_log_names_a_bucket_that_fills_no_batch(tmp_path, caplog):
    shards = [Shard("a.tar", Bucket(32, 64), 29, 5, "a"), Shard("b.tar", Bucket(64, 32), 1, 5, "b")]
    index = dataclasses.replace(INDEX, shards=shards)
    recipe = recipe_for(tmp_path, batch=Batch(global_size=16))
    plan, spec = make_plan(recipe, 1), RELEASED["black-forest-labs/FLUX.2-klein-base-4B"]
    none, order = dataclasses.replace(INDEX, shards=[]), build_order(recipe, index)
    inputs.log_plan(Inputs(plan, ALONE, tmp_path, spec, index, none, order, {}))
    (said,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert said.getMessage().startswith("bucket 32x64 has 1 of 30 samples (3.3%)")


def test_the_banner_says_what_is_trained_and_how_long_a_resumed_run_takes(tmp_path, caplog):
    recipe = recipe_for(tmp_path, steps=300, batch=Batch(global_size=8), base_weights="fp8")
    given: Any = SimpleNamespace(
        plan=make_plan(recipe, 2),
        recipe=recipe,
        spec=RELEASED["black-forest-labs/FLUX.2-klein-base-4B"],
        index=SimpleNamespace(samples=1204, bucket_counts=lambda: {"64x64": 1200, "64x32": 4}),
        held_out=SimpleNamespace(samples=12),
        order=SimpleNamespace(steps_per_epoch=150.5),
        process=ALONE,
    )
    (tmp_path / "run").mkdir()
    records = [
        {"step": step, "perf/seconds_per_step": pace} for step, pace in ((0, 9), (1, 2), (2, 2))
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    with caplog.at_level(logging.INFO, logger="flux2_ds"):
        inputs.log_banner(given, Memory({"a": 2**30}, {}), 0)
        assert "  time    known after the first steps" in caplog.text.splitlines()
        (tmp_path / "run/metrics.jsonl").write_text(text)
        inputs.log_banner(given, Memory({"a": 2**30}, {}), 100)
    lines = caplog.text.splitlines()
    for line in (
        f"  model   {tmp_path}/model, LoRA rank 32, 48.2 M parameters, bf16 over fp8",
        "  data    1,204 samples in 2 buckets, 12 held out",
        "  on      2 × CPU processes, ZeRO stage 2",
        "  batch   8 = 1 micro × 4 accumulation × 2",
        "  steps   100 → 300, 1,600 samples, 1.33 epochs",
        "  time    0:06:40 at the pace until now",
    ):
        assert line in lines, line
