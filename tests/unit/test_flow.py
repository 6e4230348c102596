"""Flow matching against closed forms and float64."""

import math

import pytest
import torch

from flux2_ds import flow

DISTRIBUTIONS = ["flux", "uniform", "logit_normal", "shift"]


def logit(t: torch.Tensor) -> torch.Tensor:
    return torch.log(t) - torch.log1p(-t)


def cdf_of(distribution: str, t: torch.Tensor, *, mean: float, std: float, s: float):
    """P(T <= t) in float64: undo the shift, then the sigmoid, then look up the normal."""
    if distribution == "uniform":
        return t
    if distribution != "logit_normal":
        t = t / (s - (s - 1) * t)
    return torch.special.ndtr((logit(t) - mean) / std)


@pytest.mark.parametrize(("side", "shift"), [(512, 1.88), (768, 2.33), (1024, 3.16)])
def test_shift_of_square_pictures(side, shift):
    assert flow.flux_shift((side // 16) ** 2) == pytest.approx(shift, abs=0.005)


def test_shift_passes_through_the_two_points_that_define_it():
    assert flow.flux_shift(256) == pytest.approx(math.exp(0.5))
    assert flow.flux_shift(4096) == pytest.approx(math.exp(1.15))


def test_shift_stops_growing_at_the_clamp():
    assert flow.flux_shift(4096) == flow.flux_shift(4097) == flow.flux_shift(16384)
    assert flow.flux_shift(16384, max_tokens=16384) > flow.flux_shift(4096)
    assert flow.flux_shift(2048, max_tokens=1024) == flow.flux_shift(1024)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_timesteps_have_their_distribution(distribution, mean, std):
    deviates = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    t = flow.timesteps(deviates, distribution, image_tokens=2304, mean=mean, std=std, shift=2.5)
    assert t.dtype == torch.float32
    assert t.min() >= 0
    assert t.max() <= 1

    s = 2.5 if distribution == "shift" else math.exp(0.5 + 0.65 * (2304 - 256) / 3840)
    ordered = t.double().sort().values
    empirical = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    expected = cdf_of(distribution, ordered, mean=mean, std=std, s=s)
    assert (expected - empirical).abs().max() < 0.01


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 9216])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_timesteps_agree_with_float64(distribution, tokens):
    z = torch.linspace(-5, 5, 1001)
    t = flow.timesteps(z, distribution, image_tokens=tokens, mean=0.25, std=0.8, shift=3.0)
    for deviate, found in zip(z.tolist(), t.tolist(), strict=True):
        base = 1 / (1 + math.exp(-(0.25 + 0.8 * deviate)))
        s = math.exp(0.5 + 0.65 * (min(tokens, 4096) - 256) / 3840)
        expected = {
            "uniform": 0.5 * math.erfc(-deviate / math.sqrt(2)),
            "logit_normal": base,
            "shift": 3 * base / (1 + 2 * base),
            "flux": s * base / (1 + (s - 1) * base),
        }[distribution]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_clamp_of_the_shift_is_a_setting():
    z = torch.tensor([0.0])
    clamped = flow.timesteps(z, "flux", image_tokens=9216)
    free = flow.timesteps(z, "flux", image_tokens=9216, max_shift_tokens=9216)
    assert free > clamped
    assert clamped == flow.timesteps(z, "flux", image_tokens=4096)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_more_deviate_is_more_noise(distribution):
    t = flow.timesteps(torch.linspace(-4, 4, 100), distribution, image_tokens=1024)
    assert (t.diff() > 0).all()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, 4, 6, 128, generator=generator)
    return x0, noise, torch.tensor([0.0, 0.25, 0.9, 1.0])


def test_interpolation_agrees_with_float64():
    x0, noise, t = batch()
    expected = torch.stack(
        [
            (1 - time) * clean + time * noisy
            for clean, noisy, time in zip(x0.double(), noise.double(), t.tolist(), strict=True)
        ]
    )
    found = flow.interpolate(x0, noise, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_ends_of_the_path_are_picture_and_noise():
    x0, noise, t = batch()
    path = flow.interpolate(x0, noise, t)
    assert torch.equal(path[0], x0[0])
    assert torch.equal(path[3], noise[3])


def test_velocity_is_the_derivative_of_the_path():
    x0, noise, _ = (each.double() for each in batch())
    early, late = torch.full((4,), 0.25).double(), torch.full((4,), 0.75).double()
    slope = (flow.interpolate(x0, noise, late) - flow.interpolate(x0, noise, early)) / 0.5
    torch.testing.assert_close(flow.velocity(x0, noise), slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_unweighted_mean_in_fp32(dtype):
    x0, noise, _ = batch()
    prediction, target = x0.to(dtype), noise
    loss = flow.flow_loss(prediction, target)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    differences = (prediction.double() - target.double()).flatten().tolist()
    assert loss.item() == pytest.approx(
        math.fsum(d * d for d in differences) / len(differences), rel=1e-5
    )
