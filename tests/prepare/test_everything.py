"""One folder with all that people have in theirs, and the report of what was used how, and what was not."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from test_prepare import model, recipe_for, report, run, samples

from flux2_ds.config.recipe import Batch
from flux2_ds.data.images import ALIGNED, DAMAGED_PROFILE, OWN_SIZE
from flux2_ds.prepare.plan import ENLARGED

__all__ = ["model"]  # the fixture


def picture(path: Path, width: int, height: int, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colors = np.random.default_rng(width).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(colors).resize((width, height))
    image.save(path, "PNG" if path.suffix.lower() == ".png" else "JPEG", **options)


def everything(folder: Path) -> dict[str, str]:
    """Make the folder and a tar beside it; returns where the two are."""
    square = {
        "cow.jfif": "a cow\r\n",  # read as JPEG, its caption's line end is not encoded
        "jpe.JPE": "\ufeffa second caption",
        "profile.png": "a damaged profile",
        "boat.png": "a boat with companions",
        "label.png": "OneTrainer's mask",
        "pair.png": "make it blue",
        "apart.png": "from another size",
        "10_cat/tom.png": "a cat",
        "nul.png": "a\0b",
    }
    for name, caption in square.items():
        picture(folder / name, 96, 96, **({"icc_profile": b"no"} if "profile" in name else {}))
        (folder / name).with_suffix(".txt").write_text(caption, newline="", encoding="utf-8")
    picture(folder / "boat.MASK.png", 96, 96)
    picture(folder / "label-masklabel.png", 96, 96)
    picture(folder / "pair.Reference.png", 192, 192)
    picture(folder / "apart.reference.png", 64, 128)
    for name, size in {"wide": (160, 80), "panorama": (640, 80), "small": (62, 62), "tiny": (16, 16),
                       "tall": (64, 128)}.items():  # fmt: skip
        picture(folder / f"{name}.png", *size)
        (folder / f"{name}.json").write_text(json.dumps({"prompt": f"json of {name}"}))
    (folder / "listed").mkdir()
    rows = {"one.png": ["a red car", "a vehicle"], "none.png": None}
    for name in rows:
        picture(folder / "listed" / name, 96, 96)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
    (folder / "listed" / "metadata.jsonl").write_text("\n".join(lines))
    picture(folder / "utf16.png", 96, 96)
    (folder / "utf16.caption").write_text("UTF-16", encoding="utf-16")
    for name in (".ipynb_checkpoints/cow-checkpoint.png", "@eaDir/b.png", "__MACOSX/._b.png",
                 ".thumbnails/b.png", "deep/.hidden.png"):  # fmt: skip
        picture(folder / name, 96, 96)
    (folder / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n")
    (folder / "eps.txt").write_text("starts a program")
    shutil.copy(folder / "small.png", folder / "phone.gif")
    for name in ("more.zip", "film.mp4", "misnamed.png.txt", "listed/none.caption.txt", "README"):
        (folder / name).write_text("x")
    packed = folder.parent / "packed.tar"
    with tarfile.open(packed, "w") as tar:
        files = {"a.png": (folder / "cow.jfif").read_bytes(), "a.txt": b"in a tar\r\n", ".b.png": b"",
                 "../up.png": b"", "tar.zip": b"x"}  # fmt: skip
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {"mine": str(folder), "packed": str(packed)}


def test_the_report_names_what_was_used_how_and_what_was_not(model, tmp_path, caplog):
    caplog.set_level("INFO")
    sources, shards = everything(tmp_path / "photos"), tmp_path / "shards"
    recipe = recipe_for(model, sources, shards, missing_caption="skip")
    run(replace(recipe, batch=Batch(global_size=4)))
    found, said = report(shards), (shards / "report.txt").read_text()
    assert found["skipped"] == {
        "mine/eps.png": "unreadable: not an image that is read (JPEG, PNG, WEBP, BMP, TIFF, AVIF, HEIF)",
        "mine/listed/none.png": "no caption (beside it: none.caption.txt)",
        "mine/nul.png": "caption nul.txt holds a NUL character",
        "mine/panorama.png": "of 640x80 px the crop to bucket 80x48 would cut away 79%; data.max_crop is 0.5",
        "mine/phone.gif": ".gif is not read: convert it to JPEG or PNG",
        "mine/tiny.png": "16x16 px must be enlarged 4.00× for bucket 64x64; data.max_upscale is 1.05",
        "packed/packed.tar/../up.png@4096": "its name in the tar points outside (absolute or with ..)",
    }
    unused = {suffix: count for suffix, (count, _) in found["unused_files"].items()}
    assert unused == {".zip": 2, ".txt": 2, ".mp4": 1, "without a suffix": 1}
    assert {kind: [*names] for kind, names in found["notes"].items()} == {
        DAMAGED_PROFILE: ["mine/profile.png"], ENLARGED: ["mine/small.png"],
        ALIGNED: ["mine/pair.png"], OWN_SIZE: ["mine/apart.png"],
    }  # fmt: skip
    assert (found["with_mask"], found["with_references"]) == (2, 2)
    references = {"64x64 with references 64x128": 1, "64x64 with references 64x64": 1}
    assert found["buckets"] == references | {"64x64": 10, "48x80": 1, "80x48": 1}
    assert all(f"bucket {name} has 1 of 14" in said for name in ("48x80", "80x48"))
    captions = samples(shards)
    assert {key: captions[key] for key in ("cow.jfif", "jpe.JPE", "utf16.png", "packed.tar/a.png",
                                           "tall.png", "listed/one.png")} == {
        "cow.jfif": "a cow", "jpe.JPE": "a second caption", "utf16.png": "UTF-16",
        "packed.tar/a.png": "in a tar", "tall.png": "json of tall", "listed/one.png": "a red car",
    }  # fmt: skip
    assert found["texts"] == len(captions) + 1  # of one image two
    # One page has all of it, by kind.
    assert len(said.splitlines()) < 30
    for kind in ("7 images skipped", "1 no caption: mine/listed/none.png", "2 .zip (unpack it; the first",
                 "1 image with fewer pixels", "(data.max_crop): mine/panorama.png"):  # fmt: skip
        assert kind in said, kind
    assert "would serve mine/10_cat as often as the name says" in caplog.text
