"""Flow matching against closed forms in float64."""

import math

import pytest
import torch

from flux2_ds import flow

DISTRIBUTIONS = ["flux", "uniform", "logit_normal", "shift"]


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
def test_shift_rises_between_the_points_that_define_it(tokens, shift):
    assert flow.flux_shift(tokens) == pytest.approx(shift, abs=0.005)


def test_shift_stops_growing_at_the_clamp_that_is_set():
    assert flow.flux_shift(16384, max_tokens=16384) > flow.flux_shift(4096)
    assert flow.flux_shift(2048, max_tokens=1024) == flow.flux_shift(1024)
    z = torch.tensor([0.0])
    clamped = flow.timesteps(z, "flux", image_tokens=9216)
    assert clamped == flow.timesteps(z, "flux", image_tokens=4096)
    assert flow.timesteps(z, "flux", image_tokens=9216, max_shift_tokens=9216) > clamped


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7)])
@pytest.mark.parametrize("tokens", [256, 2304, 9216])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_timesteps_have_their_distribution(distribution, tokens, mean, std):
    """P(T <= t) of the t that deviate z gives is Φ(z): undo the shift, the sigmoid, the normal."""
    z = torch.linspace(-5, 5, 1001)
    t = flow.timesteps(z, distribution, image_tokens=tokens, mean=mean, std=std, shift=2.5)
    assert t.dtype == torch.float32
    assert 0 <= t.min() < t.max() <= 1
    assert (t.diff() >= 0).all()

    t = t.double()
    if distribution == "uniform":
        probability = t
    else:
        flux = math.exp(0.5 + 0.65 * (min(tokens, 4096) - 256) / 3840)
        s = {"flux": flux, "shift": 2.5, "logit_normal": 1.0}[distribution]
        base = t / (s - (s - 1) * t)
        probability = torch.special.ndtr((torch.log(base / (1 - base)) - mean) / std)
    torch.testing.assert_close(probability, torch.special.ndtr(z.double()), rtol=0, atol=1e-6)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, 4, 6, 128, generator=generator)
    return x0, noise, torch.tensor([0.0, 0.25, 0.9, 1.0])


def test_path_leads_from_the_picture_to_the_noise():
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
    loss = flow.flow_loss(prediction, target)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    differences = (prediction.double() - target.double()).flatten().tolist()
    expected = math.fsum(d * d for d in differences) / len(differences)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
