"""`quality`: what it compares is what differs between the bases, and nothing else."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_ds.commands import quality
from flux2_ds.commands.quality import Nearness, Trained, compared, table
from flux2_ds.config.model_spec import read_spec
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.errors import UserError
from flux2_ds.prepare import __main__ as prepare

SETTINGS = {
    "run_dir": "unused",
    "precision": "fp32",
    "steps": 3,
    "data.resolution": 64,
    "data.bucket_step": 16,
    "lora.rank": 4,
    "batch.global_size": 2,
    "optimizer.learning_rate": 0.003,
    "launch.accelerator": "cpu",
}


def test_gradients_are_compared_block_by_block():
    plain = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0])}
    doubled_and_turned = {"a": torch.tensor([6.0, 8.0]), "b": torch.tensor([0.0, 2.0])}
    near = compared([dict(plain), doubled_and_turned], [plain, plain])
    # Cosines 1, 1, 1, 0; errors 0, 0, 1, √5.
    median = {"a": 1.0, "b": 0.5}
    assert near == Nearness(1.0, 0.0, 0.5, pytest.approx(5**0.5), "b", median)


def test_the_table_labels_what_drifts():
    near = Nearness(0.99, 0.98, 0.1, 0.2, "single_transformer_blocks.1", {})
    plain = Trained("bf16", [9.0] * 6 + [1.0, 1.0], None)
    rows = [
        Trained(mode, [9.0] * 6 + [loss, loss], near)
        for mode, loss in (("fp8", 1.009), ("nf4", 1.02), ("int8", 0.98))
    ]
    _, _, first, *lines = table([plain, *rows])
    assert first.startswith("| plain bf16 |") and "| 1.0000 |" in first
    assert [line.split("|")[-2].strip() for line in lines] == ["+0.90%", "+2.00% drifts", "-2.00%"]
    assert "| fp8 | 0.9900 | 0.9800 | 0.100 | 0.200 | single_transformer_blocks.1 |" in lines[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--modes", "[fp8, fp4]"], "--modes is .*'fp4'.* must name some of fp8, int8, nf4"),
        (["--batches", "0"], "--batches is 0"),
        (
            ["--method", "full", "--modes", "[nf4]"],
            "'nf4'.*; with method full it must name some of fp8, fp32",
        ),
        (["--image", "loss.xyz"], "--image is loss.xyz; its suffix must be .*.png"),
        (["--image", "loss"], "--image is loss; its suffix must be"),
    ],
)
def test_what_cannot_be_compared_is_refused(monkeypatch, given, message):
    required = ["--run_dir", "r", "--model.path", "m", "--data.images", "i", "--data.shards", "s"]
    monkeypatch.setattr(sys, "argv", ["quality", *required, *given])
    with pytest.raises(UserError, match=message):
        quality.main()


def prepared(tiny_model, folder):
    """Settings of a recipe on two images, whose shards are made."""
    (folder / "images").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"caption {number}")
    values = {
        **SETTINGS,
        "model.path": tiny_model,
        "data.images": folder / "images",
        "data.shards": folder / "shards",
    }
    settings = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    recipe, _ = parse_recipe(recipe_parser("quality", ""), settings)
    prepare.prepare(recipe, tiny_model, read_spec(tiny_model))
    return settings


@pytest.mark.parametrize("tiny_model", ["klein"], indirect=True)
def test_only_the_base_makes_a_difference(tiny_model, tmp_path, monkeypatch, capsys):
    """The same base again gives the same losses and gradients to the last bit; 4 bits do not."""
    settings = prepared(tiny_model, tmp_path)
    # What goes with the recipe's base need not go with the plain one.
    settings += [
        "--base_weights",
        "fp8",
        "--cache_transposed_base",
        "true",
        "--batches",
        "2",
        "--json",
    ]
    settings += ["--modes", "[fp32, nf4]", "--image", str(tmp_path / "p.png")]
    monkeypatch.setattr(sys, "argv", ["quality", *settings])
    with monkeypatch.context() as kept:  # DeepSpeed makes no second process group
        kept.setattr(quality, "destroy_process_group", lambda: None)
        quality.main()
    plain, again, quantised = json.loads(capsys.readouterr().out)
    assert again["losses"] == plain["losses"]
    assert len(set(plain["losses"])) == SETTINGS["steps"]
    assert again["nearness"]["error_worst"] == 0
    assert again["nearness"]["cosine_worst"] == pytest.approx(1, abs=1e-12)
    with Image.open(tmp_path / "p.png") as picture:
        assert len(picture.convert("RGB").getcolors(100_000) or ()) > 100
    assert quantised["mode"] == "nf4"
    assert quantised["losses"] == pytest.approx(plain["losses"], rel=0.1)
    assert 0.5 < quantised["nearness"]["cosine_worst"] < 0.9999
    assert quantised["nearness"]["error_worst"] > quantised["nearness"]["error_median"] > 0.01
    monkeypatch.delenv("RANK")  # which a process that is alone sets itself
    # A full fine-tune has its products in fp8 in a base's place.
    full = ["--method", "full", "--precision", "bf16", "--deepspeed", "zero1", "--modes", "[fp8]"]
    settings = [
        *settings[: settings.index("--base_weights")],
        *full,
        "--optimizer.learning_rate",
        "1e-3",
    ]
    monkeypatch.setattr(sys, "argv", ["quality", *settings, "--batches", "1", "--json"])
    quality.main()
    plain, fp8 = json.loads(capsys.readouterr().out)
    assert plain["mode"] == "bf16" and fp8["mode"] == "fp8"
    assert fp8["losses"] != plain["losses"]
    assert fp8["losses"] == pytest.approx(plain["losses"], rel=0.02)
    cosines = fp8["nearness"]["cosines"]
    assert {"transformer_blocks.0", "single_transformer_blocks.0", "proj_out.weight"} <= {*cosines}
    assert 0.9 < min(cosines.values()) < 0.9999, cosines
