"""Flow matching and its timestep distributions, against closed forms in float64 and against diffusers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)

from flux2_ds.config.recipe import Objective
from flux2_ds.model import flow

SAMPLES = 200_000
KOLMOGOROV = 1.95 / SAMPLES**0.5  # exceeded by chance once in a thousand seeds


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, 4, 6, 128, generator=generator)
    return x0, noise, torch.tensor([0.0, 0.25, 0.9, 1.0])


def test_path_leads_from_the_image_to_the_noise():
    x0, noise, t = batch()
    found = flow.interpolate(x0, noise, t)
    assert found.dtype == torch.float32
    assert torch.equal(found[0], x0[0])
    assert torch.equal(found[3], noise[3])
    expected = [
        (1 - time) * clean + time * noisy
        for clean, noisy, time in zip(x0.double(), noise.double(), t.tolist(), strict=True)
    ]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise, _ = (each.double() for each in batch())
    early, late = torch.full((4,), 0.25).double(), torch.full((4,), 0.75).double()
    slope = (flow.interpolate(x0, noise, late) - flow.interpolate(x0, noise, early)) / 0.5
    torch.testing.assert_close(flow.velocity(x0, noise), slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_unweighted_mean_in_fp32(dtype):
    x0, target, _ = batch()
    prediction = x0.to(dtype)
    loss, each = flow.flow_loss(prediction, target)
    assert (loss.dtype, loss.shape, each.shape) == (torch.float32, (), (len(x0),))
    torch.testing.assert_close(each.mean(), loss)
    differences = (prediction.double() - target.double()).flatten().tolist()
    expected = math.fsum(d * d for d in differences) / len(differences)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


E64 = torch.linspace(-4, 4, 161, dtype=torch.float64)


@pytest.mark.parametrize("delta", [0.1, 1.0, 2.5])
def test_robust_losses_are_their_formulas(delta):
    huber, pseudo = flow.penalty(E64, "huber", delta), flow.penalty(E64, "pseudo_huber", delta)
    expected = 2 * torch.nn.functional.huber_loss(
        E64, torch.zeros_like(E64), reduction="none", delta=delta
    )
    torch.testing.assert_close(huber, expected, rtol=1e-14, atol=0)
    plain = 2 * delta * ((E64**2 + delta**2).sqrt() - delta)
    torch.testing.assert_close(pseudo, plain, rtol=1e-9, atol=1e-14)
    assert (pseudo <= huber).all() and (huber <= E64**2).all()
    small = torch.tensor([1e-4], dtype=torch.float32)  # where the plain form cancels
    torch.testing.assert_close(
        flow.penalty(small, "pseudo_huber", delta), small**2, rtol=1e-5, atol=0
    )


def test_weights_of_t_are_their_formulas():
    t = torch.rand(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cosmap = flow.loss_weight(t, Objective(weighting="cosmap"))
    assert cosmap is not None
    torch.testing.assert_close(cosmap, compute_loss_weighting_for_sd3("cosmap", sigmas=t))
    # min(SNR, γ) on the error of x0 = x_t - t·v
    x0, noise, _ = (each.double() for each in batch())
    for gamma in (0.5, 5.0):
        weight = flow.loss_weight(t[:4], Objective(weighting="min_snr", min_snr_gamma=gamma))
        assert weight is not None
        error = torch.full_like(x0, 0.3)
        at = t[:4, None, None]
        x_t = flow.interpolate(x0, noise, t[:4])
        predicted_x0 = x_t - at * (flow.velocity(x0, noise) + error)
        snr = (((1 - at) / at) ** 2).clamp(max=gamma)
        expected = (snr * (predicted_x0 - x0) ** 2).mean((1, 2))
        torch.testing.assert_close(weight * (error**2).mean((1, 2)), expected)
    assert flow.loss_weight(t, Objective()) is None


def test_a_weighted_loss_is_the_mean_of_weighted_samples():
    prediction, target, _ = batch()
    weight, mask = torch.tensor([0.0, 1.0, 2.0, 0.5]), torch.rand(prediction.shape[:2]) + 0.1
    for given in (None, mask):
        plain, each = flow.flow_loss(prediction, target, given)
        loss, same = flow.flow_loss(prediction, target, given, weight)
        torch.testing.assert_close(same, each)
        torch.testing.assert_close(loss, (weight * each).sum() / 4)
        torch.testing.assert_close(plain, each.mean())


def logistic_normal_density(t: np.ndarray, mean: float, std: float) -> np.ndarray:
    exponent = -((np.log(t / (1 - t)) - mean) ** 2) / (2 * std**2)
    return np.exp(exponent) / (std * math.sqrt(2 * math.pi) * t * (1 - t))


def mode_density(t: np.ndarray, scale: float) -> np.ndarray:
    """1 / |dt/du| where t = 1 - u - scale·(cos²(πu/2) - 1 + u)."""
    u = np.linspace(0, 1, 100_001)
    along = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    slope = 1 + scale * (1 - np.pi / 2 * np.sin(np.pi * u))
    return np.interp(t, along[::-1], 1 / slope[::-1])


def density(settings: Objective, tokens: int, t: np.ndarray) -> np.ndarray:
    if settings.timestep_sampling == "uniform":
        return np.ones_like(t)
    if settings.timestep_sampling == "mode":
        return mode_density(t, settings.mode_scale)
    flux = 0.5 + 0.65 * (min(tokens, 4096) - 256) / 3840
    # s·t / (1 + (s - 1)·t) adds log s to the logit.
    moved = {"logit_normal": 0.0, "shift": math.log(settings.shift), "flux": flux}
    return logistic_normal_density(
        t, settings.logit_mean + moved[settings.timestep_sampling], settings.logit_std
    )


CASES: list[tuple[dict[str, Any], int]] = [
    ({"timestep_sampling": "flux"}, 256),
    ({"timestep_sampling": "flux"}, 4096),
    ({"timestep_sampling": "flux"}, 9216),
    ({"timestep_sampling": "flux", "logit_mean": 0.5, "logit_std": 0.7}, 2304),
    ({"timestep_sampling": "uniform"}, 256),
    ({"timestep_sampling": "logit_normal"}, 256),
    ({"timestep_sampling": "logit_normal", "logit_mean": -0.5, "logit_std": 1.4}, 256),
    ({"timestep_sampling": "shift", "shift": 2.5}, 256),
    ({"timestep_sampling": "shift", "shift": 0.4, "logit_mean": 0.5}, 256),
    ({"timestep_sampling": "mode"}, 256),
    ({"timestep_sampling": "mode", "mode_scale": -0.8}, 256),
]


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("changes", "tokens"), CASES)
def test_a_large_sample_has_the_density(
    changes: dict[str, Any], tokens: int, stratified: bool
) -> None:
    settings = Objective(**changes)
    z = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(5))
    if stratified:
        z = flow.stratified(z, [place % 8 for place in range(SAMPLES)], 8)
    t = flow.timesteps(z, settings, tokens)
    assert t.dtype == torch.float32
    assert 0 <= t.min() < t.max() <= 1
    grid = np.linspace(0, 1, 200_001)[1:-1]
    heights = density(settings, tokens, grid)
    below = np.concatenate([[0.0], np.cumsum((heights[1:] + heights[:-1]) / 2 * np.diff(grid))])
    assert below[-1] == pytest.approx(1, abs=1e-3)
    found = np.searchsorted(np.sort(t.numpy()), grid) / SAMPLES
    assert np.abs(found - below).max() < KOLMOGOROV


@pytest.mark.parametrize(("changes", "tokens"), CASES)
def test_t_rises_with_its_deviate(changes: dict[str, Any], tokens: int) -> None:
    z = torch.linspace(-4, 4, 801)
    assert (flow.timesteps(z, Objective(**changes), tokens).diff() >= 0).all()


@pytest.mark.parametrize(("scheme", "changes"), [
    ("logit_normal", {"logit_mean": 0.3, "logit_std": 0.8}), ("mode", {"mode_scale": 1.29}), ("none", {}),
])  # fmt: skip
def test_diffusers_draws_the_same_from_the_same_numbers(
    scheme: str, changes: dict[str, float]
) -> None:
    theirs = compute_density_for_timestep_sampling(
        scheme,
        64,
        **changes,
        generator=torch.Generator().manual_seed(2),
    )
    generator = torch.Generator().manual_seed(2)
    if scheme == "logit_normal":
        z = torch.randn(64, generator=generator)
    else:
        z = torch.special.ndtri(torch.rand(64, generator=generator))
    if scheme == "mode":
        z = -z  # theirs falls with its random number
    name = "uniform" if scheme == "none" else scheme
    settings = Objective(timestep_sampling=name, **changes)  # type: ignore[arg-type]
    torch.testing.assert_close(flow.timesteps(z, settings, 256), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "shift"),
    [
        *(((side // 16) ** 2, shift) for side, shift in ((512, 1.88), (768, 2.33), (1024, 3.16))),
        (256, math.exp(0.5)),
        (4096, math.exp(1.15)),
        (4097, math.exp(1.15)),
        (16384, math.exp(1.15)),
    ],
)
def test_shift_rises_between_the_points_that_define_it(tokens: int, shift: float) -> None:
    assert flow.flux_shift(tokens) == pytest.approx(shift, abs=0.005)
    assert flow.shift_of(Objective(), tokens) == flow.flux_shift(tokens)


def test_shift_stops_growing_at_the_clamp_that_is_set() -> None:
    assert flow.flux_shift(16384, max_tokens=16384) > flow.flux_shift(4096)
    z = torch.tensor([0.0])
    clamped = flow.timesteps(z, Objective(), 9216)
    assert clamped == flow.timesteps(z, Objective(), 4096)
    assert flow.timesteps(z, Objective(max_shift_tokens=9216), 9216) > clamped


def test_a_stratified_batch_has_one_t_in_each_part_of_the_distribution() -> None:
    z = torch.randn(16, generator=torch.Generator().manual_seed(7))
    moved = flow.stratified(z, range(16), 16)
    parts = torch.special.ndtr(moved.double()) * 16
    assert parts.floor().tolist() == list(range(16))
    # Within its part, a deviate is where it was in the whole.
    torch.testing.assert_close(parts.frac(), torch.special.ndtr(z.double()), rtol=0, atol=1e-5)
    assert torch.equal(flow.stratified(z[5:9], range(5, 9), 16), moved[5:9])
    torch.testing.assert_close(flow.stratified(z, [0] * 16, 1), z)
