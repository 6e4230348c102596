"""Sample: render the recipe's preview prompts without and with what was trained, side by side.

    flux2-ds sample --config RECIPE [--step N] [--output FILE]

Loads the pipeline and the export as any user of diffusers would, so that the picture also proves the
exported file.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image, ImageDraw, ImageFont, ImageOps

from flux2_ds.errors import UserError, run_root
from flux2_ds.memory import GIB
from flux2_ds.model.files import model_directory
from flux2_ds.model.pipeline import load_pipeline
from flux2_ds.model.transformer import compute_dtype
from flux2_ds.ranges import check_ranges
from flux2_ds.recipe import Recipe, parse_recipe, recipe_parser
from flux2_ds.rundir import export_path, trained_recipe
from flux2_ds.spec import read_spec

log = logging.getLogger("flux2_ds")

_PARTS = ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"]


def main() -> None:
    """Entry point of `flux2-ds sample`."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    parser = recipe_parser(
        "flux2-ds sample", "Render prompts without and with the trained weights."
    )
    parser.add_argument("--step", type=int | None, default=None,
                        help="Export to render. Default: the newest.")  # fmt: skip
    parser.add_argument("--output", type=str | None, default=None,
                        help="Picture to write. Default: RUN_DIR/samples/step_N.png.")  # fmt: skip
    recipe, options = parse_recipe(parser)
    check_ranges(recipe)
    recipe = trained_recipe(recipe)
    trained = choose_export(recipe, options.step)
    step = step_of(trained)
    output = Path(options.output or Path(recipe.run_dir) / "samples" / f"step_{step:08d}.png")
    references = [open_reference(path) for path in recipe.preview.references]
    directory = model_directory(recipe.model.path, recipe.model.revision, _PARTS)
    spec = read_spec(directory, allow_distilled=recipe.model.allow_distilled)
    dtype = compute_dtype(recipe.precision)
    card = None
    if recipe.launch.accelerator == "cuda":
        card = torch.cuda.mem_get_info()[0]
    check_room(part_bytes(directory, dtype), card, psutil.virtual_memory().available)
    pipeline = load_pipeline(directory, spec, dtype)
    before = render(pipeline, recipe, references)
    if recipe.method == "full":
        # Two of them need not fit into memory.
        pipeline.remove_all_hooks()
        pipeline.transformer = None
        pipeline.transformer = Flux2Transformer2DModel.from_pretrained(trained, dtype=dtype)
    else:
        pipeline.load_lora_weights(str(trained.parent), weight_name=trained.name)
    after = render(pipeline, recipe, references)

    output.parent.mkdir(parents=True, exist_ok=True)
    titles = ("base model", f"{recipe.method}, step {step}")
    grid(recipe.preview.prompts, titles, (before, after)).save(output)
    log.info("rendered %d prompts with %s: %s", len(before), trained, output)


def part_bytes(directory: Path, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the model's parts in memory, by what their files of 16-bit weights hold."""
    parts = ("text_encoder", "transformer", "vae")
    files = {part: (directory / part).glob("*.safetensors") for part in parts}
    return {
        part: sum(file.stat().st_size for file in found) * dtype.itemsize // 2
        for part, found in files.items()
    }


def check_room(parts: dict[str, int], card: int | None, host: int) -> None:
    """Refuse a model that memory cannot hold, before it is loaded. `card`, `host`: free bytes.

    Raises:
        UserError: naming what does not fit.
    """
    largest = max(parts, key=lambda part: parts[part])
    elsewhere = (
        "sample renders with the whole model, not with base_weights. Run it on a larger machine with the "
        "same run_dir, or load the export there with diffusers."
    )
    if card is not None and parts[largest] > card:
        raise UserError(
            f"the model's {largest} takes {parts[largest] / GIB:.1f} GiB and the card has "
            f"{card / GIB:.1f} GiB free: {elsewhere}"
        )
    if sum(parts.values()) > host:
        raise UserError(
            f"the model takes {sum(parts.values()) / GIB:.1f} GiB of host memory and "
            f"{host / GIB:.1f} GiB are free: {elsewhere}"
        )


def choose_export(recipe: Recipe, step: int | None) -> Path:
    """The export of `step`, or the newest.

    Raises:
        UserError: it does not exist.
    """
    if step is not None:
        path = export_path(recipe, step)
        if path.exists():
            return path
    else:
        name = export_path(recipe, 0)
        folder = Path(recipe.run_dir) / "export"
        pattern = str(name.relative_to(folder)).replace("0" * 8, "*")
        found = sorted(folder.glob(pattern))
        if found:
            return found[-1]
        path = folder / pattern
    raise UserError(f"{path} does not exist. Run `flux2-ds export` with this recipe first.")


def step_of(trained: Path) -> int:
    """The step in an export's name."""
    return int(re.findall(r"step_(\d{8})", str(trained))[-1])


def render(pipeline: Any, recipe: Recipe, references: list[Image.Image]) -> list[Image.Image]:
    """One picture a prompt, all from the same starting noise."""
    preview = recipe.preview
    if recipe.launch.accelerator == "cuda":
        pipeline.enable_model_cpu_offload()  # only the part that is at work is on the card
    return [
        pipeline(
            prompt=prompt,
            image=references or None,
            height=preview.height,
            width=preview.width,
            num_inference_steps=preview.steps,
            guidance_scale=preview.guidance,
            generator=torch.Generator().manual_seed(preview.seed),
        ).images[0]
        for prompt in preview.prompts
    ]


def open_reference(path: str) -> Image.Image:
    """A reference image, upright and in RGB.

    Raises:
        UserError: it cannot be read, or inference does not take it.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        Flux2ImageProcessor.check_image_input(upright)
    except (OSError, ValueError) as error:
        raise UserError(f"preview.references: {path} cannot be used ({error}).") from error
    return upright


def grid(
    prompts: list[str], titles: tuple[str, ...], columns: tuple[list[Image.Image], ...]
) -> Image.Image:
    """A row a prompt with its text above, a column for each title."""
    width, height = columns[0][0].size
    font = ImageFont.load_default(size=14)
    head, gap = 26, 6
    cell = max(width, 200)
    sheet = Image.new(
        "RGB",
        (len(columns) * (cell + gap) + gap, head + len(prompts) * (height + head + gap)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(zip(titles, columns, strict=True)):
        left = gap + column * (cell + gap)
        draw.text((left, 5), title, fill="black", font=font)
        for row, picture in enumerate(pictures):
            top = head + row * (height + head + gap)
            if column == 0:
                draw.text((left, top + 3), prompts[row], fill="dimgray", font=font)
            sheet.paste(picture, (left, top + head))
    return sheet


if __name__ == "__main__":
    run_root(main)
