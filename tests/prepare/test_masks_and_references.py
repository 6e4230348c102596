"""Masks and reference images: found beside their pictures, cut like them, stored, read and refused."""

import os
import runpy
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from factories import load_pipeline
from PIL import Image
from test_prepare import add_photo, recipe_for, run, samples

from flux2_ds.commands.tiny import make_tiny
from flux2_ds.config.buckets import Bucket, bucket_table, choose_bucket
from flux2_ds.config.model_spec import read_spec
from flux2_ds.config.parse import load_recipe
from flux2_ds.config.recipe import Data, Model, Objective, Recipe
from flux2_ds.data.dataset import check_masks_and_references, mask_and_reference_lines
from flux2_ds.data.images import (
    UnreadableImageError,
    is_aligned,
    load_cropped,
    load_mask,
    load_reference,
    reference_bucket,
)
from flux2_ds.data.index import Index, Shard, read_index
from flux2_ds.data.loader import Loader, Share
from flux2_ds.data.order import Order
from flux2_ds.data.shards import ShardReader
from flux2_ds.data.storage import Blob
from flux2_ds.errors import UserError
from flux2_ds.model import latents
from flux2_ds.prepare.images import ALPHA_MASK, BLACK_CROPS, decode
from flux2_ds.prepare.plan import choose_buckets, choose_crops
from flux2_ds.prepare.source_images import Crop, PlannedImage, Skipped, SourceImage
from flux2_ds.prepare.sources import find_images


def noise(folder: Path, name: str, size: tuple[int, int], mode: str = "RGB") -> Path:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(len(name)).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder / f"{name}.png"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("companions") / "model"
    make_tiny(directory, "klein")
    return directory


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """a has a mask, b one reference, c all of it, d nothing."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abcd":
        add_photo(folder, name, (96, 64), f"picture {name}")
    noise(folder, "a.mask", (96, 64), "L")
    noise(folder, "c.mask", (48, 32), "L")
    noise(folder, "b.reference", (70, 50))
    for number, size in ((1, (64, 64)), (2, (40, 90)), (10, (130, 33))):
        noise(folder, f"c.reference{number}", size)
    return folder


@pytest.mark.parametrize("name", ["a.MASK", "a-masklabel", "a-MaskLabel", "a.Mask"])
def test_masks_go_by_several_names(photos: Path, tmp_path: Path, name: str) -> None:
    (photos / "a.mask.png").rename(photos / f"{name}.png")
    (photos / "b.reference.png").rename(photos / "b.Reference.PNG")
    found, _ = find_images(Data(images=str(photos), shards=""), tmp_path / "scratch")
    source_images = {Path(image.key).stem: image for image in found}
    assert source_images.keys() == {"a", "b", "c", "d"}
    assert source_images["a"].mask and len(source_images["b"].references) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_companions_are_found_beside_their_images(
    photos: Path, tmp_path: Path, packed: bool
) -> None:
    noise(photos, "other.mask", (32, 32))  # of no picture: a picture of its own
    location = str(photos)
    if packed:
        location = str(tmp_path / "photos.tar")
        with tarfile.open(location, "w") as tar:
            for path in sorted(photos.iterdir()):
                tar.add(path, path.name)
    for _ in range(2):  # what was found in tars is remembered
        found, _ = find_images(Data(images=location, shards=""), tmp_path / "scratch")
        source_images = {Path(image.key).stem: image for image in found}
        assert source_images.keys() == {"a", "b", "c", "d", "other.mask"}
        assert [name for name in source_images if source_images[name].mask] == ["a", "c"]
        assert [len(source_images[name].references) for name in "abcd"] == [0, 1, 3, 0]
        widths = [70] if not packed else []
        for each in source_images["c"].references:
            (tmp_path / "one.png").write_bytes(each.blob.read())
            widths.append(Image.open(tmp_path / "one.png").width)
        assert widths[-3:] == [64, 40, 130]  # by number, not by name


def test_suffixes_of_masks_and_references_are_settings(photos: Path, tmp_path: Path) -> None:
    (photos / "a.mask.png").rename(photos / "a_MASK.png")
    (photos / "b.reference.png").rename(photos / "b-in1.png")
    data = Data(
        images=str(photos), shards="", mask_suffixes=["_mask"], reference_suffixes=["-in", "+"]
    )
    found = {e.key: e for e in find_images(data, tmp_path / "scratch")[0]}
    assert found["a.png"].mask is not None and len(found["b.png"].references) == 1
    assert found["c.png"].mask is None and "c.mask.png" in found  # an image itself
    none = replace(data, mask_suffixes=[], reference_suffixes=[])
    assert len(find_images(none, tmp_path / "scratch")[0]) == 10


def test_two_masks_are_one_too_many(photos: Path, tmp_path: Path) -> None:
    Image.new("L", (96, 64), 255).save(photos / "a.mask.jpg")
    source_images = {
        e.key: e for e in find_images(Data(images=str(photos), shards=""), tmp_path / "scratch")[0]
    }
    assert "two masks or references of one name: a.mask.jpg, a.mask.png" in str(
        source_images["a.png"].problem
    )


@pytest.mark.parametrize("size", [(96, 64), (64, 64), (64, 96)])
def test_a_mask_is_cut_like_its_image(tmp_path: Path, size: tuple[int, int]) -> None:
    """The mask as a picture, cropped by the way of pictures, and averaged over each token's pixels."""
    bucket = Bucket(64, 64)
    path = noise(tmp_path, "mask", size, "L")
    cropped = load_cropped(str(path), bucket)[:, :, 0] / 255
    expected = cropped.reshape(4, 16, 4, 16).mean(axis=(1, 3))
    mask = load_mask(str(path), size, bucket)
    assert mask.dtype == np.float32
    np.testing.assert_allclose(mask, expected, atol=1e-6)
    # Of another size but the same proportions.
    Image.open(path).resize((3 * size[0], 3 * size[1]), Image.Resampling.NEAREST).save(path)
    np.testing.assert_allclose(load_mask(str(path), size, bucket), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(128, 64), (64, 112)])
def test_masks_and_references_take_the_crops_and_flips_of_their_image(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    """The same picture thrice: as image, as mask and as reference, of which one keeps its own size."""
    path, other = noise(tmp_path, "image", size, "L"), noise(tmp_path, "other", (32, 80))
    blobs = (Blob(str(path)), Blob(str(other)))
    references = tuple(SourceImage("me", "", "", (), blob) for blob in blobs)
    image = SourceImage(
        "me", "a.png", "", ("a",), Blob(str(path)), None, None, blobs[0], references
    )
    bucket, data = Bucket(64, 64), Data(images="", shards="", crops=3, horizontal_flip=True)
    crops = choose_crops(*size, bucket, data)
    bucket = replace(bucket, references=(bucket, Bucket(80, 32)))
    assert [(crop.place, crop.flipped) for crop in crops] == [
        (place, flipped) for place in (0.5, 0.0, 1.0) for flipped in (False, True)
    ]
    decoded = decode(PlannedImage(image, bucket, crops=crops), 1024)
    pixels, own = np.asarray(Image.open(path)), np.asarray(Image.open(other))
    for crop, view in zip(crops, decoded.views, strict=True):
        left, top = (int((side - 64) * crop.place) for side in size)
        expected = pixels[top : top + 64, left : left + 64]
        turn = slice(None, None, -1 if crop.flipped else 1)
        np.testing.assert_array_equal(view.pixels[:, turn, 0], expected)
        np.testing.assert_array_equal(view.references[0], view.pixels)
        np.testing.assert_array_equal(view.references[1][:, turn], own)
        assert view.mask is not None
        cells = expected.reshape(4, 16, 4, 16).mean(axis=(1, 3)) / 255
        np.testing.assert_allclose(view.mask[:, turn], cells, atol=1e-6)


def test_transparency_is_a_mask_where_asked_for(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 3]).save(tmp_path / "a.mask.png")
    opaque = noise(tmp_path, "opaque", (128, 64))
    bucket, crops = Bucket(64, 64), (Crop(1.0, True),)

    def planned(path: Path, *, mask: bool = False, alpha: bool = True) -> PlannedImage:
        beside = Blob(str(tmp_path / "a.mask.png")) if mask else None
        image = SourceImage("me", "a.png", "", ("a",), Blob(str(path)), mask=beside)
        return PlannedImage(image, bucket, crops=crops, alpha_mask=alpha)

    decoded = decode(planned(tmp_path / "a.png"), 1024)
    (view,), (beside,) = decoded.views, decode(planned(tmp_path / "a.png", mask=True), 1024).views
    assert view.mask is not None and decoded.notes == (ALPHA_MASK,)
    np.testing.assert_array_equal(view.mask, beside.mask)
    np.testing.assert_array_equal(view.pixels, beside.pixels)
    for other in (planned(tmp_path / "a.png", alpha=False), planned(opaque)):
        assert decode(other, 1024).views[0].mask is None


def test_a_crop_without_anything_to_train_on_is_left_out(tmp_path: Path) -> None:
    path, mask = noise(tmp_path, "image", (128, 64)), Image.new("L", (128, 64))
    mask.paste(255, (0, 0, 8, 64))
    mask.save(tmp_path / "mask.png")
    image = SourceImage("me", "a.png", "", ("a",), Blob(str(path)), mask=Blob(str(tmp_path / "mask.png")))  # fmt: skip
    crops = tuple(map(Crop, (0.5, 0.0, 1.0)))
    decoded = decode(PlannedImage(image, Bucket(64, 64), crops=crops), 1024)
    assert len(decoded.views) == 1 and decoded.notes == (BLACK_CROPS,)
    np.testing.assert_array_equal(decoded.views[0].pixels, np.asarray(Image.open(path))[:, :64])
    decoded = decode(PlannedImage(image, Bucket(64, 64)), 1024)
    assert not decoded.views and "black all over" in decoded.reason


def test_the_kinds_of_masks(tmp_path: Path) -> None:
    bucket, path = Bucket(32, 32), tmp_path / "mask.png"
    half = np.zeros((32, 32), np.uint8)
    half[:, 16:] = 255
    transparent = np.dstack([np.full((32, 32, 3), 255, np.uint8), half])
    kinds = {
        "L": Image.fromarray(half),
        "RGB": Image.fromarray(half).convert("RGB"),
        "1": Image.fromarray(half).convert("1"),
        "RGBA": Image.fromarray(transparent),
        "16 bits": Image.fromarray(half.astype(np.uint16) * 257),
    }
    for kind, image in kinds.items():
        image.save(path)
        assert load_mask(str(path), (32, 32), bucket).tolist() == [[0, 1], [0, 1]], kind


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Image.new("L", (32, 32)), "its mask is black all over"),
        (Image.new("L", (32, 40), 255), "its mask is 32x40 px, the image 32x32"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path: Path, mask: Image.Image, reason: str) -> None:
    mask.save(tmp_path / "mask.png")
    with pytest.raises(UnreadableImageError, match=reason):
        load_mask(str(tmp_path / "mask.png"), (32, 32), Bucket(32, 32))


@pytest.mark.parametrize("size", [(64, 64), (150, 97), (1500, 900), (700, 2100), (1024, 1024)])
def test_a_reference_is_cut_as_the_pipeline_cuts_it(tmp_path: Path, size: tuple[int, int]) -> None:
    path = noise(tmp_path, "reference", size)
    processor = Flux2KleinPipeline(
        vae=None, text_encoder=None, tokenizer=None, scheduler=None, transformer=None
    ).image_processor
    image = Image.open(path)
    if image.width * image.height > 1024 * 1024:
        image = processor._resize_to_target_area(image, 1024 * 1024)
    width, height = image.width // 16 * 16, image.height // 16 * 16
    assert reference_bucket(size, (1, 9), Bucket(16, 16)) == Bucket(height, width)
    expected = processor.preprocess(image, height=height, width=width, resize_mode="crop")
    found = torch.from_numpy(load_reference(str(path), Bucket(height, width))).permute(2, 0, 1)
    torch.testing.assert_close(found / 127.5 - 1, expected[0], rtol=0, atol=1e-6)


def coordinates(size: tuple[int, int]) -> Image.Image:
    """Red says where a pixel is from left to right, green from top to bottom."""
    across, down = (np.linspace(0, 255, side) for side in size)
    grid = np.stack(np.broadcast_arrays(across, down[:, None], 0.0 * across), axis=-1)
    return Image.fromarray(grid.round().astype(np.uint8))


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ((1200, 1600), (1200, 1600)),
        ((3000, 2000), (3000, 2000)),
        ((3000, 2000), (1000, 667)),
        ((300, 200), (900, 600)),
    ],
)
@pytest.mark.parametrize("resolution", [1024, 256])
def test_the_same_point_of_an_edit_pair_is_at_the_same_place(
    tmp_path: Path, image: tuple[int, int], reference: tuple[int, int], resolution: int
) -> None:
    bucket = choose_bucket(*image, bucket_table(resolution, 64, 2.0))
    coordinates(image).save(tmp_path / "image.png")
    coordinates(reference).save(tmp_path / "reference.png")
    pixels = load_cropped(str(tmp_path / "image.png"), bucket).astype(int)
    path = str(tmp_path / "reference.png")
    assert is_aligned(reference, image)
    own = reference_bucket(reference, image, bucket, step=64)
    found = load_cropped(path, own).astype(int)
    assert found.shape == pixels.shape and abs(found - pixels).max() <= 1
    # What inference would make smaller is made so, with the same crop.
    own = reference_bucket(reference, image, bucket, 128, step=64)
    small = load_cropped(path, own).astype(int)
    assert 0.8 * 128**2 < small.shape[0] * small.shape[1] < 1.2 * 128**2
    corners = [abs(small[y, x] - pixels[y, x]).max() for y in (0, -1) for x in (0, -1)]
    assert max(corners) <= 4


REFERENCES = {
    "b": ["reference"],
    "c": ["reference1", "reference2", "reference10"],
    "e": ["reference"],
}
SIZES = {"b.reference": (48, 64), "e.reference": (48, 64), "c.reference1": (64, 64), "c.reference2": (80, 32), "c.reference10": (32, 128)}  # fmt: skip
"""What is left of them: (height, width), multiples of 16."""


def test_companions_reach_the_micro_batch(model: Path, photos: Path, tmp_path: Path) -> None:
    """Samples whose references agree in number and size share micro-batches; each is served as often as any other."""
    add_photo(photos, "e", (96, 64), "picture e")
    noise(photos, "e.reference", (70, 50))
    recipe = recipe_for(model, photos, tmp_path / "shards", samples_per_shard=9)
    index = run(recipe)
    assert {str(bucket): n for bucket, n in index.bucket_counts().items()} == {
        "80x48": 2,
        "80x48 with references 64x48": 2,
        "80x48 with references 64x64,32x80,128x32": 1,
    }
    assert [shard.name for shard in index.shards] == [f"images-80x48-0000{n}.tar" for n in range(3)]
    assert [shard.masks for shard in index.shards] == [1, 0, 1]
    shards = index.shards
    readers = [ShardReader(tmp_path / "shards" / shard.name, shard) for shard in shards]
    vae = load_pipeline(model, read_spec(model), torch.float32).vae
    order = Order(index, 2, seed=0, window=1)
    loader = Loader(
        tmp_path / "shards", index, order, Share(0, 1, 2, 2),
        seed=0, caption_dropout=0.0, empty_text=torch.zeros(512, index.text_width), masked=True,
    )  # fmt: skip
    seen = Counter[str]()
    for step in range(order.first_step(2)):
        (batch,) = loader.read(step)
        metas = [readers[sample.shard].meta(sample.row) for sample in batch.samples]
        names = [Path(meta["source"]).stem for meta in metas]
        seen.update(names)
        assert batch.masks is not None and batch.masks.shape == (2, 3, 5)
        assert [tuple(r.shape) for r in batch.references] == [
            (2, 32, own.height // 8, own.width // 8) for own in batch.bucket.references
        ]
        for place, name in enumerate(names):
            path, size = str(photos / f"{name}.mask.png"), (96, 64)
            wanted = load_mask(path, size, batch.bucket) if name in "ac" else np.ones((3, 5))
            np.testing.assert_array_equal(batch.masks[place].numpy(), wanted)
            assert len(batch.references) == len(REFERENCES.get(name, []))
            for found, file in zip(batch.references, REFERENCES.get(name, []), strict=True):
                file = f"{name}.{file}"
                pixels = load_reference(str(photos / f"{file}.png"), Bucket(*SIZES[file]))
                expected = latents.encode(vae, torch.from_numpy(pixels)[None])[0]
                torch.testing.assert_close(found[place], expected, rtol=0, atol=1e-5)
    assert seen == dict.fromkeys("abcde", 2)


def test_a_changed_companion_is_encoded_again(model: Path, photos: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    recipe = recipe_for(model, photos, shards, samples_per_shard=9)
    before = run(recipe)
    assert run(recipe) == before
    stamp = (photos / "a.png").stat().st_mtime_ns + 10**9
    os.utime(photos / "d.png", ns=(stamp, stamp))  # touched, the same bytes
    os.utime(photos / "a.png", ns=(stamp, stamp))
    assert run(recipe) == before
    Image.new("L", (96, 64), 200).save(photos / "a.mask.png")
    (photos / "b.reference.png").unlink()
    after = run(recipe)
    assert after.samples == 4 and len(samples(shards)) == 4
    assert [shard.samples for shard in after.shards] == [1, 1, 2]
    new = ShardReader(shards / after.shards[2].name, after.shards[2])
    masks = {new.meta(row)["source"]: new.mask(row) for row in range(2)}
    assert masks["b.png"] is None and not new.references(1)
    torch.testing.assert_close(masks["a.png"], torch.full((3, 5), 200 / 255))
    assert read_index(shards) == after


def test_the_example_makes_edit_pairs(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "edit"
    runpy.run_path(str(example / "make_pairs.py"))["main"](tmp_path)
    recipe = load_recipe("smoke-cpu", ["--config", "edit", "--config", str(example / "color.yaml")])
    found, _ = find_images(replace(recipe.data, images=str(tmp_path)), tmp_path / "scratch")
    planned = choose_buckets(found, recipe, Skipped())
    assert len(planned) == 16 and {i.image.captions for i in planned} == {
        (recipe.preview.prompts[0],)
    }
    assert all(
        i.bucket.references == (i.bucket.alone,) for i in planned
    )  # aligned, thus of one size
    assert [Path(path).name for path in recipe.preview.references] == [
        "autumn_mountain_meadow.reference.png"
    ]


BUCKET = Bucket(64, 96)


def recipe_with(*, masked: bool = False, dropped: float = 0.0) -> Recipe:
    return Recipe(
        run_dir="unused",
        model=Model(path="unused"),
        data=Data(images="unused", shards="shards"),
        objective=Objective(masked_loss=masked, reference_dropout=dropped),
    )


def index_with(*shards: tuple[int, Bucket]) -> Index:
    made = [Shard(f"{n}.tar", bucket, 2, 1, "", masks=m) for n, (m, bucket) in enumerate(shards)]
    return Index("klein", 1, {}, {}, made)


def test_masks_and_references_that_are_wanted_and_not_there_are_refused() -> None:
    index, edited = index_with((0, BUCKET)), replace(BUCKET, references=(BUCKET,))
    check_masks_and_references(recipe_with(masked=True), index_with((0, BUCKET), (1, BUCKET)))
    check_masks_and_references(recipe_with(dropped=0.1), index_with((0, BUCKET), (0, edited)))
    with pytest.raises(UserError, match=r"objective\.masked_loss is true, but no image"):
        check_masks_and_references(recipe_with(masked=True), index)
    with pytest.raises(UserError, match=r"objective\.reference_dropout is 0\.1, but no image"):
        check_masks_and_references(recipe_with(dropped=0.1), index)


def test_what_is_there_is_said_and_whether_it_is_used() -> None:
    small, large = (replace(BUCKET, references=(Bucket(64, n),)) for n in (64, 96))
    index = index_with((2, BUCKET), (1, small), (0, large), (0, large))
    assert mask_and_reference_lines(recipe_with(masked=False), index) == [
        "3 masks, not used: objective.masked_loss is false",
        "6 of 8 samples with reference images, in 2 buckets; the longest is 96x64 with references 96x64: 48 tokens, 24 of "
        "them the image's",
    ]
    assert mask_and_reference_lines(recipe_with(masked=True), index)[0] == "3 masks, used"
    assert mask_and_reference_lines(recipe_with(masked=True), index_with((0, BUCKET))) == []


@pytest.mark.parametrize(
    ("size", "step", "expected"),
    [
        ((3000, 2000), 64, Bucket(832, 1216)),  # 1254 x 836 px are 1024 squared
        ((700, 900), 16, Bucket(896, 688)),
        ((700, 900), 64, Bucket(896, 640)),
        ((40, 900), 64, None),
    ],
)
def test_a_reference_of_other_proportions_keeps_its_size(size, step, expected) -> None:
    image, bucket = (1000, 1000), Bucket(512, 512)
    if expected is None:
        with pytest.raises(
            UnreadableImageError, match=r"40x900 px is too small: each side .* 64 px"
        ):
            reference_bucket(size, image, bucket, step=step)
    else:
        assert reference_bucket(size, image, bucket, step=step) == expected
