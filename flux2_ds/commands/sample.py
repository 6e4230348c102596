"""Render the recipe's preview prompts without and with what was trained, side by side.

    flux2-ds sample --config RECIPE [--step N] [--weights ema] [--base_weights nf4] [--output FILE]
    flux2-ds sample --config RECIPE --adapter FILE --strengths '[0.5, 1]' --seeds '[0, 1]'

The grid is RUN_DIR/samples/step_N.png, its images and what they are of in the folder step_N beside it. Images of other
prompts, seeds or settings are not written over: a number is added to the name.

The prompts are encoded first, as `prepare` encodes captions, and the text encoder is freed. Then the
transformer is loaded as it was trained, over the recipe's `base_weights` and with the exported adapter in the
trainer's own layers; diffusers' pipeline denoises and decodes. So a card that trains a model renders with it.
Attention is the recipe's. Blocks are not compiled (`compile`, `cuda_graphs`): the two columns are two models,
which would each be compiled for some tens of passes.
"""

from __future__ import annotations

import gc
import glob
import itertools
import json
import logging
import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from diffusers import Flux2Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

from flux2_ds.config.adapter import merges
from flux2_ds.config.memory import (
    GIB,
    Doing,
    adapter_parameters,
    advice,
    base_bytes,
    buffer_bytes,
    out_of_memory,
    rendering_bytes,
    streamed_bytes,
)
from flux2_ds.config.model_files import DIGESTS, changed_files, file_digests, model_directory
from flux2_ds.config.model_spec import PIXELS_PER_TOKEN, Spec, read_spec
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.plan import streamed_blocks
from flux2_ds.config.recipe import Recipe
from flux2_ds.config.validate import check_recipe
from flux2_ds.data.images import check_format
from flux2_ds.engine.streamed_base import streamed_base
from flux2_ds.errors import UserError, counted, run_root
from flux2_ds.model import transformer
from flux2_ds.model.activation_checkpointing import blocks_of
from flux2_ds.model.adapter_layouts import Adapter
from flux2_ds.model.adapter_programs import read_adapter, read_merges
from flux2_ds.model.attention import attention_backend, check_backend
from flux2_ds.model.load import check_card, open_file, read_weights
from flux2_ds.model.lora import ADAPTER, add_lora, config_of, set_adapter
from flux2_ds.model.merge import Merges, merge_into
from flux2_ds.model.pipeline import load_image_pipeline
from flux2_ds.model.text_encoder import TextEncoder
from flux2_ds.prepare.captions import text_precision
from flux2_ds.run.atomic import atomic_write_text
from flux2_ds.run.logging import progress_bar, set_up_console
from flux2_ds.run.report import write_report
from flux2_ds.run.run_dir import Weights, export_path, trained_recipe
from flux2_ds.training.previews import Prompt, as_prompt, grid, open_reference, render

log = logging.getLogger("flux2_ds")

_PARTS = ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"]
TEXT: Final = "text encoder"
MODEL: Final = "transformer"
IMAGE: Final = "image"
"""What memory must hold, one after the other; an image with the transformer."""


@dataclass(frozen=True)
class Request:
    """What is asked for, and checked as far as that takes no model."""

    recipe: Recipe
    trained: Path
    """An export of the run, or an adapter file."""
    title: str
    output: Path
    named: bool
    """Whether the output's name was given."""
    seeds: list[int]
    strengths: list[float]


def main() -> None:
    """Entry point of `flux2-ds sample`."""
    set_up_console()
    request = read_request()
    recipe, trained = request.recipe, request.trained
    references = [open_reference(path, recipe.preview) for path in recipe.preview.references]
    directory = model_directory(recipe.model.path, recipe.model.revision, _PARTS)
    spec = read_spec(directory, allow_distilled=recipe.model.allow_distilled)
    device = torch.device("cpu" if recipe.launch.accelerator == "cpu" else "cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "launch.accelerator is cuda, and no GPU is visible here. Use a machine with one, or add "
            "--launch.accelerator cpu."
        )
    adapter: Adapter = {}
    if recipe.method == "full":
        check_transformer(trained)
    else:
        adapter = read_adapter(trained, spec)
    merged = read_merges(recipe.lora, spec)
    text_device = torch.device("cpu") if recipe.prepare.text_device == "cpu" else device
    check_card(replace(recipe, compute="precision"), device)
    check_backend(recipe, device)
    recipe = with_room(recipe, spec, directory, references, text_device, device)

    output = free_output(request.output, given=request.named, settings={
        "model": recipe.model.path, "base_weights": recipe.base_weights or recipe.precision,
        "trained": str(trained), "preview": asdict(recipe.preview), "seeds": request.seeds,
        "strengths": request.strengths, **({"merged": merges(recipe.lora)} if merged else {}),
    })  # fmt: skip
    log.info(
        "encoding   %s by the text encoder of %s",
        counted(len(recipe.preview.prompts), "prompt"),
        directory,
    )
    with enough_memory(recipe, TEXT):
        prompts = encode_prompts(recipe, spec, directory, text_device)
    log.info("loading    the transformer")
    with enough_memory(recipe, MODEL):
        model = load_transformer(recipe, directory, device, merged)
        pipeline = load_image_pipeline(directory, spec, model, device)
    del model
    previews = [replace(recipe.preview, seed=seed) for seed in request.seeds]
    held = recipe.base_weights or recipe.precision
    kinds = 1 + len(request.strengths)
    images = kinds * len(prompts) * len(previews)
    columns: dict[str, list[Image.Image]] = {}

    def add_column(title: str) -> None:
        columns[title] = []
        log.info("rendering  %s: %d of %d images", title, images // kinds, images)
        for text, prompt in zip(recipe.preview.prompts, prompts, strict=True):
            for each in previews:
                done = sum(map(len, columns.values()))
                short = textwrap.shorten(text, 40, placeholder=" …")
                bar.set_description(f"image {done + 1} of {images}, {short}")
                columns[title].append(render(pipeline, each, prompt, references, bar.update))

    steps = images * recipe.preview.steps
    with enough_memory(recipe, IMAGE), progress_bar("", steps, "pass") as bar:
        add_column(f"base model, {held}")
        if recipe.method == "full":
            # Two of them need not fit into memory.
            pipeline.transformer = None
            pipeline.transformer = load_transformer(recipe, trained.parent, device)
            add_column(request.title)
        else:
            put_adapter(pipeline.transformer, adapter)
            for strength in request.strengths:
                set_strength(pipeline.transformer, strength)
                times = "" if request.strengths == [1.0] else f" × {strength:g}"
                add_column(request.title + times)
    count = write_images(request, output, columns)
    log.info("rendered %d images over %s with %s: %s", count, held, trained, output)
    run_dir = Path(recipe.run_dir)
    if output.parent == run_dir / "samples" and (page := write_report(run_dir)):
        log.info("report     %s", page)


def read_request() -> Request:
    """What the command line asks for."""
    parser = recipe_parser(
        "flux2-ds sample", "Render prompts without and with the trained weights."
    )
    parser.add_argument("--step", type=int | None, default=None,
                        help="Export to render. Default: the newest.")  # fmt: skip
    parser.add_argument("--weights", type=Weights, default="trained",
                        help="The export of the trained weights, or of their moving average.")  # fmt: skip
    parser.add_argument("--output", type=str | None, default=None,
                        help="Image to write. Default: RUN_DIR/samples/step_N.png.")  # fmt: skip
    parser.add_argument("--adapter", type=str | None, default=None,
                        help="Adapter file to render, of any run and layout that diffusers reads.")  # fmt: skip
    parser.add_argument("--strengths", type=list[float], default=[1.0],
                        help="Of the adapter; a column each.")  # fmt: skip
    parser.add_argument("--seeds", type=list[int], default=[],
                        help="Of the starting noise; a row each. Default: preview.seed.")  # fmt: skip
    recipe, options = parse_recipe(parser)
    if options.output is not None:
        check_format("--output", Path(options.output))
    check_recipe(recipe)
    seeds = options.seeds or [recipe.preview.seed]
    strengths = list(dict.fromkeys(options.strengths))  # a column each
    for each in seeds:
        if not 0 <= each < 2**63:
            raise UserError(f"--seeds has {each}; a seed is between 0 and 2⁶³ - 1.")
    if not strengths or not all(map(math.isfinite, strengths)):
        raise UserError(f"--strengths is {strengths}; it must be numbers.")
    if options.adapter is None:
        recipe = trained_recipe(recipe)
        trained = choose_export(recipe, options.step, options.weights)
        step, ema = step_of(trained), options.weights == "ema"
        output = Path(recipe.run_dir) / "samples" / f"step_{step:08d}{'-ema' * ema}.png"
        title = f"{recipe.method}, step {step}{', ema' * ema}"
    else:
        if options.step is not None or options.weights != "trained":
            raise UserError(
                "--adapter is beside --step or --weights, which name an export. Give one."
            )
        recipe = replace(recipe, method="lora")
        trained = Path(options.adapter)
        output, title = trained.parent / "samples" / f"{trained.stem}.png", trained.stem
    if recipe.base_placement == "sharded":  # over one process
        recipe = replace(recipe, base_placement="gpu")
    if recipe.method == "full" and strengths != [1.0]:
        raise UserError("--strengths is for adapters; method is full. Remove it.")
    named = options.output is not None
    return Request(
        recipe, trained, title, Path(options.output) if named else output, named, seeds, strengths
    )


def with_room(
    recipe: Recipe,
    spec: Spec,
    directory: Path,
    references: list[Image.Image],
    text_device: torch.device,
    device: torch.device,
) -> Recipe:
    """The recipe with `base_placement: auto` decided. Refuses parts that memory cannot hold."""
    sizes, free = part_bytes(recipe, spec, directory, references), free_bytes(device)
    if recipe.base_placement == "auto" and sizes["weights"] + sizes["image"] > free:
        recipe = replace(recipe, base_placement="host", base_resident=0.0)
        sizes = part_bytes(recipe, spec, directory, references)
    check_room(recipe, TEXT, sizes[TEXT], free_bytes(text_device))
    check_room(recipe, MODEL, sizes["weights"], free)
    check_room(recipe, IMAGE, sizes["weights"] + sizes["image"], free)
    return recipe


def write_images(request: Request, output: Path, columns: dict[str, list[Image.Image]]) -> int:
    """Write the grid, and each image into the folder beside it; returns how many these are."""
    prompts, seeds = request.recipe.preview.prompts, request.seeds
    rows = [(prompt, seed) for prompt in range(len(prompts)) for seed in seeds]
    kinds = ["base", *(f"x{strength:g}" for strength in request.strengths)]
    for kind, images in zip(kinds, columns.values(), strict=True):
        for (prompt, seed), image in zip(rows, images, strict=True):
            image.save(output.with_suffix("") / f"{prompt}-seed{seed}-{kind}.png")
    several = len(seeds) > 1
    texts = [prompts[prompt] + f" (seed {seed})" * several for prompt, seed in rows]
    grid(texts, tuple(columns), tuple(columns.values())).save(output)
    return len(rows) * len(columns)


def free_output(output: Path, settings: dict[str, Any], *, given: bool) -> Path:
    """`output`, or with a number the first name whose images are of these settings, or that is free.

    `given`: by name, so that another name is no answer.
    """
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    for number in itertools.count(1):
        path = output if number == 1 else output.with_stem(f"{output.stem}-{number}")
        folder = path.with_suffix("")
        told = folder / "settings.json"
        if told.is_file() and told.read_text(encoding="utf-8") == text:
            return path
        if not path.exists() and not folder.exists():
            folder.mkdir(parents=True)
            atomic_write_text(told, text)
            return path
        if given:
            raise UserError(f"--output {output} has images of other settings. Give another name.")
    raise AssertionError


def part_bytes(
    recipe: Recipe, spec: Spec, directory: Path, references: list[Image.Image]
) -> dict[str, float]:
    """Bytes in memory: weights of the text encoder, which goes first; weights of what renders; and what
    the largest of its tensors take beside them.

    At least: bitsandbytes leaves some weights of a quantised encoder in 16 bits.
    """
    text, vae = (stored_shapes(directory / part) for part in ("text_encoder", "vae"))
    dtype, quantization = text_precision(recipe)
    of_text = {None: dtype.itemsize, "int8": 1, "nf4": 0.5}[quantization]
    element = transformer.compute_dtype(recipe.precision).itemsize
    weights = base_bytes(spec, recipe.base_weights, element) + element * elements(vae)
    streamed = streamed_bytes(recipe, spec)
    weights += buffer_bytes(streamed) - sum(streamed)
    if recipe.method != "full":
        weights += 4 * adapter_parameters(spec, recipe)
    pixels = recipe.preview.height * recipe.preview.width
    # The pipeline makes larger references smaller.
    tokens = sum(min(image.width * image.height, 1024**2) for image in references) + pixels
    (channels,) = vae["decoder.conv_norm_out.weight"]
    image = rendering_bytes(
        spec, recipe.base_weights, element, tokens // PIXELS_PER_TOKEN**2, pixels, channels
    )
    return {TEXT: of_text * elements(text), "weights": weights, "image": image}


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of a part's tensors, by name."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with open_file(path) as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def elements(shapes: dict[str, list[int]]) -> int:
    """Of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def free_bytes(device: torch.device) -> int:
    """What is left of the card's memory, or of this host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def check_room(recipe: Recipe, part: Doing, needed: float, free: float) -> None:
    """Refuse what memory cannot hold, before anything is loaded; in bytes."""
    if needed > free:
        raise UserError(
            f"{described(recipe, part)} takes at least {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB "
            f"are free. {advice(recipe, part)}"
        )


@contextmanager
def enough_memory(recipe: Recipe, part: Doing) -> Iterator[None]:
    """What `check_room` counts is the least that is needed; the card may still be too small. Refuses it then."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = out_of_memory(recipe, part, described(recipe, part), error)
        raise UserError(message) from error


def described(recipe: Recipe, part: str) -> str:
    """The part and the settings that decide its size."""
    if part == TEXT:
        return f"the {TEXT} with prepare.text_weights {recipe.prepare.text_weights}"
    held = f"base_weights {recipe.base_weights or recipe.precision}"
    if recipe.method == "full":
        held = f"precision {recipe.precision}"
    if part == IMAGE:
        preview = recipe.preview
        return f"an image of {preview.width}x{preview.height} px over the {MODEL} with {held}"
    return f"the {MODEL} with {held}"


def choose_export(recipe: Recipe, step: int | None, weights: Weights = "trained") -> Path:
    """The export of `step`, or the newest."""
    if step is not None:
        path = export_path(recipe, step, weights)
        if path.exists():
            return path
    else:
        name = export_path(recipe, 0, weights)
        folder = Path(recipe.run_dir) / "export"
        pattern = glob.escape(str(name.relative_to(folder))).replace("0" * 8, "?" * 8)
        found = sorted(folder.glob(pattern))
        if found:
            return found[-1]
        path = folder / pattern
    command = f"flux2-ds export{' --weights ema' if weights == 'ema' else ''}"
    raise UserError(f"{path} does not exist. Run `{command}` with this recipe first.")


def step_of(trained: Path) -> int:
    """The step in an export's name."""
    return int(re.findall(r"step_(\d{8})", str(trained))[-1])


def encode_prompts(
    recipe: Recipe, spec: Spec, directory: Path, device: torch.device
) -> list[Prompt]:
    """The preview prompts as `prepare` encodes captions; the encoder is freed."""
    dtype, quantization = text_precision(recipe)
    encoder = TextEncoder(directory, spec, dtype, device, quantization)
    empty = encoder.encode([""])
    encoded = [
        as_prompt(spec, encoder.encode([prompt]), empty) for prompt in recipe.preview.prompts
    ]
    del encoder
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return encoded


def load_transformer(
    recipe: Recipe, directory: Path, device: torch.device, merged: Merges = ()
) -> Flux2Transformer2DModel:
    """`directory`/transformer with `merged` in it, with its weights and its attention as the recipe says."""
    with torch.device("meta"):
        model = transformer.build_transformer(directory)
    dtype = transformer.compute_dtype(recipe.precision)
    files, edit = directory / "transformer", merge_into(merged)
    with streamed_base(model, streamed_blocks(recipe, len(blocks_of(model))), device) as base:
        read_weights(model, files, dtype, device, recipe.base_weights, edit, base)
    attention = attention_backend(recipe, device)
    if attention is not None:
        model.set_attention_backend(attention)
    return model.eval()


def check_transformer(folder: Path) -> None:
    """Refuse an exported transformer whose files are not what was written; without digests nothing is known."""
    try:
        changed = changed_files(json.loads((folder / DIGESTS).read_text()), file_digests(folder))
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / DIGESTS} is damaged ({error}). Export it again.") from error
    if changed:
        raise UserError(f"{folder / changed[0]} is not what was exported. Export it again.")


def put_adapter(model: Flux2Transformer2DModel, adapter: Adapter) -> None:
    """Add an adapter, in the layers in which one is trained."""
    add_lora(model, config_of(adapter), seed=0)
    set_adapter(model, adapter)
    model.eval()


def set_strength(model: Flux2Transformer2DModel, strength: float) -> None:
    """Multiply the adapter's update."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale(ADAPTER, strength)


if __name__ == "__main__":
    run_root(main)
