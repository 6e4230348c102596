"""Flow matching as pure functions of tensors.

    x_t = (1 - t) · x0 + t · ε        target v = ε - x0        t in [0, 1], 1 is noise

All in fp32; the distributions of t are in `timesteps.py`. Shapes: B batch, N image tokens, C = 128 channels.
"""

from __future__ import annotations

import torch


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
