"""On a CUDA GPU `sample` renders what it renders on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from test_train_gpu import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run whose adapter is trained and exported."""
    folder = tmp_path_factory.mktemp("sample")
    settings = ["--config", "recipes/smoke-cpu.yaml", "--data.shards", str(folder / "shards"),
                "--run_dir", str(folder / "run"), "--steps", "60", "--preview.steps", "4",
                "--log.wandb", "disabled", "--launch.processes", "1"]  # fmt: skip
    for command in ("prepare", "train", "export"):
        run("launcher", command, *settings)
    return settings


def columns(picture: Path, *settings: str) -> list[NDArray[np.float64]]:
    """What `sample` renders without the adapter and with it, in levels of 255."""
    run("launcher", "sample", *settings, "--output", str(picture))
    return np.hsplit(np.asarray(Image.open(picture)).astype(float)[26:], 2)


@pytest.mark.parametrize("base", ["fp8", "nf4"])
def test_images_follow_the_cpu(base: str, common: list[str], tmp_path: Path) -> None:
    expected, found = (
        columns(tmp_path / "x.png", *common, "--base_weights", base, "--launch.accelerator", at)
        for at in ("cpu", "cuda")
    )
    # On a CPU, fp8 with its activations in bf16 instead of fp32 is 0.9 off.
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).mean() < 2
    without, trained = found
    assert np.abs(without - trained).mean() > 4


def test_attention_by_cudnn_makes_the_same_images(common: list[str], tmp_path: Path) -> None:
    in_bf16 = [*common, "--precision", "bf16", "--launch.accelerator", "cuda", "--attention"]
    expected, found = (columns(tmp_path / "x.png", *in_bf16, name) for name in ("math", "cudnn"))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).mean() < 1
