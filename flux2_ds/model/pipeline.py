"""The diffusers pipeline of a model directory in two halves: one encodes text, the other renders.

The parts are loaded one by one and given to the pipeline's constructor. `from_pretrained` of the whole
would insist on `PixtralProcessor` for dev, which transformers offers only beside torchvision; without
images in the prompt that processor does nothing but call the tokenizer, which is loaded from the
same directory with the same chat template.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import nn
from transformers import BitsAndBytesConfig

from flux2_ds.config.model_spec import PADDING_SIDES, Spec
from flux2_ds.errors import UserError

log = logging.getLogger("flux2_ds")

_NF4_INPUTS, _NF4_OUTPUTS = 64, 32
"""A linear's features come in multiples of these where bitsandbytes 0.50 packs nf4 for a CPU with AVX-512."""


@contextmanager
def loading(part: Path) -> Iterator[None]:
    """Refuse a part of a model that its library cannot load, whatever that does with it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{part} cannot be loaded ({type(error).__name__}: {reason[:200]}). Download the model again."
        ) from error


def load_text_pipeline(
    directory: Path,
    spec: Spec,
    dtype: torch.dtype,
    device: torch.device | None = None,
    quantization: Literal["int8", "nf4"] | None = None,
) -> Any:
    """The pipeline with text encoder and tokenizer only, for `encode_prompt`.

    With `quantization`, bitsandbytes stores the encoder's linears in 8 or 4 bits and computes in `dtype`.
    What its nf4 cannot hold on some machine stays in `dtype` on all, so that captions come out alike.
    """
    encoder_class = getattr(transformers, spec.text_encoder)
    placed: dict[str, Any] = {"device_map": {"": device}} if device is not None else {}
    if quantization == "int8":
        placed["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif quantization == "nf4":
        with loading(directory / "text_encoder"):
            narrow = _too_narrow(encoder_class, directory)
        placed["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", *narrow],
        )
    with loading(directory / "text_encoder"):
        encoder = encoder_class.from_pretrained(
            directory / "text_encoder",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **placed,
        )
    return _build(directory, spec, text_encoder=encoder, tokenizer=load_tokenizer(directory, spec))


def _too_narrow(encoder_class: Any, directory: Path) -> list[str]:
    """The encoder's linears that nf4 cannot hold: none of the released encoders'."""
    config = transformers.AutoConfig.from_pretrained(
        directory / "text_encoder", trust_remote_code=False
    )
    with torch.device("meta"):
        linears = [
            (name, module)
            for name, module in encoder_class(config).named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        ]
    narrow = [
        name
        for name, linear in linears
        if linear.in_features % _NF4_INPUTS or linear.out_features % _NF4_OUTPUTS
    ]
    if narrow:
        log.warning(
            "text encoder: %d of %d linears stay unquantized; nf4 needs multiples of %d inputs and %d outputs",
            len(narrow), len(linears), _NF4_INPUTS, _NF4_OUTPUTS,
        )  # fmt: skip
    return narrow


def load_image_pipeline(
    directory: Path,
    spec: Spec,
    transformer: Flux2Transformer2DModel,
    device: torch.device,
) -> Any:
    """The pipeline around a transformer, without text encoder: it renders from `prompt_embeds`."""
    vae = load_vae(directory, transformer.dtype)
    with loading(directory / "scheduler"):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            directory, subfolder="scheduler"
        )
    return _build(directory, spec, transformer=transformer, vae=vae.to(device), scheduler=scheduler)


def load_vae(directory: Path, dtype: torch.dtype) -> AutoencoderKLFlux2:
    """The VAE alone."""
    with loading(directory / "vae"):
        return AutoencoderKLFlux2.from_pretrained(
            directory, subfolder="vae", dtype=dtype, use_safetensors=True
        )


def _build(directory: Path, spec: Spec, **given: Any) -> Any:
    names = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    parts = dict.fromkeys(names) | given
    if spec.variant == "klein":
        index = json.loads((directory / "model_index.json").read_text())
        parts["is_distilled"] = index.get("is_distilled", False)
    pipeline = getattr(diffusers, spec.pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)  # ours says of what it is
    return pipeline


def load_tokenizer(directory: Path, spec: Spec) -> Any:
    """The tokenizer alone, padding on the side that the model was trained with.

    dev's tokenizer config names a Llama class and no side. Llama tokenizers pad left, but newer releases
    of transformers load it as a generic tokenizer, which pads right. Padding is attended to, so it
    matters.
    """
    with loading(directory / "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(
            directory / "tokenizer",
            padding_side=PADDING_SIDES[spec.pipeline],
            trust_remote_code=False,  # without it transformers asks on the terminal
        )
