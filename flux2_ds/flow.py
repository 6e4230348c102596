"""Flow matching as pure functions of tensors.

    x_t = (1 - t) · x0 + t · ε        target v = ε - x0        t in [0, 1], 1 is noise

All in fp32. Shapes: B batch, N image tokens, C = 128 channels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch


def flux_shift(image_tokens: int, max_tokens: int = 4096) -> float:
    """s = exp(mu), mu = 0.5 + 0.65 · (N - 256) / 3840, N clamped to `max_tokens`.

    The resolution-dependent shift of FLUX (Black Forest Labs' `flux` repository, `get_lin_function`
    with (256, 0.5) and (4096, 1.15)). 1.88 at 512², 2.33 at 768², 3.16 at 1024². The larger
    empirical mu of FLUX.2's inference scheduler is not for training.
    """
    mu = 0.5 + 0.65 * (min(image_tokens, max_tokens) - 256) / 3840
    return math.exp(mu)


def timesteps(
    deviates: torch.Tensor,
    distribution: Literal["flux", "uniform", "logit_normal", "shift"],
    *,
    image_tokens: int,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 3.0,
    max_shift_tokens: int = 4096,
) -> torch.Tensor:
    """Timesteps t in (0, 1) from standard normal deviates; both [B] fp32.

    `uniform`: Φ(z). `logit_normal`: sigmoid(mean + std·z) (Esser et al. 2024, section 3.1).
    `shift` and `flux`: the logit-normal t, then t' = s·t / (1 + (s - 1)·t), with the given s or
    `flux_shift`.
    """
    if distribution == "uniform":
        return torch.special.ndtr(deviates)
    t = torch.sigmoid(mean + std * deviates)
    if distribution == "logit_normal":
        return t
    s = shift if distribution == "shift" else flux_shift(image_tokens, max_shift_tokens)
    return s * t / (1 + (s - 1) * t)


def interpolate(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t)·x0 + t·ε. `x0`, `noise`: [B, N, C] fp32; `t`: [B] fp32."""
    t = t.view(-1, 1, 1)
    return (1 - t) * x0 + t * noise


def velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The target ε - x0, [B, N, C]."""
    return noise - x0


def flow_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over all elements, in fp32, unweighted; a scalar."""
    return (prediction.float() - target.float()).square().mean()
