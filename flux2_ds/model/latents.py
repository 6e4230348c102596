"""Between the VAE's latents and the transformer's tokens, with position ids.

Legend: B batch, H and W pixels, h = H/16, w = W/16, N = h·w image tokens, L text tokens.
The layouts are diffusers' own (`Flux2Pipeline._patchify_latents`, `_pack_latents`, `_prepare_*_ids`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, images: torch.Tensor) -> torch.Tensor:
    """The mean of the posterior. `images`: [B, H, W, 3] uint8; returns [B, 32, H/8, W/8] fp32."""
    pixels = images.to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()


@torch.no_grad()
def decode(vae: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Raw latents [B, 32, H/8, W/8] to images [B, H, W, 3] uint8."""
    pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample.float()
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()


def statistics(vae: AutoencoderKLFlux2) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the patchified latents, each [128] fp32, from `vae.bn`."""
    mean = vae.bn.running_mean.float()
    std = torch.sqrt(vae.bn.running_var.float() + vae.config.batch_norm_eps)
    return mean.cpu().clone(), std.cpu()


def to_tokens(latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Patchify 2×2, normalize, pack: [B, 32, H/8, W/8] fp32 to [B, N, 128] fp32."""
    patches = Flux2Pipeline._patchify_latents(latents)
    normalized = (patches - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    return Flux2Pipeline._pack_latents(normalized)


@lru_cache(maxsize=256)  # a copy from the host in every step would wait for the device
def image_ids(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Position ids (0, y, x, 0) of an image of `height` × `width` px: [N, 4]."""
    grid = torch.empty(1, 1, height // 16, width // 16)
    return Flux2Pipeline._prepare_latent_ids(grid)[0].to(device)


@lru_cache(maxsize=256)
def reference_ids(shapes: tuple[torch.Size, ...], device: torch.device) -> torch.Tensor:
    """Position ids (10·(k+1), y, x, 0) of raw reference latents, the k-th [..., 32, 2h, 2w]: [sum of h·w, 4]."""
    grids = [torch.empty(1, 1, shape[-2] // 2, shape[-1] // 2) for shape in shapes]
    return Flux2Pipeline._prepare_image_ids(grids)[0].to(device)


@lru_cache(maxsize=256)
def text_ids(length: int, device: torch.device) -> torch.Tensor:
    """Position ids (0, 0, 0, l) of the text tokens: [L, 4]."""
    return Flux2Pipeline._prepare_text_ids(torch.empty(1, length, 1))[0].to(device)
