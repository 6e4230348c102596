"""Make the demo's model: a small FLUX.2-klein that draws 48 objects on eight colors.

    python examples/demo/make_data.py
    python examples/demo/make_model.py init     # tokenizer, text encoder; the rest at random
    python examples/demo/make_model.py vae      # train the VAE
    python examples/demo/make_model.py base     # train the transformer on short prompts
    flux2-ds prepare --config examples/demo/base.yaml
    flux2-ds train   --config examples/demo/base.yaml
    flux2-ds export  --config examples/demo/base.yaml --weights ema --dtype fp32
    python examples/demo/make_model.py ship     # everything in bf16 to examples/demo/model

Most of the transformer's training is in `base`: with 64 text tokens in place of the pipeline's 512 a
sample takes a fifth of the work. flux2-ds, which never trims the text, finishes it at 512.

`init --size mid` and `base --learning-rate 3e-4` make one of 238 million parameters for `flux2-ds quality`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from catalog import COLORS, HELD_OUT, OBJECTS, caption, trained_colors
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.models.resnet import ResnetBlock2D
from make_data import EMOJI_PACKAGE, SEED, SIDE, compose, cut_out, fetch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

WIDTH = 64
"""Of the text encoder, which stays random: other words give other embeddings, and that is enough."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
SIZES = {"shipped": (1, 5, 6, 32), "mid": (4, 8, 8, 128)}
"""Of the transformer: double blocks, single blocks, heads, width of a head."""
LATENT_NOISE = 0.05
"""Added to the latents in VAE training, so that their scale matters."""
HELD_OUT_SHARE = 12
"""Every twelfth emoji, by code point, measures the VAE and is not trained on."""
TIMESTEP_MEAN, TIMESTEP_STD = 0.5, 1.2
"""t = sigmoid(N(mean, std²)), as in base.yaml."""


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["init", "vae", "base", "ship"])
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--npm", type=Path, default=Path("runs/demo/npm"), help="downloads")
    parser.add_argument("--size", choices=SIZES, default="shipped", help="of the transformer")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of the transformer")
    parser.add_argument("--vae-seconds", type=float, default=110)
    parser.add_argument("--short-seconds", type=float, default=190, help="at 64 text tokens")
    parser.add_argument("--long-seconds", type=float, default=45, help="at 512 text tokens")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--views", type=int, default=96, help="pictures of an object and a color")
    parser.add_argument("--trained", type=Path, help="transformer to ship")
    parser.add_argument("--ship", type=Path, default=Path("examples/demo/model"))
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match options.step:
        case "init":
            make_random(options.model, options.size)
        case "vae":
            emoji = fetch(EMOJI_PACKAGE, options.npm) / "assets"
            train_vae(options.model, emoji, options.vae_seconds, options.batch // 8, device)
        case "base":
            emoji = fetch(EMOJI_PACKAGE, options.npm) / "assets"
            train_base(options, emoji, device)
        case "ship":
            ship(options.model, options.trained, options.ship)


def make_random(directory: Path, size: str) -> None:
    """Write the whole pipeline: the text encoder as it will be shipped, VAE and transformer at random."""
    double_blocks, single_blocks, heads, head_dim = SIZES[size]
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=train_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        padding_side="right",
        chat_template=TEMPLATE,
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=28,  # the pipeline reads layers 9, 18 and 27
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=True,
        eos_token_id=2,
        bos_token_id=None,
    )
    text_encoder = Qwen3ForCausalLM(config)
    with torch.no_grad():
        # Another word then changes the output by as much as the output is.
        text_encoder.model.embed_tokens.weight.mul_(10)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=AutoencoderKLFlux2(
            block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=4
        ),
        transformer=Flux2Transformer2DModel(
            num_layers=double_blocks,
            num_single_layers=single_blocks,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            joint_attention_dim=3 * WIDTH,
            axes_dims_rope=(head_dim // 4,) * 4,
            guidance_embeds=False,
        ),
        text_encoder=text_encoder.bfloat16().float(),  # as it will be shipped
        tokenizer=tokenizer,
        is_distilled=False,
    )
    pipeline.save_pretrained(directory)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of the captions' words."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    names = [*OBJECTS, *HELD_OUT]
    words = [caption(name, color) for name in names for color in COLORS]
    tokenizer.train_from_iterator([*words, "user\n", "assistant\n"], trainer)
    return tokenizer


def train_vae(
    directory: Path, emoji: Path, seconds: float, batch: int, device: torch.device
) -> None:
    """Train the VAE on all emoji but those held out, for so many seconds, and measure it."""
    vae = AutoencoderKLFlux2.from_pretrained(directory / "vae").to(device)
    start_as_average_colors(vae)
    vae.to(memory_format=torch.channels_last)
    trained, held_out = vae_emoji(emoji)
    with ProcessPoolExecutor() as pool:
        cut = list(pool.map(squared, [emoji / f"{code}.webp" for code in trained], chunksize=16))
    sources = torch.from_numpy(np.stack(cut)).to(device)
    adam = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    started = time.monotonic()
    for step in itertools.count():
        done = (time.monotonic() - started) / seconds
        if done >= 1:
            break
        for group in adam.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        pictures = vae_batch(sources, batch).contiguous(memory_format=torch.channels_last)
        mean = vae.encode(pictures).latent_dist.mode()
        decoded = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample
        error = decoded - pictures
        loss = error.abs().mean() + error.square().mean()
        loss = loss + 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adam.step()
        if step % 200 == 0:
            print(f"vae step {step}, {done * seconds:.0f} s: loss {float(loss):.4f}", flush=True)
    vae.bfloat16().float()  # as it will be shipped
    measure_latents(vae, emoji, device)
    vae.to("cpu", memory_format=torch.contiguous_format).save_pretrained(directory / "vae")
    vae.to(device)
    ratios = [psnr(vae, held_out_picture(emoji, code)) for code in held_out]
    result = {"steps": step, "batch": batch, "seconds": seconds, "emoji": len(trained)}
    result |= {
        "held_out": len(ratios),
        "psnr_mean": round(float(np.mean(ratios)), 2),
        "psnr_worst": round(min(ratios), 2),
    }
    print(json.dumps(result))
    (directory / "vae.json").write_text(json.dumps(result) + "\n")


def vae_emoji(folder: Path) -> tuple[list[str], list[str]]:
    """Code points to train on, and to measure with: neither skin tones, flags nor keycaps."""
    codes = sorted(path.stem for path in folder.glob("*.webp"))
    plain = [c for c in codes if not any(part in c for part in ("1f3f", "1f1", "20e3", "200d"))]
    drawn, unseen = set(OBJECTS.values()), set(HELD_OUT.values())
    held_out = [c for c in plain[::HELD_OUT_SHARE] if c not in drawn | unseen]
    return [c for c in plain if c not in unseen.union(held_out)], held_out


def squared(path: Path) -> np.ndarray:
    """An emoji at 128 px in the middle of a square, [4, 128, 128] uint8, colors premultiplied by alpha."""
    emoji = cut_out(path).convert("RGBa")
    scale = SIDE / max(emoji.size)
    emoji = emoji.resize(
        [max(1, round(scale * side)) for side in emoji.size], Image.Resampling.LANCZOS
    )
    square = np.zeros((SIDE, SIDE, 4), np.uint8)
    top, left = (SIDE - emoji.height) // 2, (SIDE - emoji.width) // 2
    square[top : top + emoji.height, left : left + emoji.width] = np.asarray(emoji)
    return square.transpose(2, 0, 1)


def vae_batch(sources: torch.Tensor, batch: int) -> torch.Tensor:
    """Random emoji at random places on the eight colors and on others, [batch, 3, 128, 128] in [-1, 1]."""
    device = sources.device
    chosen = sources[torch.randint(len(sources), (batch,), device=device)].float() / 255
    scale = torch.empty(batch, device=device).uniform_(0.55, 1.0)
    mirrored = torch.where(torch.rand(batch, device=device) < 0.5, -1.0, 1.0)
    shift = torch.empty(batch, 2, device=device).uniform_(-0.25, 0.25)
    theta = torch.zeros(batch, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = mirrored / scale, 1 / scale, shift
    grid = nn.functional.affine_grid(theta, list(chosen.shape), align_corners=False)
    placed = nn.functional.grid_sample(chosen, grid, align_corners=False)
    plain = torch.tensor(list(COLORS.values()), device=device) / 255
    backs = plain[torch.randint(len(plain), (batch,), device=device)]
    other = torch.rand(batch, 1, device=device) < 0.3
    backs = torch.where(other, torch.rand(batch, 3, device=device), backs)[:, :, None, None]
    return 2 * (placed[:, :3] + (1 - placed[:, 3:]) * backs) - 1


@torch.no_grad()
def start_as_average_colors(vae: AutoencoderKLFlux2) -> None:
    """Let the training begin as a codec of average colors, which saves its first thousand steps.

    Residual branches begin at zero and every convolution as the identity, except the encoder's three
    downsampling ones: these average R, G and B and fill the other channels with orthogonal mixtures.
    The posterior has a fixed width.
    """
    encoder, decoder = vae.encoder, vae.decoder
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            if module.conv_shortcut is not None:
                nn.init.dirac_(module.conv_shortcut.weight)
    for block in (encoder.mid_block, decoder.mid_block):
        for attention in block.attentions:
            attention.to_out[0].weight.zero_()
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
    vae.quant_conv.weight[32:].zero_()
    vae.quant_conv.bias[32:].fill_(2 * math.log(LATENT_NOISE))


@torch.no_grad()
def measure_latents(vae: AutoencoderKLFlux2, emoji: Path, device: torch.device) -> None:
    """Set the statistics by which FLUX.2 normalizes its latents."""
    patches = [patchified(vae, pictures, device) for _, pictures in rendered(emoji, 2)]
    whole = torch.cat(patches)
    vae.bn.running_mean.copy_(whole.mean((0, 2, 3)))
    vae.bn.running_var.copy_(whole.var((0, 2, 3)))


def rendered(emoji: Path, views: int) -> Iterator[tuple[str, np.ndarray]]:
    """Captions and [views, 128, 128, 3] uint8 of every object on every color that it is trained on."""
    jobs = [(emoji, name, color, views) for name in OBJECTS for color in trained_colors(name)]
    with ProcessPoolExecutor() as pool:
        yield from pool.map(render_views, jobs, chunksize=4)


def render_views(job: tuple[Path, str, str, int]) -> tuple[str, np.ndarray]:
    """`views` pictures of an object on a color."""
    folder, name, color, views = job
    code = OBJECTS[name]
    random = np.random.default_rng((SEED, int(code, 16), list(COLORS).index(color)))
    emoji = cut_out(folder / f"{code}.webp")
    pictures = [np.asarray(compose(emoji, COLORS[color], random)) for _ in range(views)]
    return caption(name, color), np.stack(pictures)


@torch.no_grad()
def patchified(vae: AutoencoderKLFlux2, pictures: np.ndarray, device: torch.device) -> torch.Tensor:
    """[B, 128, 128, 3] uint8 to latents of 2 × 2 patches, [B, 128, 8, 8], not normalized."""
    pixels = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Flux2KleinPipeline._patchify_latents(vae.encode(pixels).latent_dist.mode())


def held_out_picture(emoji: Path, code: str) -> np.ndarray:
    """An emoji that was not trained on, on one of the colors."""
    random = np.random.default_rng((SEED, *(int(part, 16) for part in code.split("-"))))
    color = list(COLORS.values())[random.integers(len(COLORS))]
    return np.asarray(compose(cut_out(emoji / f"{code}.webp"), color, random))


@torch.no_grad()
def psnr(vae: AutoencoderKLFlux2, picture: np.ndarray) -> float:
    """Of a picture after encoding and decoding, in dB."""
    pixels = torch.from_numpy(picture.copy()).to(vae.device).permute(2, 0, 1)[None].float()
    decoded = vae.decode(vae.encode(pixels / 127.5 - 1).latent_dist.mode()).sample
    error = (decoded.clamp(-1, 1) + 1) * 127.5 - pixels
    return float(10 * torch.log10(255**2 / error.square().mean()))


def train_base(options: argparse.Namespace, emoji: Path, device: torch.device) -> None:
    """Train the transformer at 64 text tokens, then at 512, for so many seconds each."""
    pipeline = Flux2KleinPipeline.from_pretrained(options.model).to(device)
    vae, model = pipeline.vae, pipeline.transformer
    captions, tokens, owner = [], [], []
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    for text, pictures in rendered(emoji, options.views):
        normalized = (patchified(vae, pictures, device) - mean) / std
        tokens.append(pipeline._pack_latents(normalized).bfloat16())
        owner += [len(captions)] * len(pictures)
        captions.append(text)
    data, owner = torch.cat(tokens), torch.tensor(owner, device=device)
    with torch.no_grad():
        rows = [pipeline.encode_prompt([text], device=device)[0] for text in [*captions, ""]]
    texts = torch.cat(rows)
    print(f"{len(data)} pictures, {len(captions)} captions", flush=True)

    model.train()
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True)
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=options.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=device.type == "cuda",
    )
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    phases = [
        (64, options.batch, options.short_seconds),
        (512, options.batch // 4, options.long_seconds),
    ]
    total, seen, loss_sum, step = sum(seconds for *_, seconds in phases), 0, 0.0, 0
    ended = 0.0
    for length, batch, seconds in phases:
        image_ids = pipeline._prepare_latent_ids(torch.empty(1, 1, 8, 8))[0].to(device)
        text_ids = pipeline._prepare_text_ids(torch.empty(1, length, 1))[0].to(device)
        flow_step(
            model, data, texts, owner, batch, length, image_ids, text_ids
        ).backward()  # compile
        adam.zero_grad()
        started = time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds:
            rate = options.learning_rate * schedule((ended + elapsed) / total, step)
            for group in adam.param_groups:
                group["lr"] = rate
            loss = flow_step(model, data, texts, owner, batch, length, image_ids, text_ids)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            adam.zero_grad()
            weight = 1 - min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], weight)
            step, seen = step + 1, seen + batch
            loss_sum += loss.detach()
            if step % 500 == 0:
                print(
                    f"base step {step}, {length} tokens, {seen} samples, {ended + elapsed:.0f} s: "
                    f"loss {float(loss_sum) / 500:.4f}, rate {rate:.1e}",
                    flush=True,
                )
                loss_sum = 0.0
        ended += seconds
        save_average(model, average, options.model)
    result = {"steps": step, "samples": seen, "seconds": total}
    print(json.dumps(result))
    (options.model / "base.json").write_text(json.dumps(result) + "\n")


def schedule(done: float, step: int) -> float:
    """1 after a warm-up, falling to a fifth along a cosine from two fifths of the time on."""
    fall = max(0.0, (done - 0.4) / 0.6)
    return min(1, (step + 1) / 200) * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * fall)))


def flow_step(
    model: Flux2Transformer2DModel,
    data: torch.Tensor,
    texts: torch.Tensor,
    owner: torch.Tensor,
    batch: int,
    length: int,
    image_ids: torch.Tensor,
    text_ids: torch.Tensor,
) -> torch.Tensor:
    """The flow-matching loss of random pictures, a tenth of them with the empty caption."""
    device = data.device
    chosen = torch.randint(len(data), (batch,), device=device)
    x0 = data[chosen].float()
    row = torch.where(torch.rand(batch, device=device) < 0.1, len(texts) - 1, owner[chosen])
    noise = torch.randn_like(x0)
    t = torch.sigmoid(TIMESTEP_MEAN + TIMESTEP_STD * torch.randn(batch, device=device))
    mixed = t[:, None, None]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        prediction = model(
            hidden_states=(1 - mixed) * x0 + mixed * noise,
            encoder_hidden_states=texts[row, :length],
            timestep=t,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=None,
            return_dict=False,
        )[0]
    return (prediction.float() - (noise - x0)).square().mean()


def save_average(
    model: Flux2Transformer2DModel, average: list[torch.Tensor], directory: Path
) -> None:
    """Write the moving average as the pipeline's transformer."""
    fresh = Flux2Transformer2DModel.from_config(model.config)
    with torch.no_grad():
        for parameter, value in zip(fresh.parameters(), average, strict=True):
            parameter.copy_(value)
    fresh.save_pretrained(directory / "transformer")


def ship(directory: Path, trained: Path | None, target: Path) -> None:
    """Write everything in bf16, with the licenses; `trained`: a transformer's directory."""
    pipeline = Flux2KleinPipeline.from_pretrained(directory, dtype=torch.bfloat16)
    if trained is not None:
        pipeline.transformer = Flux2Transformer2DModel.from_pretrained(
            trained, dtype=torch.bfloat16
        )
    notices = {p.name: p.read_bytes() for p in target.glob("*.md")}
    shutil.rmtree(target, ignore_errors=True)
    pipeline.save_pretrained(target)
    for name, content in notices.items():
        (target / name).write_bytes(content)
    for path in target.rglob("*.json"):  # where the parts came from is of no use to anyone else
        values = json.loads(path.read_text())
        if values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2) + "\n")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
