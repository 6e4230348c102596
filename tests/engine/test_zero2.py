"""AdamW's one pass over flat tensors beside torch's own."""

from contextlib import nullcontext

import pytest
import torch

from flux2_ds.engine import zero2

CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CARD])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loaded", [False, True])
def test_one_pass_is_torchs_adamw(device, dtype, loaded, monkeypatch):
    """Over pieces of a tensor, from gradients in their own dtype. `loaded`: torch's step made the state, as when a run
    is resumed. Compiled on a card, where the compiler is at hand."""
    monkeypatch.setattr(zero2, "_AT_ONCE", 400)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator).to(device)
    settings = {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3, "fused": True}
    masters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = theirs, ours = [torch.optim.AdamW([master], **settings) for master in masters]
    weights = torch.empty(1000, dtype=dtype, device=device)
    eager = torch.compiler.set_stance("force_eager") if device == "cpu" else nullcontext()
    with eager, torch.no_grad():
        for step in range(4):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 1e-2 * 0.9**step
            gradient = torch.randn(1000, generator=generator).to(device, dtype)
            masters[0].grad = gradient.float() * 0.25
            theirs.step()
            if loaded and step == 0:
                masters[1].grad = masters[0].grad
                ours.step()
                continue
            zero2._adamw(ours, 0, gradient, 0.25, weights)
            assert torch.equal(weights, masters[1].to(dtype))
            torch.testing.assert_close(masters[1], masters[0], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(masters[1], start, atol=1e-2)
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        found, expected = (
            o.state[m][kind] for o, m in zip((ours, theirs), masters[::-1], strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8, check_device=False)
