"""Make tiny FLUX.2 model directories with random weights, offline, for tests.

flux2-ds tiny --out DIR [--variant dev] [--size mid]
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flux2_ds.errors import Arguments, UserError, run_root

POSTERIOR_STD = 0.05
"""Of the VAE's latents, whatever the image."""
TEXT_WIDTH, VOCABULARY = 32, 512
SENTENCES = [
    "A close-up photograph of a cat with green eyes looking past the camera.",
    "A mountain meadow in autumn under a wide blue sky, with yellow grass and distant peaks.",
    "Render the text OPEN in red letters on a white wall, with soft light from the left.",
    "You are an assistant that describes objects, their relationships and attributes.",
]
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set open, close = ('[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]') if message['role'] == 'system' "
    "else ('[INST]', '[/INST]') %}{{ open }}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '[IMG]' }}{% endfor %}{{ close }}{% endfor %}"
)


class Size(NamedTuple):
    """Of the transformer."""

    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int


SIZES = {"tiny": Size(2, 3, 4, 32), "mid": Size(4, 8, 8, 128)}
"""Widths of 128 and 1024: 2 and 238 million parameters."""


def main() -> None:
    """Entry point of `flux2-ds tiny`."""
    parser = Arguments(prog="flux2-ds tiny", description="Make a tiny FLUX.2 model.")
    parser.add_argument("--variant", choices=["klein", "dev"], default="klein")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the transformer")
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        make_tiny(options.out, options.variant, options.seed, options.size)
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written ({error.strerror}).") from error
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"tiny FLUX.2-{options.variant}: {options.out}, {size / 1e6:.1f} MB")


def make_tiny(
    directory: Path,
    variant: Literal["klein", "dev"],
    seed: int = 0,
    size: str = "tiny",
) -> None:
    """Write a complete model directory.

    The text encoders are as deep as their pipelines' default hidden states need (30 layers for dev,
    28 for klein) and 32 wide.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"--out {directory} is not empty. Give a new directory.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = (_klein if variant == "klein" else _dev)(SIZES[size])
        vae = pipeline.vae
        with torch.no_grad():  # a narrow posterior of fixed width: its mean carries the image
            vae.quant_conv.weight[32:].zero_()
            vae.quant_conv.bias[32:].fill_(2 * math.log(POSTERIOR_STD))
            vae.bn.running_mean.normal_(0, 0.5)
            vae.bn.running_var.uniform_(0.5, 2)
    pipeline.save_pretrained(directory, safe_serialization=True)
    if variant == "dev":
        _name_pixtral_processor(directory)


def _klein(size: Size) -> Flux2KleinPipeline:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=_byte_level_bpe(special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        padding_side="right",
        chat_template=QWEN_TEMPLATE,
    )
    config = Qwen3Config(**_language_config(layers=28), eos_token_id=2, bos_token_id=None)
    return Flux2KleinPipeline(
        **_shared_parts(size, guidance=False),
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        is_distilled=False,
    )


def _dev(size: Size) -> Flux2Pipeline:
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
               "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"]  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(special),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=MISTRAL_TEMPLATE,
    )
    config = Mistral3Config(
        text_config={"model_type": "mistral", **_language_config(layers=31)},
        vision_config={"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32,
                       "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
                       "image_size": 56, "patch_size": 14},
        image_token_index=special.index("[IMG]"),
    )  # fmt: skip
    return Flux2Pipeline(
        **_shared_parts(size, guidance=True),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=tokenizer,
    )


def _name_pixtral_processor(directory: Path) -> None:
    """Make the tokenizer directory that of a PixtralProcessor, as in the released model.

    The files are written here because transformers has the class only beside torchvision.
    """
    image_processor = {
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": {"height": 14, "width": 14},
        "size": {"longest_edge": 56},
    }
    processor = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
    index = json.loads((directory / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    for name, content in (
        ("tokenizer/processor_config.json", {**processor, "image_processor": image_processor}),
        ("tokenizer/preprocessor_config.json", image_processor),
        ("model_index.json", index),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def _language_config(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,  # embeddings of order 1, so that another caption matters
    }


def _shared_parts(size: Size, *, guidance: bool) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        "vae": AutoencoderKLFlux2(
            block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=4
        ).eval(),
        "transformer": Flux2Transformer2DModel(
            num_layers=size.double_blocks,
            num_single_layers=size.single_blocks,
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            joint_attention_dim=3 * TEXT_WIDTH,
            axes_dims_rope=(size.head_dim // 4,) * 4,
            guidance_embeds=guidance,
        ),
    }


def _byte_level_bpe(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


if __name__ == "__main__":
    run_root(main)
