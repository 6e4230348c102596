"""Previews: what the recipe's settings do to a picture of the tiny model."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_ds import sample
from flux2_ds.errors import UserError
from flux2_ds.model.pipeline import load_pipeline
from flux2_ds.recipe import Data, Launch, Model, Preview, Recipe
from flux2_ds.spec import Spec


def test_reference_images_change_what_is_rendered(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path
) -> None:
    colours = [(250, 20, 20), (20, 20, 250)]
    for number, colour in enumerate(colours):
        Image.new("RGB", (80 + 16 * number, 64), colour).save(tmp_path / f"{number}.png")
    recipe = Recipe(
        run_dir="unused",
        model=Model(path=str(tiny_model)),
        data=Data(images="unused", shards="unused"),
        preview=Preview(height=64, width=96, steps=2),
        launch=Launch(accelerator="cpu"),
    )
    pipeline = load_pipeline(tiny_model, tiny_spec, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    references = [sample.open_reference(str(tmp_path / f"{number}.png")) for number in range(2)]
    pictures = [
        np.asarray(sample.render(pipeline, recipe, given)[0])
        for given in ([], references[:1], references, references)
    ]
    assert all(picture.shape == (64, 96, 3) for picture in pictures)
    assert (pictures[2] == pictures[3]).all()
    for one, other in ((0, 1), (1, 2)):
        assert (pictures[one] != pictures[other]).any()
    more = dataclasses.replace(recipe, preview=dataclasses.replace(recipe.preview, seed=1))
    assert (np.asarray(sample.render(pipeline, more, [])[0]) != pictures[0]).any()


@pytest.mark.parametrize(
    ("size", "reason"), [(None, "No such file"), ((32, 64), "too small"), ((64, 640), "ratio")]
)
def test_references_that_cannot_be_used(
    tmp_path: Path, size: tuple[int, int] | None, reason: str
) -> None:
    path = tmp_path / "reference.png"
    if size is not None:
        Image.new("RGB", size).save(path)
    with pytest.raises(UserError, match=rf"(?s)preview\.references: .*reference\.png .*{reason}"):
        sample.open_reference(str(path))


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_loaded(tiny_model: Path) -> None:
    tiny = sample.part_bytes(tiny_model, torch.float32)
    assert all(size > 0 for size in tiny.values())
    sample.check_room(tiny, None, sum(tiny.values()))
    with pytest.raises(UserError, match="host memory"):
        sample.check_room(tiny, None, sum(tiny.values()) - 1)
    dev = {"text_encoder": 48 << 30, "transformer": 60 << 30, "vae": 1 << 28}
    sample.check_room(dev, 80 << 30, 128 << 30)
    with pytest.raises(UserError, match=r"transformer takes 60\.0 GiB and the card has 23\.5 GiB"):
        sample.check_room(dev, int(23.5 * 2**30), 128 << 30)
