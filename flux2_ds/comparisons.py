"""What `bench` compares the recipe's step with: the same in plain torch, and diffusers' example."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional

from flux2_ds import optimizers
from flux2_ds.data.buckets import Bucket
from flux2_ds.data.loader import MicroBatch
from flux2_ds.model import latents, transformer
from flux2_ds.model.random_weights import empty_transformer, fill_randomly
from flux2_ds.objective import FlowObjective
from flux2_ds.recipe import Recipe
from flux2_ds.spec import TEXT_TOKENS, TOKEN_CHANNELS, Spec
from flux2_ds.targets import target_modules

Step = Callable[[], torch.Tensor]
"""One step; returns its loss."""


def bare_step(
    model: nn.Module, recipe: Recipe, objective: FlowObjective, batches: list[MicroBatch]
) -> Step:
    """The recipe's step in plain torch, on the same model."""
    trained = list(transformer.trainable(model).values())
    forward = transformer.predictor(model)
    adam = optimizers.build(recipe.optimizer, trained, fused=objective.device.type == "cuda")

    def step() -> torch.Tensor:
        for batch in batches:
            loss = objective.loss(forward, batch)
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.optimizer.max_grad_norm or math.inf)
        adam.step()
        adam.zero_grad()
        return loss.detach()

    return step


def diffusers_step(spec: Spec, recipe: Recipe, bucket: Bucket, device: torch.device) -> Step:
    """The step of diffusers' LoRA example for FLUX.2, one micro-batch: bf16 base, PEFT, gradient
    checkpointing, autocast, fused AdamW."""
    model = empty_transformer(spec)
    fill_randomly(model, torch.bfloat16, None, device)
    model.requires_grad_(False)
    names = target_modules(spec, recipe.lora.targets)
    rank = recipe.lora.rank
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    model.enable_gradient_checkpointing()
    model.train()
    on_card = device.type == "cuda"
    adam = torch.optim.AdamW(trained, lr=recipe.optimizer.learning_rate, fused=on_card)
    size = recipe.batch.micro_size
    tokens = torch.randn(size, bucket.tokens, TOKEN_CHANNELS, device=device)
    text = torch.randn(size, TEXT_TOKENS, spec.text_width, device=device, dtype=torch.bfloat16)
    guidance = torch.ones(size, device=device) if spec.guidance else None

    def step() -> torch.Tensor:
        noise = torch.randn_like(tokens)
        t = torch.rand(size, device=device)
        mixed = torch.lerp(tokens, noise, t[:, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            prediction = model(
                hidden_states=mixed.bfloat16(),
                encoder_hidden_states=text,
                timestep=t,
                img_ids=latents.image_ids(bucket.height, bucket.width, device),
                txt_ids=latents.text_ids(TEXT_TOKENS, device),
                guidance=guidance,
                return_dict=False,
            )[0]
        loss = functional.mse_loss(prediction.float(), noise - tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()
        return loss.detach()

    return step
