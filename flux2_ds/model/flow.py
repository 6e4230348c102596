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


def penalty(difference: torch.Tensor, kind: str = "mse", delta: float = 1.0) -> torch.Tensor:
    """What each element e of `difference` costs: e², and for small e always about that.

    `huber`: e² up to δ, then δ(2|e| - δ): twice the loss of Huber 1964. `pseudo_huber`:
    2δ(√(e² + δ²) - δ) (Charbonnier et al. 1997; for diffusion Khrapov et al. 2024, arXiv:2403.16728),
    written as 2δe² / (√(e² + δ²) + δ), which cancels nothing.
    """
    square = difference.square()
    match kind:
        case "huber":
            size = difference.abs()
            return torch.where(size <= delta, square, delta * (2 * size - delta))
        case "pseudo_huber":
            return 2 * delta * square / ((square + delta**2).sqrt() + delta)
    return square


def loss_weight(t: torch.Tensor, settings: Objective) -> torch.Tensor | None:
    """Weight of samples at `t` [B]; None: 1 each.

    `cosmap`: 2 / (π(1 - 2t + 2t²)) (Esser et al. 2024, section 3.1; its mean over uniform t is 1).
    `min_snr`: min(SNR, γ) on the error of x0 (Hang et al. 2023, arXiv:2303.09556, section 3.4). On this path SNR is
    ((1 - t) / t)², and x0 = x_t - t·v, so that its error is t times that of the velocity: min((1 - t)², γt²).
    """
    match settings.weighting:
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
        case "min_snr":
            return torch.minimum((1 - t).square(), settings.min_snr_gamma * t.square())
    return None


def flow_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    *,
    kind: str = "mse",
    delta: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean error in fp32 and that of each sample [B], as `penalty` has it: over all elements.

    With `mask` [B, N] in [0, 1], not all 0: each sample's mean weighted by its mask, then the mean of the
    samples, so that a sample counts the same however much of it is masked out. `weight` [B]: of the samples in
    the mean, which is divided by their number all the same; those of each sample are without it.
    """
    errors = penalty(prediction.float() - target.float(), kind, delta)
    if mask is None and weight is None:
        return errors.mean(), errors.detach().mean((1, 2))
    each = errors.mean((1, 2)) if mask is None else (errors.mean(-1) * mask).sum(1) / mask.sum(1)
    return (each if weight is None else weight * each).mean(), each


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


def shifted(t: torch.Tensor, s: float | torch.Tensor) -> torch.Tensor:
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
