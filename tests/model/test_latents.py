"""Latents and tokens against diffusers' own pipeline methods, and against the formulas."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline
from einops import rearrange
from PIL import Image

from flux2_ds.model import latents


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()
    vae.bn.running_mean.normal_(0, 0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def pipeline_with(vae: AutoencoderKLFlux2, kind: type) -> Flux2Pipeline:
    parts = {"transformer": None, "text_encoder": None, "tokenizer": None, "scheduler": None}
    return kind(vae=vae, **parts)


@pytest.mark.parametrize("kind", [Flux2Pipeline, Flux2KleinPipeline])
def test_tokens_are_those_of_the_pipeline(vae, image, kind) -> None:
    """From an image to packed tokens, as the pipeline encodes a reference image."""
    pipeline = pipeline_with(vae, kind)
    pixels = pipeline.image_processor.preprocess(Image.fromarray(image), height=64, width=96)
    with torch.no_grad():
        expected = pipeline._pack_latents(pipeline._encode_vae_image(pixels, generator=None))
    raw = latents.encode(vae, torch.from_numpy(image)[None])
    tokens = latents.to_tokens(raw, *latents.statistics(vae))
    assert tokens.shape == (1, 4 * 6, 128)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


def test_tokens_against_the_formula_in_float64(vae) -> None:
    """b c (i pi) (j pj) -> b (i j) (c pi pj), then (x - mean) / sqrt(var + eps)."""
    raw = torch.randn(2, 32, 8, 12, generator=torch.Generator().manual_seed(1))
    packed = rearrange(raw.double(), "b c (i p) (j q) -> b (i j) (c p q)", p=2, q=2)
    mean = vae.bn.running_mean.double()
    std = (vae.bn.running_var.double() + vae.config.batch_norm_eps).sqrt()
    expected = (packed - mean) / std
    tokens = latents.to_tokens(raw, *latents.statistics(vae))
    torch.testing.assert_close(tokens.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_mean_of_the_posterior_is_encoded_not_a_sample(vae, image) -> None:
    images = torch.from_numpy(image)[None]
    first, second = latents.encode(vae, images), latents.encode(vae, images)
    assert torch.equal(first, second)
    pixels = images.permute(0, 3, 1, 2).double() / 255 * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels.float()).latent_dist
    torch.testing.assert_close(first, posterior.mean, rtol=0, atol=1e-5)
    assert (posterior.sample() - first).abs().max() > 1e-3


def test_statistics_are_fp32_whatever_the_vae_is() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    vae.bn.running_mean.normal_()
    mean, std = latents.statistics(vae)
    assert mean.dtype == std.dtype == torch.float32
    expected = np.sqrt(vae.bn.running_var.double().numpy() + vae.config.batch_norm_eps)
    np.testing.assert_allclose(std.double().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (16, 16)])
def test_position_ids_are_those_of_the_pipeline(height: int, width: int) -> None:
    cpu = torch.device("cpu")
    grid = torch.empty(1, 128, height // 16, width // 16)
    ids = latents.image_ids(height, width, cpu)
    assert torch.equal(ids, Flux2KleinPipeline._prepare_latent_ids(grid)[0])
    by_hand = [(0, y, x, 0) for y in range(height // 16) for x in range(width // 16)]
    assert ids.tolist() == [list(row) for row in by_hand]
    assert latents.text_ids(5, cpu).tolist() == [[0, 0, 0, place] for place in range(5)]


def test_decode_inverts_the_pixel_scale(vae) -> None:
    raw = torch.zeros(1, 32, 8, 12)
    decoded = latents.decode(vae, raw)
    assert decoded.dtype == torch.uint8
    with torch.no_grad():
        expected = ((vae.decode(raw).sample.clamp(-1, 1) / 2 + 0.5) * 255).round()
    assert (decoded.permute(0, 3, 1, 2).float() - expected).abs().max() <= 1
