"""A whole training step, loss and LoRA gradients, against one written from diffusers' classes alone."""

import pytest
import torch
from diffusers import Flux2KleinPipeline
from peft import LoraConfig
from test_transformer import SPECS, build

from flux2_ds.data.buckets import Bucket
from flux2_ds.data.loader import MicroBatch
from flux2_ds.model import transformer
from flux2_ds.objective import FlowObjective
from flux2_ds.recipe import Lora, Objective


def adapted(variant: str) -> torch.nn.Module:
    spec = SPECS[variant]
    model = build(spec)
    transformer.add_lora(model, transformer.lora_config(spec, Lora(rank=4), dora=False), seed=0)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in transformer.trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return model


@pytest.mark.parametrize("variant", SPECS)
def test_loss_and_gradients_match_a_step_written_out(variant: str) -> None:
    spec = SPECS[variant]
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(2, 32, 6, 8, generator=generator)
    mean, std = torch.randn(128, generator=generator), torch.rand(128, generator=generator) + 0.5
    text = torch.randn(2, 7, 48, generator=generator)
    noise = torch.randn(2, 12, 128, generator=generator)
    deviates = torch.tensor([0.3, -1.2])

    ours = adapted(variant)
    objective = FlowObjective(
        Objective(), mean, std, torch.float32, spec.guidance, torch.device("cpu")
    )
    batch = MicroBatch(Bucket(48, 64), [], raw, text, noise, deviates)
    loss = objective.loss(lambda **given: ours(**given, return_dict=False)[0], batch)
    loss.backward()

    # The same step from diffusers' public classes and the formulas, nothing of ours.
    theirs = build(spec)
    theirs.requires_grad_(False)
    names = [n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)]
    blocks = [n for n in names if "transformer_blocks" in n]
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=blocks))
    theirs.load_state_dict(ours.state_dict())
    patches = Flux2KleinPipeline._patchify_latents(raw)
    x0 = ((patches.double() - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).flatten(2).mT
    s = torch.tensor(0.5 + 0.65 * (12 - 256) / 3840, dtype=torch.float64).exp()
    t = torch.sigmoid(deviates.double())
    t = s * t / (1 + (s - 1) * t)
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    prediction = theirs(
        hidden_states=x_t.float(),
        encoder_hidden_states=text,
        timestep=t.float(),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(patches),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(text),
        guidance=torch.full((2,), 1.0) if spec.guidance else None,
    ).sample
    expected = torch.nn.functional.mse_loss(prediction, (noise - x0).float())
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in transformer.trainable(ours).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-7, msg=name)
