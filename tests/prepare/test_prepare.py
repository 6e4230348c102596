"""Photographs to shards on a tiny klein: what is kept, what is skipped, what a second start does."""

import dataclasses
import errno
import io
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKLFlux2
from factories import load_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from flux2_ds.commands.tiny import make_tiny
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_files import check_fingerprint, fingerprint
from flux2_ds.config.model_spec import read_spec
from flux2_ds.config.recipe import (
    Captions,
    Data,
    Launch,
    Model,
    Prepare,
    Preservation,
    Preview,
    Recipe,
    recipe_values,
)
from flux2_ds.data.dataset import check_settings
from flux2_ds.data.images import ALIGNED, DAMAGED_PROFILE, OWN_SIZE
from flux2_ds.data.index import CONDITIONING_NAME, PROMPTS_NAME, Index, encoded_prompts, read_index
from flux2_ds.data.order import Order
from flux2_ds.data.shards import ShardReader, read_conditioning, read_prompts, write_prompts
from flux2_ds.data.storage import Blob
from flux2_ds.errors import OutageError, UserError
from flux2_ds.model import latents
from flux2_ds.model.text_encoder import TextEncoder
from flux2_ds.prepare import __main__ as root
from flux2_ds.prepare import folder as rules
from flux2_ds.prepare import images as images_module
from flux2_ds.prepare import plan
from flux2_ds.prepare.plan import CROPPED, ENLARGED
from flux2_ds.prepare.report import REPORT_NAME
from flux2_ds.prepare.source_images import SourceImage

CAPTIONS = {"a": "a red square", "b": "a wide field", "c": "a red square", "d": "a tall tower"}
SIZES = {"a": (96, 96), "b": (128, 72), "c": (100, 96), "d": (64, 128)}
CROP = {
    "resolution": 64,
    "bucket_step": 16,
    "max_aspect": 2.0,
    "max_upscale": 1.05,
    "max_crop": 0.5,
    "crops": 1,
    "horizontal_flip": False,
    "alpha_mask": False,
    "repeats_from_folders": False,
    "validation_fraction": 0.0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepare") / "model"
    make_tiny(directory, "klein")
    return directory


def add_photo(folder: Path, name: str, size: tuple[int, int], caption: str) -> None:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(caption)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in SIZES.items():
        add_photo(folder, name, size, CAPTIONS[name])
    return folder


def recipe_for(
    model: Path, photos: object, shards: Path, prepare: Prepare | None = None, **data: object
) -> Recipe:
    settings = {"resolution": 64, "bucket_step": 16, "samples_per_shard": 2, **data}
    images = photos if isinstance(photos, dict) else str(photos)
    return Recipe(
        run_dir="unused",
        precision="fp32",
        model=Model(path=str(model)),
        data=Data(images=images, shards=str(shards), **settings),  # type: ignore[arg-type]
        prepare=prepare or Prepare(),
        launch=Launch(accelerator="cpu"),
    )


def run(recipe: Recipe) -> Index:
    model = Path(recipe.model.path)
    return root.prepare(recipe, model, read_spec(model))


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def samples(folder: Path) -> dict[str, str]:
    """Caption by source file of everything in the index."""
    found = {}
    for shard in read_index(folder).shards:
        reader = ShardReader(folder / shard.name, shard)
        for row in range(shard.samples):
            meta = reader.meta(row)
            assert meta["source"] not in found
            found[meta["source"]] = meta["caption"]
            assert reader.latent(row).shape[0] == 32 and reader.text(row).shape[0] == 512
    return found


def report(folder: Path) -> dict:
    return json.loads((folder / REPORT_NAME).read_text())


def truncate(picture: Path) -> None:
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the encoders are given from now on: captions and file names."""
    seen: list[str] = []
    encode, decode = TextEncoder.encode, images_module.decode

    def encode_noted(self: TextEncoder, captions: list[str]) -> torch.Tensor:
        seen.extend(captions)
        return encode(self, captions)

    def decode_noted(planned, *options):
        seen.append(planned.image.key)
        return decode(planned, *options)

    monkeypatch.setattr(TextEncoder, "encode", encode_noted)
    monkeypatch.setattr(images_module, "decode", decode_noted)
    return seen


def test_samples_hold_what_the_pipeline_computes(model, photos, tmp_path, encoded):
    shards = tmp_path / "shards"
    index = run(recipe_for(model, photos, shards))
    assert index == read_index(shards)
    assert (index.samples, index.settings) == (4, CROP)
    assert sorted(encoded) == sorted({"", *CAPTIONS.values()} | {f"{n}.png" for n in SIZES})
    assert samples(shards) == {f"{name}.png": caption for name, caption in CAPTIONS.items()}
    pipeline = load_pipeline(model, read_spec(model), torch.float32)
    for shard in index.shards:
        reader = ShardReader(shards / shard.name, shard)
        for row in range(shard.samples):
            expected, _ = pipeline.encode_prompt(reader.meta(row)["caption"])
            torch.testing.assert_close(reader.text(row), expected[0], rtol=1e-4, atol=1e-4)
            shape = (32, shard.bucket.height // 8, shard.bucket.width // 8)
            assert reader.latent(row).shape == shape and reader.latent(row).dtype == torch.float32
    conditioning = load_file(shards / "conditioning.safetensors")
    mean, std = latents.statistics(pipeline.vae)
    assert torch.equal(conditioning["latent_mean"], mean)
    assert torch.equal(conditioning["latent_std"], std)
    empty, _ = pipeline.encode_prompt("")
    torch.testing.assert_close(conditioning["empty_text"], empty[0], rtol=1e-4, atol=1e-4)
    assert not (shards / ".texts").exists()
    for bucket in index.bucket_counts():
        with Image.open(shards / "contact_sheets" / f"{bucket}.jpg") as sheet:
            assert sheet.width >= bucket.width


def test_unusable_images_are_skipped_named_and_counted(model, photos, tmp_path, caplog):
    truncate(photos / "b.png")
    (photos / "c.png").write_text("no picture")
    (photos / "empty.png").touch()
    Image.new("RGB", (8, 8)).save(photos / "small.png")
    for name in ("small", "empty"):
        (photos / f"{name}.txt").write_text("tiny")
    shards = tmp_path / "shards"
    assert run(recipe_for(model, photos, shards)).samples == 2
    reasons = report(shards)["skipped"]
    assert set(reasons) == {f"images/{name}.png" for name in ("b", "c", "empty", "small")}
    assert "truncated" in reasons["images/b.png"]
    assert "data.max_upscale" in reasons["images/small.png"]
    assert all(name in caplog.text for name in reasons)
    summary = (shards / "report.txt").read_text()
    assert "4 images skipped" in summary and "3 unreadable: images/" in summary


def test_what_there_is_to_say_of_used_images_is_in_the_report(model, photos, tmp_path):
    with Image.open(photos / "a.png") as image:
        image.save(photos / "a.png", icc_profile=b"no profile")
    shutil.copy(photos / "b.png", photos / "b.reference.png")
    shutil.copy(photos / "b.png", photos / "d.reference.png")
    shards = tmp_path / "shards"
    recipe = recipe_for(model, photos, shards)
    for _ in range(2):  # also of what was encoded before
        run(recipe)
        notes = report(shards)["notes"]
        assert {kind: [*names] for kind, names in notes.items()} == {
            DAMAGED_PROFILE: ["images/a.png"], ALIGNED: ["images/b.png"], OWN_SIZE: ["images/d.png"],
        }  # fmt: skip
        assert "1 image with a color profile that is not applied: images/a.png" in (
            (shards / "report.txt").read_text()
        )
    references = {
        reader.meta(row)["source"]: [each.shape[1:] for each in reader.references(row)]
        for shard in read_index(shards).shards
        for reader in [ShardReader(shards / shard.name, shard)]
        for row in range(shard.samples)
    }
    assert references["b.png"] == [(6, 10)]  # its image is 128x72, in bucket 80x48
    assert references["d.png"] == [(8, 16)]


def test_what_a_user_would_overlook_is_said(model, photos, tmp_path, caplog):
    shutil.copy(photos / "a.png", photos / "phone.gif")
    (photos / "phone.txt").write_text("a phone's picture")
    (photos / "a.png.txt").write_text("misnamed")
    add_photo(photos, "wide", (240, 80), "a panorama")
    add_photo(photos, "longer", (640, 80), "a longer panorama")
    add_photo(photos, "small", (62, 62), "nearly large enough")
    shards = tmp_path / "shards"
    index = run(recipe_for(model, photos, shards))
    assert index.samples == 6
    said = (shards / "report.txt").read_text()
    assert report(shards)["skipped"] == {
        "images/phone.gif": ".gif is not read: convert it to JPEG or PNG",
        "images/longer.png": "of 640x80 px the crop to bucket 80x48 would cut away 79%; data.max_crop is 0.5",
    }
    named = r"1 other file is not used: 1 \.txt \(of no image; the first is .*a\.png\.txt\)"
    assert len(re.findall(named, caplog.text)) == 1 and re.search(named, said)
    assert list(report(shards)["unused_files"]) == [".txt"]
    assert report(shards)["notes"] == {
        CROPPED: {"images/wide.png": "44%"}, ENLARGED: {"images/small.png": "1.03×"}
    }  # fmt: skip
    assert "1 image with a crop that cuts away more than 30%: images/wide.png (44%)" in said
    assert "1 image with fewer pixels than the bucket, enlarged: images/small.png (1.03×)" in said
    assert "1 too long or too high for their bucket (data.max_crop): images/longer.png" in said
    run(recipe_for(model, photos, shards))
    assert (shards / "report.txt").read_text().splitlines()[1:] == said.splitlines()[1:]
    manifest = next((shards / "prepared").glob("*.tar.json"))
    values = json.loads(manifest.read_text())
    values["rows"] = [row[:4] for row in values["rows"]]  # as older versions did
    for content in json.dumps(values), "{", "[]":  # or damaged
        manifest.write_text(content)
        with pytest.raises(UserError, match=r"\.tar\.json: an older version of flux2-ds wrote it"):
            run(recipe_for(model, photos, shards))


def test_images_without_captions_are_named(model, photos, tmp_path):
    for number in range(7):
        shutil.copy(photos / "a.png", photos / f"n{number}.png")
    (photos / "n1.txt").write_bytes(b"caf\xe9")
    named = r"7 of 11 images .* images/n0\.png, images/n1\.png \(caption n1\.txt is not UTF-8"
    with pytest.raises(UserError, match=rf"{named}.* images/n4\.png and 2 more\. Write"):
        run(recipe_for(model, photos, tmp_path / "s"))


@pytest.mark.parametrize(
    ("setting", "samples", "caption"), [("skip", 3, None), ("fixed", 4, "a photograph")]
)
def test_a_missing_caption_follows_the_setting(model, photos, tmp_path, setting, samples, caption):
    (photos / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.png.*data\.missing_caption"):
        run(recipe_for(model, photos, tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    recipe = recipe_for(
        model, photos, tmp_path / "s", missing_caption=setting, fixed_caption=caption or ""
    )
    assert run(recipe).samples == samples
    assert globals()["samples"](tmp_path / "s").get("a.png") == caption


def test_a_folder_that_grows_keeps_its_shards_and_encodes_only_what_is_new(
    model, photos, tmp_path, encoded
):
    shards = tmp_path / "shards"
    recipe = recipe_for(model, photos, shards)
    run(recipe)
    before = shard_bytes(shards)
    encoded.clear()
    assert run(recipe).samples == 4  # nothing new
    assert encoded == [] and shard_bytes(shards) == before

    add_photo(photos, "e", (96, 96), CAPTIONS["d"])  # a caption known from before
    add_photo(photos, "f", (96, 96), "a new caption")
    os.utime(photos / "a.png", ns=(1, 1))  # touched, with the same bytes
    index = run(recipe)
    assert encoded == ["a new caption", "e.png", "f.png"]
    assert index.samples == 6
    expected = {f"{name}.png": caption for name, caption in CAPTIONS.items()}
    expected |= {"e.png": CAPTIONS["d"], "f.png": "a new caption"}
    assert samples(shards) == expected
    assert {
        name: content for name, content in shard_bytes(shards).items() if name in before
    } == before
    assert (report(shards)["kept"], report(shards)["encoded"]) == (4, 2)


def test_what_could_not_be_read_is_tried_again(model, photos, tmp_path, monkeypatch):
    """A file out of reach is left out for now; a failing disk ends the start, for the next file would go, too."""
    recipe, read = recipe_for(model, photos, tmp_path / "s"), Blob.read

    def failing(error: Exception) -> None:
        def read_some(self: Blob) -> bytes:
            if self.location.endswith("b.png"):
                raise error
            return read(self)

        monkeypatch.setattr(Blob, "read", read_some)

    failing(OutageError("b.png cannot be read: Input/output error."))
    with pytest.raises(OutageError, match="Input/output"):
        run(recipe)
    failing(UserError("b.png cannot be read: Permission denied."))
    assert run(recipe).samples == 3
    assert list(report(tmp_path / "s")["skipped"]) == ["images/b.png"]
    monkeypatch.setattr(Blob, "read", read)
    assert run(recipe).samples == 4


def test_a_folder_may_change_all_its_captions_or_begin_with_nothing_usable(model, photos, tmp_path):
    recipe = recipe_for(model, photos, tmp_path / "s")
    run(recipe)
    for caption in photos.glob("*.txt"):
        caption.write_text(f"sks, {caption.read_text()}")
    assert run(recipe).samples == 4
    assert all(caption.startswith("sks, ") for caption in samples(tmp_path / "s").values())

    other, recipe = tmp_path / "other", recipe_for(model, tmp_path / "other", tmp_path / "t")
    other.mkdir()
    add_photo(other, "a", (96, 96), "one")
    truncate(other / "a.png")
    with pytest.raises(UserError, match="can be used"):
        run(recipe)
    add_photo(other, "b", (96, 96), "two")
    assert run(recipe).samples == 1
    with pytest.raises(UserError, match="prepared from other images"):
        run(recipe_for(model, photos, tmp_path / "t"))


def test_conditioning_is_known_by_its_contents_and_written_again(model, photos, tmp_path, encoded):
    recipe = recipe_for(model, photos, tmp_path / "s")
    index = run(recipe)
    path = tmp_path / "s" / CONDITIONING_NAME
    whole = path.read_bytes()
    assert index.text_dtype == "float32"
    assert read_conditioning(str(tmp_path / "s"), index)["latent_mean"].shape == (128,)
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:2000]):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"conditioning\.safetensors .*not what index\.json says"
        ):
            read_conditioning(str(tmp_path / "s"), index)
    path.unlink()
    encoded.clear()
    assert run(recipe) == index
    assert path.read_bytes() == whole and encoded == [""]


def test_preview_prompts_are_encoded_with_the_captions_or_later(model, photos, tmp_path, encoded):
    recipe = recipe_for(model, photos, tmp_path / "shards")

    def prepared(*prompts: str, every: int | None = 5) -> dict[str, torch.Tensor]:
        run(dataclasses.replace(recipe, preview=Preview(prompts=list(prompts), every=every)))
        path = tmp_path / "shards" / PROMPTS_NAME
        return load_file(path) if path.is_file() else {}

    assert prepared("a cat", every=None) == {}
    del encoded[:]
    found = prepared("a cat", "a red square")
    assert encoded == ["a cat"]  # the other is known from a shard
    del encoded[:]
    add_photo(photos, "new", (96, 96), "a new one")
    found = prepared("a dog", "a cat")
    assert sorted(encoded) == ["a dog", "a new one", "new.png"]
    assert found.keys() == {"a cat", "a dog", "a red square"}
    expected = TextEncoder(model, read_spec(model), torch.float32, torch.device("cpu"))
    for prompt, text in found.items():
        torch.testing.assert_close(text, expected.encode([prompt])[0], rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "shards" / ".texts").exists()
    kept = Preservation(prompts=["a fox"], share=0.5)
    run(dataclasses.replace(recipe, preservation=kept))
    path, width = tmp_path / "shards" / PROMPTS_NAME, read_spec(model).text_width
    assert encoded_prompts(str(path.parent)) >= {"a dog", "a fox"}
    read = read_prompts(str(path.parent), found, width)
    assert all(torch.equal(read[prompt], found[prompt]) for prompt in found)
    with pytest.raises(UserError, match=r"prompts\.safetensors cannot be used .* has the shape"):
        read_prompts(str(path.parent), found, width + 1)
    whole = path.read_bytes()
    for at in (len(whole) - 1, len(whole) // 2, whole.index(b'"shape"') + 2, whole.index(b"xxh3")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"prompts\.safetensors cannot be used"):
            read_prompts(str(path.parent), found, width)
    damaged = path.read_bytes()
    write_prompts(path.parent, {prompt: text.bfloat16() for prompt, text in found.items()})
    path.write_bytes(path.read_bytes().replace(b':"BF16"', b': "F16"'))
    with pytest.raises(UserError, match=r"is not what was written"):
        read_prompts(str(path.parent), found, width)
    save_file(found, path)  # as older versions did
    with pytest.raises(UserError, match=r"it has no digests: an older version of flux2-ds"):
        read_prompts(str(path.parent), found, width)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"prompts\.safetensors cannot be used"):
        prepared("a bird")  # it is not written again under new digests


def test_what_is_gone_or_changed_is_dropped_but_no_shard_is_rewritten(
    model, photos, tmp_path, encoded
):
    shards = tmp_path / "shards"
    recipe = recipe_for(model, photos, shards)
    run(recipe)
    before = shard_bytes(shards)
    encoded.clear()
    (photos / "a.txt").write_text("another caption")
    add_photo(photos, "c", (96, 100), CAPTIONS["c"])  # another picture of that name
    (photos / "d.png").unlink()
    index = run(recipe)
    assert encoded == ["another caption", "a.png", "c.png"]
    assert samples(shards) == {
        "a.png": "another caption", "b.png": CAPTIONS["b"], "c.png": CAPTIONS["c"]
    }  # fmt: skip
    assert index.samples == 3 and report(shards)["dropped"] == 3
    assert {
        name: content for name, content in shard_bytes(shards).items() if name in before
    } == before
    # What is put back is found again.
    (photos / "a.txt").write_text(CAPTIONS["a"])
    encoded.clear()
    run(recipe)
    assert encoded == [] and samples(shards)["a.png"] == CAPTIONS["a"]


def test_several_sources_and_areas(model, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    add_photo(other, "a", (48, 48), "a small one")
    images = {"one": str(photos), "two": str(other)}
    index = run(recipe_for(model, images, tmp_path / "s", resolution=[32, 64]))
    found = {(s.source, str(s.bucket)): s.samples for s in index.shards}
    # The largest area that a picture fills without being enlarged; d is 64x128.
    assert found == {("one", "64x64"): 2, ("one", "80x48"): 1, ("one", "48x80"): 1,
                     ("two", "32x32"): 1}  # fmt: skip
    assert report(tmp_path / "s")["sources"] == {"one": 4, "two": 1}
    assert all(shard.name.startswith(f"{shard.source}-{shard.bucket}-") for shard in index.shards)


def test_what_is_held_out_stays_so_when_data_is_added(model, photos, tmp_path):
    for number in range(14):
        add_photo(photos, f"more{number}", (96, 96), "a red square")
    shards = tmp_path / "s"
    recipe = recipe_for(model, photos, shards, validation_fraction=0.3)

    def split() -> dict[str, bool]:
        index = read_index(shards)
        assert [index.part(held_out=h).samples for h in (True, False)] != [0, index.samples]
        return {
            reader.meta(row)["source"]: shard.held_out
            for shard in index.shards
            for reader in [ShardReader(shards / shard.name, shard)]
            for row in range(shard.samples)
        }

    run(recipe)
    before = split()
    assert 0 < sum(before.values()) < len(before) / 2
    add_photo(photos, "0 before all others", (96, 96), "a red square")
    run(recipe)
    assert len(split()) == len(before) + 1
    assert {name: held for name, held in split().items() if name in before} == before
    assert report(shards)["held_out"] == sum(split().values())
    # The share is met: a name is held out with that probability.
    names = [SourceImage("images", f"{n}.png", "", (), Blob("")) for n in range(4000)]
    assert abs(sum(plan.is_held_out(entry, 0.3) for entry in names) / 4000 - 0.3) < 0.03
    assert all(plan.is_held_out(e, 0.4) for e in names if plan.is_held_out(e, 0.3))


def test_few_images_of_which_none_is_held_out_are_warned_of(caplog):
    images = [SourceImage("images", f"{n}.png", "", (), Blob("")) for n in range(9)]
    plan.warn_of_validation(images, Data(images="", shards="", validation_fraction=0.02))
    (least,) = re.findall(r"none of 9 images .* From (0\.\d+) on one is", caplog.text)
    caplog.clear()
    plan.warn_of_validation(images, Data(images="", shards="", validation_fraction=float(least)))
    plan.warn_of_validation(images, Data(images="", shards=""))
    assert not caplog.text
    assert sum(plan.is_held_out(image, float(least)) for image in images) == 1


def test_images_in_tars(model, photos, tmp_path):
    tar = tmp_path / "raw.tar"
    with tarfile.open(tar, "w") as out:
        for path in sorted(photos.iterdir()):
            out.add(path, path.name)
    run(recipe_for(model, photos, tmp_path / "from-folder"))
    run(recipe_for(model, tar, tmp_path / "from-tar"))
    expected = samples(tmp_path / "from-folder")
    assert samples(tmp_path / "from-tar") == {f"raw.tar/{k}": v for k, v in expected.items()}
    one, other = (
        {s.name: ShardReader(folder / s.name, s) for s in read_index(folder).shards}
        for folder in (tmp_path / "from-folder", tmp_path / "from-tar")
    )
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].latent(0), other[name].latent(0))


def test_captions_over_512_tokens_are_counted(model, photos, tmp_path):
    (photos / "a.txt").write_text("red " * 600)
    run(recipe_for(model, photos, tmp_path / "s"))
    ((caption, tokens),) = report(tmp_path / "s")["captions_cut"].items()
    assert caption == ("red " * 600).strip() and tokens > 600
    assert "1 caption longer than 512 tokens" in (tmp_path / "s" / "report.txt").read_text()


def test_several_texts_are_encoded_once_and_again_only_where_settings_change_them(
    model, photos, tmp_path, encoded
):
    (photos / "a.txt").write_text("ohwx, b, c, d")
    for name in "bd":
        (photos / f"{name}.txt").write_text("x\ny")
    settings = Captions(
        one_per_line=True, shuffle_tags=True, variants=3, trigger_word="ohwx", add_trigger_word=True
    )
    recipe = recipe_for(model, photos, tmp_path / "s", validation_fraction=0.35)  # b
    recipe = dataclasses.replace(recipe, captions=settings)
    index, texts = run(recipe), {}
    for shard in index.shards:
        reader = ShardReader(tmp_path / "s" / shard.name, shard)
        for row in range(shard.samples):
            meta = reader.meta(row)
            texts[meta["source"]] = meta.get("captions", [meta["caption"]])
            assert reader.texts(row) == len(texts[meta["source"]])
    shuffled = texts.pop("a.png")
    assert len(shuffled) == 3 and {"".join(sorted(t)) for t in shuffled} == {"   ,,,bcdhowx"}
    red = "ohwx, a red square"
    assert texts == {"b.png": ["ohwx, x"], "c.png": 3 * [red], "d.png": 3 * ["ohwx, x"] + 3 * ["ohwx, y"]}  # fmt: skip
    different = {red, "ohwx, x", "ohwx, y", *shuffled}
    assert sorted(e for e in encoded if not e.endswith(".png")) == sorted({"", *different})
    assert report(tmp_path / "s")["texts"] == len(different)
    assert f"{index.stored_lines()[0]}\n" in (tmp_path / "s" / "report.txt").read_text()
    encoded.clear()
    run(recipe)
    assert encoded == []
    check_settings(recipe, index)
    fewer = dataclasses.replace(recipe, captions=dataclasses.replace(settings, variants=2))
    with pytest.raises(UserError, match=r"captions\.variants is 2, but .* prepared with 3"):
        check_settings(fewer, index)
    check_settings(fewer, run(fewer))
    assert sorted(encoded) == ["a.png", "c.png", "d.png"]  # no text, and not what is held out


@pytest.mark.parametrize(
    ("size", "crops", "places"),
    [
        ((96, 64), 1, [0.5]),
        ((96, 64), 2, [0, 1]),
        ((64, 96), 3, [0.5, 0, 1]),
        ((100, 64), 5, [0.5, 0, 1]),
        ((160, 128), 3, [0, 1]),
        ((79, 64), 3, [0.5]),
        ((64, 64), 3, [0.5]),
    ],
)
def test_crops_are_a_token_apart(size, crops, places):
    data = Data(images="", shards="", crops=crops)
    found = plan.choose_crops(*size, Bucket(64, 64), data)
    assert [crop.place for crop in found] == places


def test_crops_and_flips_are_encoded_and_warned_of(model, photos, tmp_path, caplog):
    (photos / "a.txt").write_text("a cat, Left of a dog")
    caplog.set_level("INFO", "flux2_ds")
    wide = {
        "resolution": 64,
        "max_aspect": 1.0,
        "validation_fraction": 0.35,
        "samples_per_shard": 9,
    }
    recipe = recipe_for(model, photos, tmp_path / "s", crops=3, horizontal_flip=True, **wide)
    index = run(recipe)
    assert "3 images trained mirrored" in caplog.text
    assert "1 caption with left or right: images/a.png" in caplog.text
    assert "4 images to encode, 11 with crops and flips:" in caplog.text
    assert f"stored: 11 images with crops and flips, {len(set(CAPTIONS.values())) + 1} texts" in index.stored_lines()[0]  # fmt: skip
    plain = run(recipe_for(model, photos, tmp_path / "plain", **wide))
    assert plain.stored_lines()[0].startswith("stored: 4 images, ")
    readers = {
        folder: ShardReader(tmp_path / folder / shard.name, shard)
        for folder, of in (("s", index), ("plain", plain))
        for shard in of.shards
        if not shard.held_out
    }
    vae = load_pipeline(model, read_spec(model), torch.float32).vae
    rows = {readers["s"].meta(row)["source"]: row for row in range(3)}
    for name, row in rows.items():
        assert readers["s"].views(row) == (6 if name == "d.png" else 2)
        center = readers["plain"].latent(row)
        torch.testing.assert_close(readers["s"].latent(row), center, rtol=0, atol=1e-5)
    with Image.open(photos / "d.png") as image:
        top = np.asarray(image.crop((0, 0, 64, 64)))[:, ::-1].copy()
    found = readers["s"].latent(rows["d.png"], 3)
    expected = latents.encode(vae, torch.from_numpy(top)[None])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for name in ("crops", "horizontal_flip"):
        changed = dataclasses.replace(recipe.data, **{name: getattr(Data, name)})
        with pytest.raises(UserError, match=rf"data\.{name} was (3|True), is (1|False)"):
            run(dataclasses.replace(recipe, data=changed))
        with pytest.raises(UserError, match=rf"data\.{name} is (1|False), but .* with (3|True)"):
            check_settings(dataclasses.replace(recipe, data=changed), index)


def test_repeats_from_folders_are_weights(model, photos, tmp_path, caplog):
    for name, folder in (("b", "3_cats"), ("c", "0_not"), ("d", "2024_trip")):
        (photos / folder).mkdir()
        for suffix in ("png", "txt"):
            (photos / f"{name}.{suffix}").rename(photos / folder / f"{name}.{suffix}")
    square = {"max_aspect": 1.0, "samples_per_shard": 9}
    plain = run(recipe_for(model, photos, tmp_path / "plain", **square))
    assert "true would serve images/0_not, images/3_cats as often as the name says" in caplog.text
    assert [shard.repeats for shard in plain.shards] == [1]
    recipe = recipe_for(model, photos, tmp_path / "s", repeats_from_folders=True, **square)
    index = run(recipe)
    assert report(tmp_path / "s")["skipped"] == {"images/0_not/c.png": "its folder says 0 repeats"}
    facts = {shard.name: (shard.samples, shard.repeats) for shard in index.shards}
    assert facts == {"images-64x64-00000.tar": (2, 1), "images-64x64-3x-00000.tar": (1, 3)}
    assert run(recipe) == index
    order = Order(index, 1, seed=0, window=8)
    served = [order.batch(step)[1][0].shard for step in range(20)]
    assert order.steps_per_epoch == 5 and served.count(1) == 12
    more = [dataclasses.replace(shard, repeats=shard.repeats + 1) for shard in index.shards]
    assert dataclasses.replace(index, shards=more).digest != index.digest
    order = Order(index, 1, seed=0, window=8, weights={"images": 0.5})
    assert order.steps_per_epoch == 3


def test_a_source_without_usable_images_and_a_trigger_word_in_no_caption_are_refused(
    model, photos, tmp_path
):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.png").write_text("no image")
    (tmp_path / "other" / "x.txt").write_text("x")
    sources = {"me": str(photos), "other": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"none of the images in data\.images .*other can be used"):
        run(recipe_for(model, sources, tmp_path / "s"))
    recipe = recipe_for(model, photos, tmp_path / "s")
    with pytest.raises(UserError, match=r"'ohwx', which is in no caption of data\.images images"):
        run(dataclasses.replace(recipe, captions=Captions(trigger_word="ohwx")))


def test_rounds_keep_the_scratch_space_small(model, photos, tmp_path, encoded):
    run(recipe_for(model, photos, tmp_path / "whole"))
    encoded.clear()
    tiny = Prepare(scratch_gb=1e-9)  # a shard at a time
    run(recipe_for(model, photos, tmp_path / "rounds", prepare=tiny))
    captions = [item for item in encoded if not item.endswith(".png")]
    assert sorted(captions) == sorted({"", *CAPTIONS.values()})
    assert captions != sorted(captions)  # they did come in rounds
    assert shard_bytes(tmp_path / "rounds") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_padding_of_devs_captions_is_stored_once(photos, tmp_path, weights):
    make_tiny(tmp_path / "dev", "dev")
    spec = read_spec(tmp_path / "dev")
    recipe = recipe_for(
        tmp_path / "dev", photos, tmp_path / "s", prepare=Prepare(text_weights=weights)
    )
    index, dtype = run(recipe), {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    encoder = TextEncoder(tmp_path / "dev", spec, dtype, torch.device("cpu"))
    batch = sorted({"", *CAPTIONS.values()})
    expected = dict(zip(batch, encoder.encode(batch), strict=True))
    for shard in index.shards:
        reader = ShardReader(tmp_path / "s" / shard.name, shard)
        for row in range(shard.samples):
            assert torch.equal(reader.text(row), expected[reader.meta(row)["caption"]])
    text = 512 * spec.text_width * dtype.itemsize
    assert report(tmp_path / "s")["bytes_a_sample"] < 0.5 * text


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (Prepare(text_weights="bf16", vae_precision="bf16"), 0.15),
        (Prepare(text_weights="int8"), 0.15),
        (Prepare(vae_slicing=True, vae_tiling=True, text_device="cpu"), 1e-4),
    ],
)
def test_encoder_settings(model, photos, tmp_path, settings, tolerance):
    before = {s.name: s for s in run(recipe_for(model, photos, tmp_path / "plain")).shards}
    index = run(recipe_for(model, photos, tmp_path / "other", prepare=settings))
    for shard in index.shards:
        plain, other = (
            ShardReader(tmp_path / name / s.name, s)
            for name, s in (("plain", before[shard.name]), ("other", shard))
        )
        for read in ("latent", "text"):
            expected, found = getattr(plain, read)(0).float(), getattr(other, read)(0).float()
            assert (found - expected).norm() <= tolerance * expected.norm()
    dtype = torch.float32 if settings.text_weights == "auto" else torch.bfloat16
    assert other.text(0).dtype == dtype
    plain, other = (
        load_file(tmp_path / name / "conditioning.safetensors") for name in ("plain", "other")
    )
    for name in ("latent_mean", "latent_std"):
        assert torch.equal(plain[name], other[name])
    with pytest.raises(UserError, match=r"prepare\.\w+ was"):
        run(recipe_for(model, photos, tmp_path / "plain", prepare=settings))


def test_statistics_of_a_vae_saved_in_bf16_are_computed_in_fp32(model, photos, tmp_path):
    saved, shards = shutil.copytree(model, tmp_path / "model"), tmp_path / "shards"
    vae = AutoencoderKLFlux2.from_pretrained(model, subfolder="vae").to(torch.bfloat16)
    vae.save_pretrained(saved / "vae")
    run(recipe_for(saved, photos, shards, prepare=Prepare(vae_precision="bf16")))
    conditioning = load_file(shards / "conditioning.safetensors")
    variance = vae.bn.running_var.double() + vae.config.batch_norm_eps
    std = conditioning["latent_std"].double()
    torch.testing.assert_close(std, variance.sqrt(), rtol=1e-6, atol=0)
    assert torch.equal(conditioning["latent_mean"], vae.bn.running_mean.float())


def test_a_full_disk_is_said_and_survived(model, photos, tmp_path, monkeypatch):
    recipe = recipe_for(model, photos, tmp_path / "s")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(UserError, match=r"needs at least \d\.\d\d GB more.* has 0\.00 GB free"):
            run(recipe)

    class FullFile(io.FileIO):
        def write(self, data):
            if self.tell() > 20_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    with monkeypatch.context() as patch:
        original = Path.open

        def opened(self, mode="r", *rest, **more):
            partial = self.suffix == ".partial" and "w" in mode and "images-" in self.name
            return FullFile(self, "w") if partial else original(self, mode, *rest, **more)

        patch.setattr(Path, "open", opened)
        with pytest.raises(UserError, match=r"the disk of data\.shards .* is full"):
            run(recipe)
    assert not list((tmp_path / "s").glob("*.partial"))
    assert run(recipe).samples == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data.max_upscale": 1.5}, r"max_upscale was .*, is 1\.5"),
        ({"data.resolution": [64, 32]}, r"resolution was 64, is \[64, 32\]"),
        ({"precision": "bf16"}, "text_weights was 'fp32', is 'bf16'"),
    ],
)
def test_shards_of_other_settings_are_not_continued(model, photos, tmp_path, change, named):
    recipe = recipe_for(model, photos, tmp_path / "s")
    rules.claim_contents(tmp_path / "s", rules.contents(recipe, {}))
    ((name, value),) = change.items()
    section, _, field = name.rpartition(".")
    if section:
        value = dataclasses.replace(recipe.data, **{field: value})
    other = dataclasses.replace(recipe, **{section or field: value})
    with pytest.raises(UserError, match=named):
        rules.check_contents(tmp_path / "s", rules.contents(other, {}))


def test_a_start_that_was_refused_binds_the_folder_to_nothing(model, photos, tmp_path):
    shards = tmp_path / "s"
    with pytest.raises(UserError, match="none of the images"):
        run(recipe_for(model, photos, shards, resolution=1024))
    rules.claim_contents(shards, {"settings": {"resolution": 1024}})  # as one that was killed
    recipe = recipe_for(model, photos, shards)
    assert run(recipe).samples == 4
    assert run(recipe).samples == 4
    with pytest.raises(UserError, match=r"data\.resolution was 64, is 1024"):
        run(recipe_for(model, photos, shards, resolution=1024))


def test_images_that_were_made_here_are_not_trained_on(model, photos, tmp_path):
    recipe = recipe_for(model, photos, photos / "shards")
    recipe = dataclasses.replace(recipe, run_dir=str(photos / "linked"))
    (tmp_path / "run" / "previews").mkdir(parents=True)
    shutil.copy(photos / "a.png", tmp_path / "run" / "previews")
    (photos / "linked").symlink_to(tmp_path / "run")
    for _ in range(2):
        assert run(recipe).samples == 4
    assert list((photos / "shards" / "contact_sheets").glob("*.jpg"))


def test_two_at_a_time_are_refused(tmp_path):
    with (
        rules.lock_folder(tmp_path / "s"),
        pytest.raises(UserError, match="another prepare is writing"),
    ):
        rules.lock_folder(tmp_path / "s")


def test_a_folder_of_something_else_is_left_alone(model, photos, tmp_path):
    shards = tmp_path / "shards"
    run(recipe_for(model, photos, shards))
    before = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    other.mkdir()
    add_photo(other, "z", (96, 96), "something else")
    with pytest.raises(UserError, match=r"data\.shards .* prepared from other images"):
        run(recipe_for(model, other, shards))
    assert {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        run(recipe_for(model, photos, foreign))
    assert [path.name for path in foreign.iterdir()] == ["mine.txt"]


def test_a_store_is_refused_before_anything_else(photos, tmp_path, monkeypatch):
    recipe = recipe_for(tmp_path / "no model", photos, Path("unused"))
    recipe = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, shards="s3://bucket/shards")
    )
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe_values(recipe)))
    monkeypatch.setattr(sys, "argv", ["prepare", "--config", str(config)])
    with pytest.raises(UserError, match=r"^data\.shards s3://bucket/shards is a URL"):
        root.main()


def test_shards_of_another_model_are_refused(model, tmp_path):
    other = tmp_path / "other"
    make_tiny(other, "klein", seed=1)
    with pytest.raises(
        UserError,
        match=r"^data\.shards s3://bucket/shards were made by another model: their vae is \w+, .* is \w+",
    ):
        check_fingerprint(fingerprint(model), other, "s3://bucket/shards")
    shutil.rmtree(other / "text_encoder")
    shutil.copytree(model / "vae", other / "vae", dirs_exist_ok=True)
    assert check_fingerprint(fingerprint(model), other, "shards") == ["text_encoder"]
