"""Photographs to shards on a tiny klein: what is kept, what is skipped, what a second start does."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flux2_ds import prepare as root
from flux2_ds.data.index import Index
from flux2_ds.data.shards import ShardReader
from flux2_ds.errors import UserError
from flux2_ds.model import latents
from flux2_ds.model.files import check_fingerprint, fingerprint
from flux2_ds.model.pipeline import load_pipeline
from flux2_ds.model.tiny import make_tiny
from flux2_ds.recipe import Data, Launch, Model, Recipe
from flux2_ds.spec import read_spec

CAPTIONS = {"a": "a red square", "b": "a wide field", "c": "a red square", "d": "a tall tower"}
SIZES = {"a": (96, 96), "b": (128, 72), "c": (100, 96), "d": (64, 128)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepare") / "model"
    make_tiny(directory, "klein")
    return directory


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(CAPTIONS[name])
    return folder


def recipe_for(model: Path, photos: Path, shards: Path, **data: object) -> Recipe:
    settings = {"resolution": 64, "bucket_step": 16, "samples_per_shard": 2, **data}
    return Recipe(
        run_dir="unused",
        precision="fp32",
        model=Model(path=str(model)),
        data=Data(images=str(photos), shards=str(shards), **settings),  # type: ignore[arg-type]
        launch=Launch(accelerator="cpu"),
    )


def run(recipe: Recipe) -> Index:
    model = Path(recipe.model.path)
    return root.prepare(recipe, model, read_spec(model))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def truncate(picture: Path) -> None:
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])


def test_samples_hold_what_the_pipeline_computes(model: Path, photos: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    index = run(recipe_for(model, photos, shards))
    assert index.samples == 4
    crop = {"resolution": 64, "bucket_step": 16, "max_aspect": 2.0, "max_upscale": 1.0}
    assert index.settings == crop
    pipeline = load_pipeline(model, read_spec(model), torch.float32)
    seen = {}
    for shard in index.shards:
        reader = ShardReader(shards / shard.name)
        for row in range(shard.samples):
            meta = reader.meta(row)
            seen[meta["source"]] = meta["caption"]
            expected, _ = pipeline.encode_prompt(meta["caption"])
            torch.testing.assert_close(reader.text(row), expected[0], rtol=1e-4, atol=1e-4)
            shape = (32, shard.bucket.height // 8, shard.bucket.width // 8)
            assert reader.latent(row).shape == shape and reader.latent(row).dtype == torch.float32
    assert seen == {f"{name}.png": caption for name, caption in CAPTIONS.items()}
    conditioning = load_file(shards / "conditioning.safetensors")
    mean, std = latents.statistics(pipeline.vae)
    assert torch.equal(conditioning["latent_mean"], mean)
    assert torch.equal(conditioning["latent_std"], std)
    empty, _ = pipeline.encode_prompt("")
    torch.testing.assert_close(conditioning["empty_text"], empty[0], rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in shards.iterdir() if path.name.startswith(".")) == []


def test_unusable_pictures_are_skipped_named_and_counted(
    model: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truncate(photos / "b.png")
    (photos / "c.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(photos / "small.png")
    (photos / "small.txt").write_text("tiny")
    index = run(recipe_for(model, photos, tmp_path / "shards"))
    assert index.samples == 2
    report = json.loads((tmp_path / "shards" / "report.json").read_text())
    reasons = {Path(path).name: reason for path, reason in report["skipped"].items()}
    assert set(reasons) == {"b.png", "c.png", "small.png"}
    assert "truncated" in reasons["b.png"] and "data.max_upscale" in reasons["small.png"]
    assert all(name in caplog.text for name in reasons)


@pytest.mark.parametrize(
    ("setting", "samples", "caption"), [("skip", 3, None), ("fixed", 4, "a photograph")]
)
def test_a_missing_caption_follows_the_setting(
    model: Path, photos: Path, tmp_path: Path, setting: str, samples: int, caption: str | None
) -> None:
    (photos / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.png.*data\.missing_caption"):
        run(recipe_for(model, photos, tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    recipe = recipe_for(
        model, photos, tmp_path / "s", missing_caption=setting, fixed_caption=caption or ""
    )
    index = run(recipe)
    assert index.samples == samples
    found = {
        reader.meta(row)["source"]: reader.meta(row)["caption"]
        for shard in index.shards
        for reader in [ShardReader(tmp_path / "s" / shard.name)]
        for row in range(shard.samples)
    }
    assert found.get("a.png") == caption


def test_a_killed_run_goes_on_and_ends_with_the_same_files(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("e", "f"):  # a third shard
        shutil.copy(photos / "a.png", photos / f"{name}.png")
        (photos / f"{name}.txt").write_text("another")
    truncate(photos / "a.png")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(recipe_for(model, photos, whole))
    written: list[str] = []

    def write_two(path: Path, *rest: object) -> object:
        if len(written) == 2:
            path.with_suffix(".partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        return original(path, *rest)  # type: ignore[arg-type]

    original = root.write_shard
    monkeypatch.setattr(root, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        run(recipe_for(model, photos, cut))
    assert not (cut / "index.json").exists()
    notes = [json.loads(path.read_text()) for path in (cut / ".finished").iterdir()]
    assert [path for note in notes for path in note["skipped"]] == [str(photos / "a.png")]
    monkeypatch.setattr(root, "write_shard", original)
    times = {name: (cut / name).stat().st_mtime_ns for name in written}
    run(recipe_for(model, photos, cut))
    assert {name: (cut / name).stat().st_mtime_ns for name in written} == times
    # The report names what the first start left out, and the contact sheet does without it.
    assert list(json.loads((cut / "report.json").read_text())["skipped"]) == [str(photos / "a.png")]
    assert contents(whole) == contents(cut)
    assert not [path.name for path in cut.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"samples_per_shard": 3}, "settings"),
        ({"max_upscale": 1.5}, "settings"),
        ({"precision": "bf16"}, "text precision"),
    ],
)
def test_shards_of_other_settings_are_not_continued(
    model: Path, photos: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    recipe = recipe_for(model, photos, tmp_path / "s")
    captioned = root.read_photos(recipe.data, root.Skipped())
    root.claim(tmp_path / "s", captioned, recipe, {})
    root.claim(tmp_path / "s", captioned, recipe, {})  # the same again
    if "precision" in change:
        other = dataclasses.replace(recipe, **change)  # type: ignore[arg-type]
    else:
        data = dataclasses.replace(recipe.data, **change)  # type: ignore[arg-type]
        other = dataclasses.replace(recipe, data=data)
    with pytest.raises(UserError, match=rf"changed: {named}\)"):
        root.claim(tmp_path / "s", captioned, other, {})


def test_a_folder_of_something_else_is_left_alone(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    recipe = recipe_for(model, photos, shards)
    run(recipe)
    before = contents(shards)
    assert run(recipe).samples == 4  # again: nothing to do
    (photos / "a.txt").write_text("another caption")
    with pytest.raises(UserError, match=r"data\.shards .* prepared from something else"):
        run(recipe)
    assert contents(shards) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        run(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shards=str(foreign))))
    assert contents(foreign) == {"mine.txt": b"keep"}


def test_shards_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_tiny(other, "klein", seed=1)
    with pytest.raises(UserError, match=r"made by another model: their vae is \w+, .* is \w+"):
        check_fingerprint(fingerprint(model), other, tmp_path / "shards")
    shutil.rmtree(other / "text_encoder")
    shutil.copytree(model / "vae", other / "vae", dirs_exist_ok=True)
    assert check_fingerprint(fingerprint(model), other, tmp_path) == ["text_encoder"]
