"""The transformer: how it is built, exact timesteps, and what of it is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Recipe
from flux2_ds.model.lora import add_lora, lora_config
from flux2_ds.ops.fp8_linear import Fp8Linear


def build_transformer(directory: Path) -> Flux2Transformer2DModel:
    """`directory`/transformer as its config.json describes it, the weights undefined."""
    config = Flux2Transformer2DModel.load_config(directory, subfolder="transformer")
    with no_init_weights():
        model = Flux2Transformer2DModel.from_config(config)
    keep_timestep_exact(model)
    return model


def new_transformer(spec: Spec) -> Flux2Transformer2DModel:
    """A transformer of the spec's shapes, initialized as torch does."""
    return Flux2Transformer2DModel(
        num_layers=spec.double_blocks,
        num_single_layers=spec.single_blocks,
        num_attention_heads=spec.heads,
        attention_head_dim=spec.head_dim,
        joint_attention_dim=spec.text_width,
        axes_dims_rope=(spec.head_dim // 4,) * 4,
        guidance_embeds=spec.guidance,
    )


def empty_transformer(spec: Spec) -> Flux2Transformer2DModel:
    """A transformer of the spec's shapes on the meta device."""
    with torch.device("meta"), no_init_weights():
        return new_transformer(spec)


def keep_timestep_exact(model: Flux2Transformer2DModel) -> None:
    """Let fp32 inputs reach the timestep embedding in a model of lower precision.

    diffusers casts t to the dtype of `hidden_states` before it multiplies by 1000; in bf16 a t of
    0.7771 reaches the sinusoids as 776. Given `hidden_states` and t in fp32, t stays exact up to its
    sinusoids, and these hooks cast what enters the first linears to the dtype of their weights.
    """

    def cast_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        weight = next(module.parameters())
        return (args[0].to(weight.dtype), *args[1:])

    embed = model.time_guidance_embed
    first = (model.x_embedder, model.context_embedder, embed.timestep_embedder)
    for module in (*first, embed.guidance_embedder):
        if module is not None:
            module.register_forward_pre_hook(cast_input)


def make_trainable(model: Flux2Transformer2DModel, spec: Spec, recipe: Recipe) -> None:
    """Let what the recipe trains have gradients: all weights, or an adapter, which is added."""
    if recipe.method == "full":
        model.requires_grad_(True)
        if recipe.compute == "fp8":
            multiply_in_fp8(model)
    else:
        add_lora(model, lora_config(spec, recipe.lora, recipe.method), recipe.seed)


def multiply_in_fp8(model: Flux2Transformer2DModel) -> None:
    """Multiply the linears of all blocks but the first and the last in fp8, forward and backward. Parameters, their
    names and hooks stay."""
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    for block in blocks[1:-1]:
        for module in block.modules():
            if type(module) is nn.Linear:
                module.__class__ = Fp8Linear


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def predictor(model: nn.Module) -> Callable[..., torch.Tensor]:
    """The model as a function of named inputs that returns the prediction alone."""

    def predict(**inputs: Any) -> torch.Tensor:
        prediction: torch.Tensor = model(**inputs, return_dict=False)[0]
        return prediction

    return predict


def compute_dtype(precision: Literal["bf16", "fp16", "fp32"]) -> torch.dtype:
    """The dtype that a recipe's `precision` names."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
