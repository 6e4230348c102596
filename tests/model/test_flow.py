"""Flow matching against closed forms in float64."""

import math

import pytest
import torch

from flux2_ds.model import flow


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
