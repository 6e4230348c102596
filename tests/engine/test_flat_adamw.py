"""AdamW over flat tensors beside torch's own."""

import pytest
import torch

from flux2_ds.engine import flat_adamw

CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CARD])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("passing", ["nothing", "states", "gradients too"])
@pytest.mark.parametrize("loaded", [False, True])
def test_updates_are_torchs(device, dtype, passing, loaded, monkeypatch):
    """In pieces, from gradients in their own dtype, compiled on a card. `loaded`: the state is there before the first
    update, as when a run is resumed. A factor that is NaN changes nothing."""
    monkeypatch.setattr(flat_adamw, "_AT_ONCE", 400)
    monkeypatch.setattr(flat_adamw, "_PASSING", 150)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator)
    settings = {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3}
    theirs_on, ours_on = device, device if passing == "nothing" else "cpu"
    masters = [torch.nn.Parameter(start.to(on, copy=True)) for on in (theirs_on, ours_on)]
    optimizers = theirs, ours = [torch.optim.AdamW([master], **settings) for master in masters]
    if loaded:
        ours.state[masters[1]] = flat_adamw.adamw_state(masters[1])
    weights = torch.empty(1000, dtype=dtype, device=device)

    def update(gradient, factor):
        flat_adamw.update(
            ours, 0, gradient, torch.tensor(factor, dtype=torch.float64, device=device), weights,
            compiled=device == "cuda", passing=passing != "nothing",
        )  # fmt: skip
        return [
            weights.clone(),
            masters[1].detach().clone(),
            *map(torch.clone, ours.state[masters[1]].values()),
        ]

    for step in range(4):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 * 0.9**step
        gradient = torch.randn(1000, generator=generator).to(dtype)
        masters[0].grad = gradient.to(device).float() * 0.25
        theirs.step()
        given = gradient.float() if passing == "gradients too" else gradient.to(device)
        updated = update(given, 0.25)
        assert all(map(torch.equal, updated, update(given, torch.nan)))
        assert torch.equal(weights.cpu(), masters[1].detach().cpu().to(dtype))
        torch.testing.assert_close(masters[1].cpu(), masters[0].cpu(), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(masters[1].cpu(), start, atol=1e-2)
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        found, expected = ours.state[masters[1]][kind], theirs.state[masters[0]][kind]
        torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-5, atol=1e-6)
