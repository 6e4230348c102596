"""Flow matching: the path, the target, the loss and the timestep distributions. Pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flux2_ds.config.recipe import Objective


def interpolate(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t)·x0 + t·ε. `x0`, `noise`: [B, N, C] fp32; `t`: [B] fp32."""
    t = t.view(-1, 1, 1)
    return (1 - t) * x0 + t * noise


def velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The target ε - x0, [B, N, C]."""
    return noise - x0


def flow_loss(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error in fp32 and that of each sample [B]: over all elements, unweighted.

    With `mask` [B, N] in [0, 1], not all 0: each sample's mean weighted by its mask, then the mean of the
    samples, so that a sample counts the same however much of it is masked out.
    """
    errors = (prediction.float() - target.float()).square()
    if mask is None:
        return errors.mean(), errors.detach().mean((1, 2))
    each = (errors.mean(-1) * mask).sum(1) / mask.sum(1)
    return each.mean(), each


def timesteps(z: torch.Tensor, settings: Objective, image_tokens: int) -> torch.Tensor:
    """t [B] of the recipe's distribution, from standard normal z [B], for images of `image_tokens` tokens."""
    match settings.timestep_sampling:
        case "uniform":
            return uniform(z)
        case "mode":
            return mode(z, settings.mode_scale)
    t = logit_normal(z, settings.logit_mean, settings.logit_std)
    return shifted(t, shift_of(settings, image_tokens))


def shift_of(settings: Objective, image_tokens: int) -> float:
    """s of the distribution at this number of tokens; 1 where it has none."""
    match settings.timestep_sampling:
        case "flux":
            return flux_shift(image_tokens, settings.max_shift_tokens)
        case "shift":
            return settings.shift
    return 1.0


def uniform(z: torch.Tensor) -> torch.Tensor:
    """U(0, 1): Φ(z)."""
    return torch.special.ndtr(z)


def logit_normal(z: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """sigmoid(N(mean, std²)) (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(mean + std * z)


def mode(z: torch.Tensor, scale: float) -> torch.Tensor:
    """1 - u - scale·(cos²(πu/2) - 1 + u), u uniform: more of the middle for scale > 0, of the ends for
    scale < 0 (Esser et al. 2024, section 3.1). Written in 1 - u = Φ(z), which cancels less."""
    rest = torch.special.ndtr(z)
    return rest + scale * (rest - torch.sin(math.pi / 2 * rest).square())


def shifted(t: torch.Tensor, s: float) -> torch.Tensor:
    """s·t / (1 + (s - 1)·t): more noise for s > 1 (Esser et al. 2024, section 5.3.2)."""
    return s * t / (1 + (s - 1) * t)


def flux_shift(image_tokens: int, max_tokens: int = 4096) -> float:
    """s = exp(mu), mu = 0.5 + 0.65 · (N - 256) / 3840, N clamped to `max_tokens`.

    The resolution-dependent shift of FLUX (Black Forest Labs' `flux` repository, `get_lin_function`
    with (256, 0.5) and (4096, 1.15)). 1.88 at 512², 2.33 at 768², 3.16 at 1024². The larger
    empirical mu of FLUX.2's inference scheduler is not for training.
    """
    mu = 0.5 + 0.65 * (min(image_tokens, max_tokens) - 256) / 3840
    return math.exp(mu)


def stratified(z: torch.Tensor, places: Sequence[int], of: int) -> torch.Tensor:
    """Move each z into its stratum: place k of `of` gets Φ⁻¹((k + Φ(z)) / of).

    A global batch of independent z then covers the distribution evenly, and each z stays standard
    normal over a random place; this lowers the variance of the loss and of the gradient.
    """
    place = torch.tensor(places, dtype=torch.float64).to(z.device, non_blocking=True)
    return torch.special.ndtri((place + torch.special.ndtr(z.double())) / of).float()
