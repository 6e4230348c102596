"""Fits a tiny model's VAE and transformer to photographs, in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image, ImageOps
from torch import nn

from flux2_ds import flow
from flux2_ds.model import latents

POSTERIOR_STD = 0.05
"""Of the VAE's latents, whatever the picture."""


def fit_vae(vae: AutoencoderKLFlux2, photos: list[torch.Tensor], steps: int = 200) -> None:
    """Fit a small VAE to photographs ([3, H, W] in [-1, 1]) and measure its latent statistics.

    Plain reconstruction of random 64 px crops, with a little noise on the latents so that their scale
    matters.
    """
    _start_as_average_colours(vae)
    adam = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        pictures = _crops(photos, 2, 64)
        mean = vae.encode(pictures).latent_dist.mode()
        decoded = vae.decode(mean + POSTERIOR_STD * torch.randn_like(mean)).sample
        loss = (decoded - pictures).abs().mean() + (decoded - pictures).square().mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adam.step()
        schedule.step()
    patches = Flux2Pipeline._patchify_latents(_encode(vae, _crops(photos, 32, 128)))
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)))


def fit_transformer(
    transformer: Flux2Transformer2DModel,
    vae: AutoencoderKLFlux2,
    photos: list[torch.Tensor],
    steps: int,
    learning_rate: float,
) -> None:
    """Teach a small transformer to denoise the photographs in black and white, without any text; on a GPU
    if there is one.

    An adapter needs a base that denoises, and something to add to it: here, colour.
    """
    device, batch = torch.device("cuda" if torch.cuda.is_available() else "cpu"), 8
    transformer.to(device)
    grey = [photo.mean(0, keepdim=True).expand(3, -1, -1) for photo in photos]
    encoded = torch.cat([_encode(vae, _crops(grey, 16, 128)) for _ in range(16)])
    tokens = latents.to_tokens(encoded, *latents.statistics(vae)).to(device)
    text = torch.zeros(batch, 4, transformer.config.joint_attention_dim, device=device)
    adam = torch.optim.AdamW(transformer.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, learning_rate, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        x0 = tokens[torch.randint(len(tokens), (batch,))]
        noise, t = torch.randn_like(x0), torch.rand(batch, device=device)
        prediction = transformer(
            hidden_states=flow.interpolate(x0, noise, t),
            encoder_hidden_states=text,
            timestep=t,
            img_ids=latents.image_ids(128, 128, device),
            txt_ids=latents.text_ids(text.shape[1], device),
            guidance=torch.ones(batch, device=device)
            if transformer.config.guidance_embeds
            else None,
        ).sample
        loss = flow.flow_loss(prediction, flow.velocity(x0, noise))
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        adam.step()
        schedule.step()
    transformer.to("cpu")


@torch.no_grad()
def _encode(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    return vae.encode(pictures).latent_dist.mode()


@torch.no_grad()
def _start_as_average_colours(vae: AutoencoderKLFlux2) -> None:
    """Let the fit begin as a codec of average colours: 22.1 dB on its photographs after 200
    steps, where the usual random start gives some grey 18 dB after 300.

    Residual branches begin at zero and every convolution as the identity, except the encoder's three
    downsampling ones: these average R, G and B and fill the other channels with orthogonal mixtures.
    """
    encoder, decoder = vae.encoder, vae.decoder
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            if module.conv_shortcut is not None:
                nn.init.dirac_(module.conv_shortcut.weight)
        elif isinstance(module, Attention):
            module.to_out[0].weight.zero_()
    for conv in (
        *(encoder.conv_in, encoder.conv_out, vae.quant_conv, vae.post_quant_conv),
        *(decoder.conv_in, decoder.conv_out),
        *(block.upsamplers[0].conv for block in decoder.up_blocks[:3]),
    ):
        nn.init.dirac_(conv.weight)
    for block in encoder.down_blocks[:3]:
        weight = block.downsamplers[0].conv.weight
        kernel = nn.init.orthogonal_(torch.empty_like(weight[..., :2, :2]), gain=2**0.5)
        kernel[:3] = 0
        kernel[range(3), range(3)] = 1 / 4
        weight.zero_()[..., :2, :2] = kernel


def load_photos(folder: Path) -> list[torch.Tensor]:
    """Photographs at two sizes, [3, H, W] in [-1, 1]."""
    photos = []
    for path in sorted(folder.glob("*.[jp][pn]g")):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        for short in (128, 256):
            scale = short / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))
            photos.append(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    if not photos:
        raise FileNotFoundError(f"{folder} holds no .jpg or .png pictures")
    return photos


def _crops(photos: list[torch.Tensor], count: int, side: int) -> torch.Tensor:
    """Random square crops, [count, 3, side, side]."""
    crops = []
    for number in torch.randint(len(photos), (count,)):
        photo = photos[int(number)]
        top = int(torch.randint(photo.shape[1] - side + 1, ()))
        left = int(torch.randint(photo.shape[2] - side + 1, ()))
        crops.append(photo[:, top : top + side, left : left + side])
    return torch.stack(crops)
