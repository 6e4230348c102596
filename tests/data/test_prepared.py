"""What a recipe trains on: the shards of several folders, and what is refused of them."""

from pathlib import Path

import pytest
import torch

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.recipe import Batch, Data, Model, Recipe
from flux2_ds.data.dataset import build_order, read_data
from flux2_ds.data.index import CONDITIONING_NAME, Index, write_index
from flux2_ds.data.loader import Loader, Share
from flux2_ds.data.shards import Record, View, write_shard
from flux2_ds.data.storage import join
from flux2_ds.errors import UserError


def make_shards(folder: Path, value: float, **facts: str) -> None:
    """One shard of two samples whose latents have one value."""
    folder.mkdir(parents=True)
    records = [Record(f"{n}.jpg", ("",), (View(torch.full((32, 4, 4), value)),)) for n in range(2)]
    shard = write_shard(folder / "0.tar", Bucket(32, 32), records, lambda _: torch.zeros(6, 2))
    write_index(folder, Index("klein", 2, {}, {}, [shard], **facts))
    (folder / CONDITIONING_NAME).touch()


def recipe_of(shards: str, **more_shards: str) -> Recipe:
    return Recipe(
        run_dir="unused",
        model=Model(path="unused"),
        data=Data(images="unused", shards=shards, more_shards=more_shards),
        batch=Batch(global_size=4),
    )


@pytest.mark.parametrize("absolute", [False, True])
def test_more_shards_of_a_folder_are_read_beside_the_others(tmp_path, monkeypatch, absolute):
    monkeypatch.chdir(tmp_path)
    make_shards(Path("shards/mine"), 1.0)
    make_shards(Path("shards/web"), 2.0)
    more = str(Path("shards/web").absolute()) if absolute else "shards/web"
    recipe = recipe_of("shards/mine", web=more)
    index, _ = read_data(recipe)
    order = build_order(recipe, index)
    share = Share(0, 1, 4, 4)
    empty = torch.zeros(6, 2)
    loader = Loader(
        recipe.data.shards, index, order, share, seed=0, caption_dropout=0, empty_text=empty
    )
    (batch,) = loader.read(0)
    assert sorted(batch.latents.mean((1, 2, 3)).tolist()) == [1, 1, 2, 2]


def test_captions_of_several_folders_have_one_dtype(tmp_path):
    """In one micro-batch they would take on the first one's."""
    for name, dtype in (("mine", "bfloat16"), ("web", "float32")):
        make_shards(tmp_path / name, 1.0, text_dtype=dtype)
    with pytest.raises(
        UserError, match=r"more_shards\.web .*web has captions in float32, .* in bfloat16"
    ):
        read_data(recipe_of(str(tmp_path / "mine"), web=str(tmp_path / "web")))


def test_a_folder_on_disk_beside_shards_in_a_store_stays_what_it_is():
    assert join("s3://bucket/shards", "/abs/web/x.tar") == "/abs/web/x.tar"
    assert join("s3://bucket/shards", "x.tar") == "s3://bucket/shards/x.tar"
    assert join("/abs/mine", "https://host/web/x.tar") == "https://host/web/x.tar"


def test_a_folder_that_is_not_prepared_is_named_by_its_setting(tmp_path):
    make_shards(tmp_path / "mine", 1.0)
    with pytest.raises(
        UserError, match=r"data\.more_shards\.web /nope has no index\.json\. .*that folder"
    ):
        read_data(recipe_of(str(tmp_path / "mine"), web="/nope"))
