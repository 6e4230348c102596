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


def flow_loss(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error in fp32, a scalar: over all elements, unweighted.

    With `mask` [B, N] in [0, 1], not all 0: each sample's mean weighted by its mask, then the mean of the
    samples, so that a sample counts the same however much of it is masked out.
    """
    errors = (prediction.float() - target.float()).square()
    if mask is None:
        return errors.mean()
    return ((errors.mean(-1) * mask).sum(1) / mask.sum(1)).mean()
