"""Show what a recipe will train on, and what of the model.

    flux2-ds inspect --config RECIPE [--image FILE] [--samples 9]

Variant, text template, adapted linears, latent statistics, the first sample as the model gets it, and the
timesteps at each resolution. Reads configs, the tokenizer and the shards; the VAE's weights only for
`--image`, which shows samples decoded from their latents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2

from flux2_ds.config.adapter import adapted_linears, adapter_line
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_files import model_directory
from flux2_ds.config.model_spec import PIXELS_PER_TOKEN, Spec, read_spec
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.recipe import Objective, Recipe
from flux2_ds.config.validate import check_recipe
from flux2_ds.data.contact_sheet import contact_sheet
from flux2_ds.data.dataset import check_shards, mask_and_reference_lines, read_data
from flux2_ds.data.images import check_format
from flux2_ds.data.index import Index, is_prepared
from flux2_ds.data.shards import ShardReader, read_conditioning
from flux2_ds.data.storage import join
from flux2_ds.errors import UserError, counted, run_root
from flux2_ds.model import latents, transformer
from flux2_ds.model.flow import shift_of, timesteps
from flux2_ds.model.pipeline import load_vae
from flux2_ds.model.text_encoder import read_prompt
from flux2_ds.run.logging import set_up_console
from flux2_ds.run.run_dir import with_adapter_file

_BINS, _BARS = 20, "▁▂▃▄▅▆▇█"
_EVEN_DEVIATES = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
"""The normal distribution in equal portions, so that histograms are exact and repeatable."""


def main() -> None:
    """Entry point of `flux2-ds inspect`."""
    set_up_console()
    parser = recipe_parser("flux2-ds inspect", "Show what a recipe will train on.")
    add = parser.add_argument
    add("--image", type=str | None, default=None,
        help="File to write samples to, decoded from their latents.")  # fmt: skip
    add("--samples", type=int, default=9, help="Samples in --image and in the statistics.")
    recipe, options = parse_recipe(parser)
    recipe = with_adapter_file(recipe)
    check_recipe(recipe)
    if options.samples < 1:
        raise UserError(f"--samples is {options.samples}; it must be at least 1.")
    if options.image:
        check_format("--image", Path(options.image))
    parts = ["vae"] if options.image else []
    directory = model_directory(recipe.model.path, recipe.model.revision, parts)
    spec = read_spec(directory, allow_distilled=recipe.model.allow_distilled)
    print_part("variant", [str(spec)])
    print_part("trained", target_lines(directory, spec, recipe))
    shards = recipe.data.shards
    if not is_prepared(shards):
        print_part("data", [f"{shards} is not prepared yet"])
        return
    index, _ = read_data(recipe)
    check_shards(index, spec, directory, recipe)
    print_part("latents", latent_lines(shards, index, options.samples))
    print_part("sample", sample_lines(directory, spec, shards, index))
    print_part("masks, refs", mask_and_reference_lines(recipe, index))
    counts = index.bucket_counts()
    print_part("timesteps", [timestep_line(recipe.objective, *each) for each in counts.items()])
    if options.image:
        vae = load_vae(directory, torch.float32).to(recipe.launch.accelerator)
        write_image(Path(options.image), vae, shards, index, options.samples)
        print_part("image", [options.image])


def print_part(name: str, lines: list[str]) -> None:
    """Print a part of the report, its name before the first line."""
    for number, line in enumerate(lines):
        print(f"{'' if number else name:<11} {line}")


def target_lines(directory: Path, spec: Spec, recipe: Recipe) -> list[str]:
    """What is trained, counted on a model without weights."""
    with torch.device("meta"):
        model = transformer.build_transformer(directory)
        transformer.make_trainable(model, spec, recipe)
    named = transformer.trainable(model)
    count = sum(p.numel() for p in named.values())
    if recipe.method == "full":
        return [f"{count:,} parameters, all"]
    lines = [f"{recipe.method}, {adapter_line(spec, recipe)}"]
    parts = [name.split(".", 2) for name in adapted_linears(spec, recipe.lora)]
    for kind, blocks in (("double", spec.double_blocks), ("single", spec.single_blocks)):
        group = f"{'single_' * (kind == 'single')}transformer_blocks"
        counts = Counter(linear for found, _, linear in parts if found == group)
        for count in sorted({*counts.values()}, reverse=True):
            linears = [linear for linear, each in counts.items() if each == count]
            lines.append(f"in {count} of {blocks} {kind} blocks: {', '.join(linears)}")
    return lines


def first_samples(shards: str, index: Index, count: int) -> Iterator[tuple[ShardReader, int]]:
    """(reader, row) of the first samples, one bucket after the other so that all are seen."""
    by_bucket: dict[Bucket, list[tuple[ShardReader, int]]] = {}
    for shard in index.shards:
        rows = by_bucket.setdefault(shard.bucket, [])
        if len(rows) < count:
            reader = ShardReader(join(shards, shard.name), shard)
            rows += [(reader, row) for row in range(min(shard.samples, count - len(rows)))]
    turns = [rows[turn] for turn in range(count) for rows in by_bucket.values() if turn < len(rows)]
    return islice(turns, count)


def latent_lines(shards: str, index: Index, count: int) -> list[str]:
    """The VAE's statistics, and what they make of the first samples."""
    conditioning = read_conditioning(shards, index)
    mean, std = conditioning["latent_mean"], conditioning["latent_std"]
    tokens = torch.cat(
        [
            latents.to_tokens(reader.latent(row)[None], mean, std)[0]
            for reader, row in first_samples(shards, index, count)
        ]
    )
    return [
        f"of the VAE, 128 channels: mean {mean.min():.3f} to {mean.max():.3f}, standard deviation "
        f"{std.min():.3f} to {std.max():.3f}",
        f"of the first {counted(min(count, index.samples), 'sample')}, normalized: mean {tokens.mean():.3f}, "
        f"standard deviation {tokens.std():.3f} (about 0 and 1 for ordinary images)",
    ]


def sample_lines(directory: Path, spec: Spec, shards: str, index: Index) -> list[str]:
    """The first sample: its file, and its caption as the text encoder reads it."""
    ((reader, row),) = first_samples(shards, index, 1)
    meta = reader.meta(row)
    prompt = read_prompt(directory, spec, meta["caption"])
    return [
        f"{meta['source']}, {meta['width']}x{meta['height']}",
        f"caption: {meta['caption']!r}",
        f"read by {spec.text_encoder} as: {prompt.text!r}",
        f"token ids, {len(prompt.ids)} of {prompt.length}, padded on the {prompt.padding}: "
        f"{' '.join(map(str, prompt.ids))}",
        f"hidden states {', '.join(map(str, prompt.layers))}, stacked to width {spec.text_width}",
    ]


def timestep_line(settings: Objective, bucket: Bucket, count: int) -> str:
    """Shift and histogram of t from 0 (clean) to 1 (noise) at one resolution."""
    t = timesteps(_EVEN_DEVIATES.float(), settings, bucket.tokens)
    counts = torch.histc(t, _BINS, 0, 1)
    bars = "".join(_BARS[round(float(c / counts.max()) * (len(_BARS) - 1))] for c in counts)
    return (
        f"{bucket!s:<10} {counted(count, 'sample')}, {bucket.tokens} tokens, "
        f"s = {shift_of(settings, bucket.tokens):.2f}: 0 {bars} 1, half below {t.median():.2f}"
    )


def write_image(path: Path, vae: AutoencoderKLFlux2, shards: str, index: Index, count: int) -> None:
    """Write the first samples as the VAE decodes them, with captions: darker where masked out, and
    followed by their reference images."""
    images, captions = [], []
    for reader, row in first_samples(shards, index, count):
        meta, mask = reader.meta(row), reader.mask(row)
        images.append(latents.decode(vae, reader.latent(row)[None])[0].numpy())
        captions.append(meta["caption"])
        if mask is not None:
            weight = np.kron(mask.numpy(), np.ones((PIXELS_PER_TOKEN, PIXELS_PER_TOKEN)))
            images[-1] = (images[-1] * (0.2 + 0.8 * weight)[..., None]).astype(np.uint8)
        for number, reference in enumerate(reader.references(row), start=1):
            images.append(latents.decode(vae, reference[None])[0].numpy())
            captions.append(f"reference {number} of {meta['source']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(images, captions).save(path)


if __name__ == "__main__":
    run_root(main)
