"""Make tiny FLUX.2 model directories, offline: what tests and the smoke test train.

flux2-ds tiny --out DIR [--variant dev] [--photos FOLDER] [--size mid]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flux2_ds.data.images import UnreadableImageError, load_upright
from flux2_ds.errors import UserError, run_root
from flux2_ds.model import flow, latents

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
    """Of the transformer, and how it is fitted."""

    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    steps: int
    learning_rate: float


SIZES = {"tiny": Size(2, 3, 4, 32, 250, 2e-3), "mid": Size(4, 8, 8, 128, 1000, 3e-4)}
"""Widths of 128 and 1024: 2 and 238 million parameters. The second wants a GPU."""


def main() -> None:
    """Entry point of `flux2-ds tiny`."""
    parser = argparse.ArgumentParser(prog="flux2-ds tiny", description="Make a tiny FLUX.2 model.")
    parser.add_argument("--variant", choices=["klein", "dev"], default="klein")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the transformer")
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photos", type=Path, help="folder of images to fit the model to")
    options = parser.parse_args()
    try:
        make_tiny(options.out, options.variant, options.seed, options.photos, options.size)
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written ({error.strerror}).") from error
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"tiny FLUX.2-{options.variant}: {options.out}, {size / 1e6:.1f} MB")


def make_tiny(
    directory: Path,
    variant: Literal["klein", "dev"],
    seed: int = 0,
    photos: Path | None = None,
    size: str = "tiny",
) -> None:
    """Write a complete model directory.

    The text encoders are as deep as their pipelines' default hidden states need (30 layers for dev,
    28 for klein) and 32 wide.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"--out {directory} is not empty. Give a new directory.")
    images = [] if photos is None else load_photos(photos)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = (_klein if variant == "klein" else _dev)(SIZES[size])
        vae = pipeline.vae
        with torch.no_grad():  # a narrow posterior of fixed width: its mean carries the image
            vae.quant_conv.weight[32:].zero_()
            vae.quant_conv.bias[32:].fill_(2 * np.log(POSTERIOR_STD))
        if images:
            fit_vae(vae, images)
            fit_transformer(pipeline.transformer, vae, images, *SIZES[size][-2:])
        else:
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


def fit_vae(vae: AutoencoderKLFlux2, photos: list[torch.Tensor], steps: int = 200) -> None:
    """Fit a small VAE to photographs ([3, H, W] in [-1, 1]) and measure its latent statistics.

    Plain reconstruction of random 64 px crops, with a little noise on the latents so that their scale
    matters.
    """
    _start_as_average_colors(vae)

    def loss() -> torch.Tensor:
        crops = _crops(photos, 2, 64)
        mean = vae.encode(crops).latent_dist.mode()
        error = vae.decode(mean + POSTERIOR_STD * torch.randn_like(mean)).sample - crops
        return error.abs().mean() + error.square().mean()

    _fit(vae, loss, steps, 1e-3, (0.9, 0.95))
    patches = Flux2Pipeline._patchify_latents(_encode(vae, _crops(photos, 32, 128)))
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)))


def fit_transformer(
    transformer: Flux2Transformer2DModel,
    vae: AutoencoderKLFlux2,
    photos: list[torch.Tensor],
    steps: int,
    learning_rate: float,
) -> None:
    """Teach a small transformer to denoise the photographs in black and white, without any text; on a
    GPU if there is one.

    An adapter needs a base that denoises, and something to add to it: here, color.
    """
    device, batch = torch.device("cuda" if torch.cuda.is_available() else "cpu"), 8
    transformer.to(device)
    gray = [photo.mean(0, keepdim=True).expand(3, -1, -1) for photo in photos]
    encoded = torch.cat([_encode(vae, _crops(gray, 16, 128)) for _ in range(16)])
    tokens = latents.to_tokens(encoded, *latents.statistics(vae)).to(device)
    text = torch.zeros(batch, 4, transformer.config.joint_attention_dim, device=device)
    guided = transformer.config.guidance_embeds

    def loss() -> torch.Tensor:
        x0 = tokens[torch.randint(len(tokens), (batch,))]
        noise, t = torch.randn_like(x0), torch.rand(batch, device=device)
        prediction = transformer(
            hidden_states=flow.interpolate(x0, noise, t),
            encoder_hidden_states=text,
            timestep=t,
            img_ids=latents.image_ids(128, 128, device),
            txt_ids=latents.text_ids(text.shape[1], device),
            guidance=torch.ones(batch, device=device) if guided else None,
        ).sample
        return flow.flow_loss(prediction, flow.velocity(x0, noise))

    _fit(transformer, loss, steps, learning_rate, (0.9, 0.999))
    transformer.to("cpu")


def _fit(
    model: nn.Module,
    loss: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
    betas: tuple[float, float],
) -> None:
    adam = torch.optim.AdamW(model.parameters(), learning_rate, betas, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, learning_rate, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        value = loss()
        adam.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()


@torch.no_grad()
def _encode(vae: AutoencoderKLFlux2, images: torch.Tensor) -> torch.Tensor:
    return vae.encode(images).latent_dist.mode()


@torch.no_grad()
def _start_as_average_colors(vae: AutoencoderKLFlux2) -> None:
    """Let the fit begin as a codec of average colors: 22.1 dB on its photographs after 200 steps,
    where the usual random start gives some gray 18 dB after 300.

    Residual branches begin at zero and every convolution as the identity, except the encoder's three
    downsampling ones: these average R, G and B and fill the other channels with orthogonal mixtures.
    """
    encoder, decoder = vae.encoder, vae.decoder
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            if module.conv_shortcut is not None:
                nn.init.dirac_(module.conv_shortcut.weight)
        elif isinstance(module, Attention):
            module.to_out[0].weight.zero_()
    for conv in (
        *(encoder.conv_in, encoder.conv_out, vae.quant_conv, vae.post_quant_conv),
        *(decoder.conv_in, decoder.conv_out),
        *(block.upsamplers[0].conv for block in decoder.up_blocks[:3]),
    ):
        nn.init.dirac_(conv.weight)
    for block in encoder.down_blocks[:3]:
        weight = block.downsamplers[0].conv.weight
        kernel = nn.init.orthogonal_(torch.empty_like(weight[..., :2, :2]), gain=2**0.5)
        kernel[:3] = 0
        kernel[range(3), range(3)] = 1 / 4
        weight.zero_()[..., :2, :2] = kernel


def load_photos(folder: Path) -> list[torch.Tensor]:
    """Photographs at two sizes, [3, H, W] in [-1, 1]."""
    photos = []
    for path in sorted(folder.glob("*.[jp][pn]g")):
        try:
            image = load_upright(str(path))
        except UnreadableImageError as error:
            raise UserError(f"--photos: {path} cannot be read ({error}).") from error
        for short in (128, 256):
            scale = short / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))
            photos.append(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    if not photos:
        raise UserError(f"--photos {folder} holds no .jpg or .png images. Give another folder.")
    return photos


def _crops(photos: list[torch.Tensor], count: int, side: int) -> torch.Tensor:
    """Random square crops, [count, 3, side, side]."""
    crops = []
    for number in torch.randint(len(photos), (count,)):
        photo = photos[int(number)]
        top = int(torch.randint(photo.shape[1] - side + 1, ()))
        left = int(torch.randint(photo.shape[2] - side + 1, ()))
        crops.append(photo[:, top : top + side, left : left + side])
    return torch.stack(crops)


if __name__ == "__main__":
    run_root(main)
