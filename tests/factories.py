"""What tests of several rooms build: tensors, small models, prompts, diffusers' own pipeline."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Lora
from flux2_ds.model import transformer
from flux2_ds.model.load import place_weight
from flux2_ds.model.lora import add_lora, lora_config
from flux2_ds.model.pipeline import load_tokenizer
from flux2_ds.ops.fused_single_block import fuse_single_blocks

SPECS = {
    "klein": Spec("klein", "Flux2KleinPipeline", 2, 3, 2, 32, 48, False),
    "dev": Spec("dev", "Flux2Pipeline", 2, 3, 2, 32, 48, True),
}
ONE_OF_EACH = Spec("klein", "Flux2KleinPipeline", 1, 1, 2, 32, 64, False)
"""A block of each kind, as wide as nf4 needs."""


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(rows: int, columns: int) -> torch.Tensor:
    """A gaussian weight whose rows differ in size by up to 10⁶."""
    return gaussian(rows, columns) * torch.logspace(-4, 2, rows)[:, None]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return ((found - expected).norm() / expected.norm()).item()


def build_transformer(
    spec: Spec, dtype: torch.dtype = torch.float32, base_weights: str | None = None
) -> Flux2Transformer2DModel:
    """A small transformer, the same each time."""
    torch.manual_seed(0)
    model = transformer.new_transformer(spec).to(dtype)
    for name, weight in dict(model.named_parameters()).items():
        place_weight(model, name, weight.data, base_weights)
    return model


def build_adapted(
    spec: Spec, base_weights: str | None = None, dropout: float = 0.0, dora: bool = False
) -> Flux2Transformer2DModel:
    """In bf16, with an adapter in the middle of its training and the single blocks' fused operators."""
    model = build_transformer(spec, torch.bfloat16, base_weights)
    transformer.keep_timestep_exact(model)
    settings = Lora(rank=4, targets="diffusers", dropout=dropout)
    add_lora(model, lora_config(spec, settings, "dora" if dora else "lora"), seed=0)
    for name, parameter in transformer.trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    fuse_single_blocks(model)
    return model.train()


def predict(model: Flux2Transformer2DModel, image: int = 32, text: int = 8) -> torch.Tensor:
    """The model's output for so many tokens."""
    generator = torch.Generator().manual_seed(1)
    width = model.config.joint_attention_dim
    inputs = {
        "hidden_states": torch.randn(1, image, 128, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, width, generator=generator).to(model.dtype),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cartesian_prod(*map(torch.arange, (1, image // 8, 8, 1))).float(),
        "txt_ids": torch.zeros(text, 4),
    }
    device = model.x_embedder.weight.device
    return model(**{name: x.to(device) for name, x in inputs.items()}, return_dict=False)[0]


def rendered(spec: Spec, caption: str) -> str:
    """The prompt as the model is meant to read it, written out."""
    if spec.variant == "klein":
        return (
            f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
    assert "\n" in SYSTEM_MESSAGE
    system = f"[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT]"
    return f"<s>{system}[INST]{caption.replace('[IMG]', '')}[/INST]"


def load_pipeline(directory: Path, spec: Spec, dtype: torch.dtype) -> Any:
    """diffusers' whole pipeline, but for the tokenizer: dev's `PixtralProcessor` needs torchvision."""
    pipeline = getattr(diffusers, spec.pipeline).from_pretrained(
        directory, tokenizer=None, dtype=dtype
    )
    pipeline.tokenizer = load_tokenizer(directory, spec)
    return pipeline
