"""The transformer: loading, exact timesteps, adapters, and what of it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.modeling_utils import no_init_weights
from peft import LoraConfig
from torch import nn

from flux2_ds.config.model_spec import Spec, target_modules
from flux2_ds.config.recipe import Lora, Recipe
from flux2_ds.model.lora import LoraLinear
from flux2_ds.ops.quantized_linear import QuantizedLinear

ADAPTER = "default"


def build_transformer(directory: Path) -> Flux2Transformer2DModel:
    """`directory`/transformer as its config.json describes it, the weights left undefined."""
    config = Flux2Transformer2DModel.load_config(directory, subfolder="transformer")
    with no_init_weights():
        model = Flux2Transformer2DModel.from_config(config)
    keep_timestep_exact(model)
    return model


def new_transformer(spec: Spec) -> Flux2Transformer2DModel:
    """A transformer of the spec's shapes, initialised as torch does."""
    return Flux2Transformer2DModel(
        num_layers=spec.double_blocks,
        num_single_layers=spec.single_blocks,
        num_attention_heads=spec.heads,
        attention_head_dim=spec.head_dim,
        joint_attention_dim=spec.text_width,
        axes_dims_rope=(spec.head_dim // 4,) * 4,
        guidance_embeds=spec.guidance,
    )


def keep_timestep_exact(model: Flux2Transformer2DModel) -> None:
    """Let fp32 inputs reach the timestep embedding, in a model of lower precision.

    diffusers casts t to the dtype of `hidden_states` before it multiplies by 1000; in bf16 a t of
    0.7771 reaches the sinusoids as 776. Given `hidden_states` and t in fp32, t stays exact up to its sinusoids, and these
    hooks cast what enters the first linears to the dtype of their weights.
    """

    def cast_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        weight = next(module.parameters())
        return (args[0].to(weight.dtype), *args[1:])

    embed = model.time_guidance_embed
    for module in (
        model.x_embedder,
        model.context_embedder,
        embed.timestep_embedder,
        embed.guidance_embedder,
    ):
        if module is not None:
            module.register_forward_pre_hook(cast_input)


def lora_config(spec: Spec, settings: Lora, *, dora: bool) -> LoraConfig:
    """PEFT's description of the adapter; A is drawn from N(0, 1/r²), B is zero."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_modules(spec, settings.targets),
        init_lora_weights="gaussian",
        use_dora=dora,
    )


def make_trainable(model: Flux2Transformer2DModel, spec: Spec, recipe: Recipe) -> None:
    """Make what the recipe trains need gradients: all weights, or an adapter, which is added."""
    if recipe.method == "full":
        model.requires_grad_(True)
    else:
        dora = recipe.method == "dora"
        add_lora(model, lora_config(spec, recipe.lora, dora=dora), recipe.seed)


def add_lora(model: Flux2Transformer2DModel, config: LoraConfig, seed: int) -> None:
    """Freeze the base and add an adapter in fp32, initialised from `seed` alone.

    Raises:
        ValueError: a target name did not match a module, so that fewer linears were adapted.
    """
    model.requires_grad_(False)
    targeted = len(config.target_modules)  # PEFT shortens the list when it injects
    config._register_custom_module({nn.Linear: LoraLinear, QuantizedLinear: LoraLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            # PEFT does not know QuantizedLinear, which LoraLinear is made for.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            model.add_adapter(config, adapter_name=ADAPTER)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    adapted = sum(1 for name in trainable(model) if name.endswith(f"lora_A.{ADAPTER}.weight"))
    if adapted != targeted:
        raise ValueError(f"{adapted} linears adapted, {targeted} targeted")


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


def exported_name(name: str) -> str:
    """A parameter's name in an adapter file: PEFT's, without the adapter's own name."""
    return name.replace(f".{ADAPTER}.weight", ".weight")


def exported_settings(lora: Lora) -> Lora:
    """The settings that an adapter file is used with; its A has been multiplied by alpha / rank."""
    # Programs that do not read the file's metadata take alpha to be the rank. And diffusers leaves an
    # adapter that it loads in training mode, where dropout is at work.
    return replace(lora, alpha=None, dropout=0.0)
