"""What `inspect` shows is what training computes with."""

import sys
from pathlib import Path

import numpy as np
import pytest
from factories import rendered
from PIL import Image
from transformers import AutoTokenizer

from flux2_ds.commands import inspect as inspection
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.parse import load_recipe
from flux2_ds.config.recipe import Objective
from flux2_ds.errors import UserError
from flux2_ds.model.text_encoder import read_prompt
from flux2_ds.prepare import __main__ as prepare

CAPTION = "A lighthouse,\nseen from the sea."
COLOURS = {"a": (250, 20, 20), "b": (20, 20, 250)}


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file beside its pictures, prepared; the pictures are of two sizes."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "photos").mkdir()
    for name, size in (("a", (64, 64)), ("b", (80, 48))):
        Image.new("RGB", size, COLOURS[name]).save(folder / "photos" / f"{name}.png")
        (folder / "photos" / f"{name}.txt").write_text(CAPTION)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {folder}/run\nmodel:\n  path: {tiny_model}\nlora:\n  rank: 2\n"
        f"data:\n  images: {folder}/photos\n  shards: {folder}/shards\n"
        "  resolution: 64\n  bucket_step: 16\nlaunch:\n  accelerator: cpu\n"
    )
    return recipe


def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["inspect", "--config", *options])
    inspection.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def prepared(settings: Path, tiny_spec: Spec) -> Path:
    """The same recipe, its shards made."""
    recipe = load_recipe(settings)
    prepare.prepare(recipe, Path(recipe.model.path), tiny_spec)
    return settings


def test_the_report_before_prepare(settings, monkeypatch, capsys) -> None:
    out = inspect(monkeypatch, capsys, str(settings), "--data.shards", str(settings.parent / "no"))
    assert "no is not prepared yet" in out


def test_a_image_in_no_format_is_refused(settings, monkeypatch, capsys) -> None:
    with pytest.raises(UserError, match=r"--image look\.xyz: no image format"):
        inspect(monkeypatch, capsys, str(settings), "--image", "look.xyz")


def test_the_report(prepared, tiny_spec, monkeypatch, capsys) -> None:
    picture = prepared.parent / "look.png"
    out = inspect(monkeypatch, capsys, str(prepared), "--image", str(picture))

    assert str(tiny_spec) in out
    width = 128  # of the tiny transformer; 3 is its feed-forward ratio, doubled for the gate
    double = 8 * (width + width) + 2 * (width + 6 * width) + 2 * (3 * width + width)
    single = (width + 9 * width) + (4 * width + width)
    parameters = 2 * (2 * double + 3 * single)
    assert f"lora, {parameters:,} parameters in 30 linears: 30 of rank 2" in out
    assert "in 2 of 2 double blocks: attn.to_q," in out
    assert repr(rendered(tiny_spec, CAPTION)) in out
    layers = "9, 18, 27" if tiny_spec.variant == "klein" else "10, 20, 30"
    assert f"hidden states {layers}, stacked to width 96" in out
    assert out.count("s = 1.") == 2  # two buckets
    with Image.open(picture) as sheet:
        assert sheet.size == (2 * 88, 116)  # two cells with their captions


def test_the_image_shows_mask_and_reference_at_the_places_of_the_picture(
    prepared, tiny_spec, tmp_path, monkeypatch, capsys
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    # An edit pair of two sizes, which the bucket of 80x48 crops at its upper and lower ends.
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    for name, size in (("a.png", (120, 90)), ("a.reference.png", (240, 180))):
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(photos / name)
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), [60, 60], 1).repeat(90, 0)).save(
        photos / "a.mask.png"
    )
    (photos / "a.txt").write_text(CAPTION)
    options = ["--data.images", str(photos), "--data.shards", str(tmp_path / "shards")]
    options += ["--data.resolution", "[80]"]
    recipe = load_recipe(prepared, options)
    prepare.prepare(recipe, Path(recipe.model.path), tiny_spec)
    inspect(monkeypatch, capsys, str(prepared), *options, "--image", str(tmp_path / "look.png"))
    with Image.open(tmp_path / "look.png") as sheet:
        cells = np.split(np.asarray(sheet, np.float32), 2, axis=1)
    image, reference = (cell[:64, 4:100] for cell in cells)  # 96x64, over its caption
    shifted = abs(image[4:, 48:] - reference[:-4, 48:]).mean()  # by 4 px
    assert abs(image[:, 48:] - reference[:, 48:]).mean() < 0.5 * shifted
    assert abs(image[:, :48] - 0.2 * reference[:, :48]).mean() < 0.1 * shifted


@pytest.mark.parametrize("caption", [CAPTION, "", "word " * 600])
def test_the_token_ids_are_those_of_the_written_out_prompt(
    tiny_model: Path, tiny_spec: Spec, caption: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model / "tokenizer")
    expected = tokenizer(rendered(tiny_spec, caption), add_special_tokens=False)["input_ids"][:512]
    prompt = read_prompt(tiny_model, tiny_spec, caption)
    assert prompt.ids == expected
    assert prompt.text == tokenizer.decode(expected)
    assert (prompt.length, prompt.padding) == (
        512, "right" if tiny_spec.variant == "klein" else "left"
    )  # fmt: skip


def test_shards_of_another_recipe_are_refused(prepared, monkeypatch, capsys) -> None:
    with pytest.raises(UserError, match=r"data\.resolution is 96"):
        inspect(monkeypatch, capsys, str(prepared), "--data.resolution", "96")


@pytest.mark.parametrize("kind", ["flux", "uniform"])
def test_the_histogram_is_that_of_the_distribution(kind: str) -> None:
    settings = Objective(timestep_sampling=kind)  # type: ignore[arg-type]
    line = inspection.timestep_line(settings, Bucket(1024, 1024), 3)
    bars = line.split(": 0 ")[1].split(" 1")[0]
    assert len(bars) == 20
    if kind == "uniform":
        assert "s = 1.00" in line and set(bars) == {"█"} and "half below 0.50" in line
    else:
        median = 3.158 / (1 + 3.158)
        assert "s = 3.16" in line and f"half below {median:.2f}" in line
        heights = np.array(["▁▂▃▄▅▆▇█".index(bar) for bar in bars])
        assert heights.argmax() in (16, 17) and heights[0] == 0
