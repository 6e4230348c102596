"""Sample: render the recipe's preview prompts without and with what was trained, side by side.

    flux2-ds sample --config RECIPE [--step N] [--base_weights nf4] [--output FILE]

The prompts are encoded first, as `prepare` encodes captions, and the text encoder is freed. Then the
transformer is loaded as it was trained, over the recipe's `base_weights` and with the exported adapter in the
trainer's own layers; diffusers' pipeline denoises and decodes. So a card that trains a model renders with it.
"""

from __future__ import annotations

import gc
import logging
import math
import re
from pathlib import Path

import psutil
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file

from flux2_ds.errors import UserError, run_root
from flux2_ds.memory import GIB, adapter_parameters, base_bytes
from flux2_ds.model import transformer
from flux2_ds.model.files import model_directory
from flux2_ds.model.pipeline import load_image_pipeline
from flux2_ds.model.quantize import BASE_WEIGHTS
from flux2_ds.model.text import TextEncoder
from flux2_ds.model.weights import check_card, open_file, read_weights
from flux2_ds.plan import check_base
from flux2_ds.prepare.encode import text_precision
from flux2_ds.ranges import check_ranges
from flux2_ds.recipe import Recipe, parse_recipe, recipe_parser
from flux2_ds.rendering import Prompt, as_prompt, grid, open_reference, render
from flux2_ds.rundir import export_path, trained_recipe
from flux2_ds.spec import Spec, read_spec

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
    check_base(recipe)
    trained = choose_export(recipe, options.step)
    step = step_of(trained)
    output = Path(options.output or Path(recipe.run_dir) / "samples" / f"step_{step:08d}.png")
    references = [open_reference(path) for path in recipe.preview.references]
    directory = model_directory(recipe.model.path, recipe.model.revision, _PARTS)
    spec = read_spec(directory, allow_distilled=recipe.model.allow_distilled)
    device = torch.device("cpu" if recipe.launch.accelerator == "cpu" else "cuda:0")
    text_device = torch.device("cpu") if recipe.prepare.text_device == "cpu" else device
    check_card(recipe.base_weights, device)
    sizes = part_bytes(recipe, spec, directory)
    check_room(recipe, "text encoder", sizes["text encoder"], free_bytes(text_device))
    check_room(recipe, "transformer", sizes["transformer"], free_bytes(device))

    prompts = encode_prompts(recipe, spec, directory, text_device)
    model = load_transformer(recipe, directory, device)
    pipeline = load_image_pipeline(directory, spec, model, device)
    del model
    before = [render(pipeline, recipe.preview, prompt, references) for prompt in prompts]
    if recipe.method == "full":
        # Two of them need not fit into memory.
        pipeline.transformer = None
        pipeline.transformer = load_transformer(recipe, trained.parent, device)
    else:
        put_adapter(pipeline.transformer, recipe, spec, trained)
    after = [render(pipeline, recipe.preview, prompt, references) for prompt in prompts]

    output.parent.mkdir(parents=True, exist_ok=True)
    held = recipe.base_weights or recipe.precision
    titles = (f"base model, {held}", f"{recipe.method}, step {step}")
    grid(recipe.preview.prompts, titles, (before, after)).save(output)
    log.info("rendered %d prompts over %s with %s: %s", len(before), held, trained, output)


def part_bytes(recipe: Recipe, spec: Spec, directory: Path) -> dict[str, float]:
    """Bytes of weights in memory: of the text encoder, which goes first, and of what renders.

    At least: bitsandbytes leaves some weights of a quantised encoder in 16 bits.
    """

    def elements(part: str) -> int:
        count = 0
        for path in (directory / part).glob("*.safetensors"):
            with open_file(path) as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        return count

    dtype, quantization = text_precision(recipe)
    of_text = {None: dtype.itemsize, "int8": 1, "nf4": 0.5}[quantization]
    element = transformer.compute_dtype(recipe.precision).itemsize
    renders = base_bytes(spec, recipe.base_weights, element) + element * elements("vae")
    if recipe.method != "full":
        renders += 4 * adapter_parameters(spec, recipe)
    return {"text encoder": of_text * elements("text_encoder"), "transformer": renders}


def free_bytes(device: torch.device) -> int:
    """What is left of the card's memory, or of this host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def check_room(recipe: Recipe, part: str, needed: float, free: float) -> None:
    """Refuse what memory cannot hold, before anything is loaded; in bytes.

    Raises:
        UserError: naming the part, its size and what to do.
    """
    if needed <= free:
        return
    held = f"base_weights {recipe.base_weights or recipe.precision}"
    remedy = "Set --base_weights nf4, or run sample"
    if part == "text encoder":
        held = f"prepare.text_weights {recipe.prepare.text_weights}"
        remedy = "Set --prepare.text_weights nf4 or --prepare.text_device cpu, or run sample"
    elif recipe.method == "full":
        held, remedy = f"precision {recipe.precision}", "Run sample"
    raise UserError(
        f"the {part} with {held} takes at least {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB "
        f"are free. {remedy} on a larger machine with the same run_dir."
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
    recipe: Recipe, directory: Path, device: torch.device
) -> Flux2Transformer2DModel:
    """`directory`/transformer, its weights held as the recipe says."""
    with torch.device("meta"):
        model = transformer.build_transformer(directory)
    dtype = transformer.compute_dtype(recipe.precision)
    quantized = BASE_WEIGHTS.get(recipe.base_weights or "")
    read_weights(model, directory / "transformer", dtype, device, quantized)
    return model.eval()


@torch.no_grad()
def put_adapter(model: Flux2Transformer2DModel, recipe: Recipe, spec: Spec, exported: Path) -> None:
    """Add the exported adapter, in the layers that it was trained in.

    Raises:
        UserError: it is not one of this recipe's.
    """
    settings = transformer.exported_settings(recipe.lora)
    config = transformer.lora_config(spec, settings, dora=recipe.method == "dora")
    transformer.add_lora(model, config, recipe.seed)
    model.eval()
    own = {
        f"transformer.{transformer.exported_name(name)}": parameter
        for name, parameter in transformer.trainable(model).items()
    }
    stored = load_file(exported)
    if {n: t.shape for n, t in stored.items()} != {n: p.shape for n, p in own.items()}:
        raise UserError(
            f"{exported} is not an adapter of the run in {recipe.run_dir}: it has other tensors. Run "
            "`flux2-ds export` again."
        )
    for name, parameter in own.items():
        parameter.copy_(stored[name])


if __name__ == "__main__":
    run_root(main)
