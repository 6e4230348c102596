"""The shipped model loads, is small, and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "demo" / "model"


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinPipeline:
    loaded = Flux2KleinPipeline.from_pretrained(MODEL, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_model_is_smaller_than_13_megabytes() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 13e6


@torch.no_grad()
def test_vae_returns_a_panda_that_it_has_never_seen(pipeline: Flux2KleinPipeline) -> None:
    with Image.open(EXAMPLES / "panda" / "panda-04-blue.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    latents = pipeline.vae.encode(pixels / 127.5 - 1).latent_dist.mode()
    decoded = (pipeline.vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5
    psnr = 10 * torch.log10(255**2 / (decoded - pixels).square().mean())
    assert psnr > 30  # 35.7 dB measured


def test_background_has_the_color_of_the_prompt(pipeline: Flux2KleinPipeline) -> None:
    picture = pipeline(
        prompt="a lion on a blue background",
        height=128,
        width=128,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    corner = np.median(np.asarray(picture)[:8, :8].reshape(-1, 3), axis=0)
    assert np.abs(corner - (58, 130, 236)).max() < 30  # 8 measured
