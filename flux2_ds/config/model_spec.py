"""What a FLUX.2 model is: variant, dimensions, LoRA targets; read from its JSON files alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from flux2_ds.errors import UserError, shown

TEXT_TOKENS = 512
"""Length to which both pipelines pad and truncate the prompt; nothing is trimmed or masked."""
PIXELS_PER_TOKEN = 16
"""Side of the square of pixels that one image token covers: 8 (VAE) × 2 (patch)."""
TOKEN_CHANNELS = 128
"""Latent channels of one image token: 32 (VAE) × 2 × 2 (patch)."""

_PIPELINES: dict[str, tuple[Literal["dev", "klein"], str]] = {
    "Flux2Pipeline": ("dev", "Mistral3ForConditionalGeneration"),
    "Flux2KleinPipeline": ("klein", "Qwen3ForCausalLM"),
}
PADDING_SIDES = {"Flux2Pipeline": "left", "Flux2KleinPipeline": "right"}
"""Where the tokenizer pads the prompt to `TEXT_TOKENS`; docs/numerics.md says how that is known."""


@dataclass(frozen=True)
class Spec:
    """Dimensions of one FLUX.2 transformer and the pipeline that it belongs to."""

    variant: Literal["dev", "klein"]
    pipeline: str
    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    text_width: int
    guidance: bool

    @property
    def text_encoder(self) -> str:
        """Class of the text encoder in transformers."""
        return _PIPELINES[self.pipeline][1]

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim

    @property
    def blocks(self) -> int:
        """Number of blocks of both kinds."""
        return self.double_blocks + self.single_blocks

    def forward_flops(self, image_tokens: int) -> tuple[float, float]:
        """Floating-point operations of one sample's forward pass: of the blocks' linears, and of attention.

        A linear has 2 for each weight and token; of a double block's linears each token passes half.
        Attention has 4·S²·width in each block (two products).
        """
        sequence = image_tokens + TEXT_TOKENS
        linear = 2.0 * sequence * 13 * self.width**2 * self.blocks
        return linear, 4.0 * sequence**2 * self.width * self.blocks

    def step_flops(self, image_tokens: int, method: str) -> float:
        """Floating-point operations of one sample's step in the blocks, recomputation not counted.

        The backward pass of the linears takes as many as their forward pass, with method full as many
        again for the weights' gradients; that of attention 2.5 times as many. The adapter is not counted.
        """
        linear, attention = self.forward_flops(image_tokens)
        return (3 if method == "full" else 2) * linear + 3.5 * attention

    def __str__(self) -> str:
        return (
            f"FLUX.2-{self.variant}, {self.double_blocks} double + {self.single_blocks} single "
            f"blocks, width {self.width}, text width {self.text_width}"
        )


_DEV = Spec("dev", "Flux2Pipeline", 8, 48, 48, 128, 15360, guidance=True)
_KLEIN_9B = Spec("klein", "Flux2KleinPipeline", 8, 24, 32, 128, 12288, guidance=False)
_KLEIN_4B = Spec("klein", "Flux2KleinPipeline", 5, 20, 24, 128, 7680, guidance=False)
RELEASED = {
    "black-forest-labs/FLUX.2-dev": _DEV,
    "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-9B": _KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-4B": _KLEIN_4B,
}
"""Hub id -> dimensions, to plan and to benchmark without the files. Training reads the files."""
_DISTILLED = ("black-forest-labs/FLUX.2-klein-9B", "black-forest-labs/FLUX.2-klein-4B")


_SIZES = {
    "num_layers": (8, 0, 1000),
    "num_single_layers": (48, 0, 1000),
    "num_attention_heads": (48, 1, 1000),
    "attention_head_dim": (128, 1, 10_000),
    "joint_attention_dim": (15360, 1, 1_000_000),
}
"""Key of a transformer's config -> its default in Flux2Transformer2DModel, which is dev's (the released dev
config leaves out guidance_embeds), and what it may be."""


def planned_spec(path: str, revision: str | None = None) -> Spec:
    """The dimensions of `model.path`. Refuses a model that would have to be fetched."""
    if (spec := known_spec(path, revision)) is None:
        raise UserError(
            f"model.path {path!r} is no directory here, not in the Hugging Face hub's cache, and none of "
            f"{', '.join(RELEASED)}, so its size is not known. Give a directory, or run: hf download {path}"
        )
    return spec


def known_spec(path: str, revision: str | None = None) -> Spec | None:
    """The model's dimensions, if they are known without fetching it."""
    if path in RELEASED and not Path(path).is_dir():
        return RELEASED[path]
    directory = _local_directory(path, revision)
    return read_spec(directory, allow_distilled=True) if directory else None


def _local_directory(path: str, revision: str | None) -> Path | None:
    """The directory `path`, or what the hub's cache has of that model."""
    if Path(path).is_dir():
        return Path(path)
    try:
        index, config = (
            try_to_load_from_cache(path, name, revision=revision)
            for name in ("model_index.json", "transformer/config.json")
        )
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) and isinstance(config, str) else None


def is_distilled(path: str, revision: str | None) -> bool:
    """Whether the model is known to be step-distilled."""
    if directory := _local_directory(path, revision):
        return bool(read_json(directory / "model_index.json").get("is_distilled"))
    return path in _DISTILLED


def spec_here(path: str, revision: str | None, *, allow_distilled: bool) -> Spec | None:
    """The model in the directory `path`, or in the hub's cache; None for another hub id, whose model is
    recognised when it is fetched. Refuses the id of a distilled model.
    """
    if directory := _local_directory(path, revision):
        return read_spec(directory, allow_distilled=allow_distilled)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise UserError(
            f"model.path {path!r} is no directory here, and no id of the Hugging Face hub, such as "
            f"{next(iter(RELEASED))}. Correct it."
        )
    if path in _DISTILLED and not allow_distilled:
        raise _distilled(path)
    return None


def _distilled(path: str | Path) -> UserError:
    return UserError(
        f"model.path {path} is step-distilled (is_distilled in model_index.json) and "
        "collapses when trained. Use the base model, or set model.allow_distilled: true, with an assistant "
        "adapter in lora.merge_first."
    )


def read_spec(directory: Path, *, allow_distilled: bool = False) -> Spec:
    """Recognise the model in `directory` (diffusers' layout).
    Refuses parts of different families and step-distilled weights.
    """
    index = read_json(directory / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in _PIPELINES:
        raise UserError(
            f"model.path {directory} holds a {shown(pipeline)}; a Flux2Pipeline (dev) or Flux2KleinPipeline "
            "(klein) can be trained. Give the directory or hub id of such a model."
        )
    variant, encoder_class = _PIPELINES[pipeline]
    config = read_json(directory / "transformer" / "config.json")
    expected = {
        "transformer": ("Flux2Transformer2DModel", config.get("_class_name")),
        "vae": ("AutoencoderKLFlux2", _component_class(index, "vae")),
        "text_encoder": (encoder_class, _component_class(index, "text_encoder")),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", _component_class(index, "scheduler")),
    }
    for part, (wanted, found) in expected.items():
        if found != wanted:
            raise UserError(
                f"{directory}/{part} is a {shown(str(found))}; {pipeline} needs a {wanted}. Download the model "
                "again or correct model_index.json."
            )
    if index.get("is_distilled") and not allow_distilled:
        raise _distilled(directory)
    sizes = [config.get(key, default) for key, (default, _, _) in _SIZES.items()]
    for size, (key, (_, low, high)) in zip(sizes, _SIZES.items(), strict=True):
        if type(size) is not int or not low <= size <= high:
            raise UserError(
                f"{directory}/transformer/config.json: {key} is {shown(str(size))}, which no FLUX.2 has. "
                "Download the model again."
            )
    double, single, heads, head_dim, text_width = sizes
    guidance = bool(config.get("guidance_embeds", True))
    spec = Spec(variant, pipeline, double, single, heads, head_dim, text_width, guidance)
    if spec.guidance != (variant == "dev"):
        raise UserError(
            f"{directory}/transformer/config.json: guidance_embeds is {spec.guidance}, which does "
            f"not belong to {pipeline}. Transformer and pipeline are of different variants."
        )
    return spec


def _component_class(index: dict[str, Any], part: str) -> str | None:
    entry = index.get(part)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a model's directory, or a `UserError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: model.path must be a model directory in diffusers' layout "
            "(model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/)."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Download the model again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object. Download the model again.")
    return value


_ATTENTION = {
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "attn.to_out.0": (1, 1),
}
_TEXT_ATTENTION = {
    "attn.add_q_proj": (1, 1),
    "attn.add_k_proj": (1, 1),
    "attn.add_v_proj": (1, 1),
    "attn.to_add_out": (1, 1),
}
_FEED_FORWARD = {
    "ff.linear_in": (1, 6),
    "ff.linear_out": (3, 1),
    "ff_context.linear_in": (1, 6),
    "ff_context.linear_out": (3, 1),
}
DOUBLE_LINEARS = {**_ATTENTION, **_TEXT_ATTENTION, **_FEED_FORWARD}
SINGLE_LINEARS = {"attn.to_qkv_mlp_proj": (1, 9), "attn.to_out": (4, 1)}
"""Linear of a block -> its input and output features, in widths of the model."""
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "all": (tuple(DOUBLE_LINEARS), tuple(SINGLE_LINEARS)),
    "attention": ((*_ATTENTION, *_TEXT_ATTENTION), tuple(SINGLE_LINEARS)),
    "diffusers": (tuple(_ATTENTION), tuple(SINGLE_LINEARS)),
}
"""Target set -> linears of a double block, linears of a single block. `diffusers` is what its
FLUX.2 training example adapts."""


def target_modules(spec: Spec, targets: str) -> list[str]:
    """Full names of the linears that a target set adapts."""
    double, single = TARGETS[targets]
    return [f"transformer_blocks.{i}.{n}" for i in range(spec.double_blocks) for n in double] + [
        f"single_transformer_blocks.{i}.{n}" for i in range(spec.single_blocks) for n in single
    ]


def linear_shapes(spec: Spec) -> dict[str, tuple[int, int]]:
    """All linears that an adapter may change, by diffusers' names -> (N, K)."""
    width = spec.width
    blocks = (
        ("transformer_blocks", spec.double_blocks, DOUBLE_LINEARS),
        ("single_transformer_blocks", spec.single_blocks, SINGLE_LINEARS),
    )
    return {
        f"{kind}.{block}.{linear}": (rows * width, columns * width)
        for kind, count, linears in blocks
        for block in range(count)
        for linear, (columns, rows) in linears.items()
    }
