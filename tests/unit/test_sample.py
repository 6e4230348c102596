"""Previews: over every base they are what diffusers' own pipeline renders with the exported file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image
from reference import load_pipeline
from test_export import recipe_for, trained

from flux2_ds import sample
from flux2_ds.errors import UserError
from flux2_ds.export import choose, export
from flux2_ds.model import transformer
from flux2_ds.model.pipeline import load_image_pipeline
from flux2_ds.model.quantize import QuantizedLinear
from flux2_ds.recipe import Launch, Prepare, Preview, Recipe
from flux2_ds.rendering import Prompt, open_reference, render
from flux2_ds.spec import Spec

CPU = torch.device("cpu")


def previewed(model: Path, run_dir: Path, method: str = "lora") -> Recipe:
    return dataclasses.replace(
        recipe_for(model, run_dir, method),
        preview=Preview(prompts=["a cat", "a dog"], height=64, width=96, steps=2),
        launch=Launch(accelerator="cpu"),
    )


def exported(recipe: Recipe, spec: Spec, write_checkpoint: Callable[..., Path]) -> Path:
    model = trained(recipe, spec)
    checkpoints = Path(recipe.run_dir) / "checkpoints"
    pieces = [("weights", name, p) for name, p in transformer.trainable(model).items()]
    write_checkpoint(checkpoints, 7, pieces)
    return export(recipe, choose(checkpoints, None), torch.float32)


def unrounded(pipeline: Any) -> Any:
    """The pipeline, giving what the VAE decodes: in 8 bits tiny models' pictures are all alike."""
    pipeline.image_processor.postprocess = lambda image, **_: list(image)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, references: list[Image.Image]) -> torch.Tensor:
    """What diffusers renders from the prompts."""
    pictures = [
        pipeline(
            prompt=prompt, image=references or None, height=64, width=96, num_inference_steps=2,
            guidance_scale=4.0, generator=torch.Generator().manual_seed(0),
        ).images[0]
        for prompt in ("a cat", "a dog")
    ]  # fmt: skip
    return torch.stack(pictures)


@pytest.mark.parametrize(("method", "base"), [("lora", "nf4"), ("dora", None), ("full", None)])
def test_both_columns_are_diffusers_own(
    method: str,
    base: Any,
    tiny_model: Path,
    tiny_spec: Spec,
    tmp_path: Path,
    write_checkpoint: Callable[..., Path],
) -> None:
    recipe = previewed(tiny_model, tmp_path / "run", method)
    lora = dataclasses.replace(recipe.lora, dropout=0.5)
    recipe = dataclasses.replace(recipe, base_weights=base, lora=lora)
    file = exported(recipe, tiny_spec, write_checkpoint)
    references = [Image.new("RGB", (64, 80), (250, 20, 20))]

    prompts = sample.encode_prompts(recipe, tiny_spec, tiny_model, CPU)
    model = sample.load_transformer(recipe, tiny_model, CPU)
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert bool(quantized) == (base is not None)
    pipeline = unrounded(load_image_pipeline(tiny_model, tiny_spec, model, CPU))
    before = pictures(pipeline, recipe, prompts, references)
    if method == "full":
        pipeline.transformer = sample.load_transformer(recipe, file.parent, CPU)
    else:
        sample.put_adapter(model, recipe, tiny_spec, file)
    after = pictures(pipeline, recipe, prompts, references)

    reference = unrounded(load_pipeline(tiny_model, tiny_spec, torch.float32))
    for name, linear in quantized.items():
        reference.transformer.get_submodule(name).weight.data = linear.weight.float()
    torch.testing.assert_close(before, theirs(reference, references), rtol=0, atol=1e-4)
    assert (before - theirs(reference, [])).abs().max() > 5e-3
    if method == "full":
        reference.transformer = Flux2Transformer2DModel.from_pretrained(file)
    else:
        reference.load_lora_weights(str(file.parent), weight_name=file.name)
    torch.testing.assert_close(after, theirs(reference, references), rtol=0, atol=1e-3)
    assert (before - after).abs().max() > 5e-2


def pictures(
    pipeline: Any, recipe: Recipe, prompts: list[Prompt], references: list[Image.Image]
) -> torch.Tensor:
    return torch.stack([render(pipeline, recipe.preview, p, references) for p in prompts])


def test_an_adapter_of_another_run_is_refused(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    recipe = previewed(tiny_model, tmp_path / "run")
    file = exported(recipe, tiny_spec, write_checkpoint)
    other = dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, rank=5))
    model = sample.load_transformer(other, tiny_model, CPU)
    with pytest.raises(UserError, match=r"step_00000007\.safetensors is not an adapter of the run"):
        sample.put_adapter(model, other, tiny_spec, file)


@pytest.mark.parametrize(
    ("size", "reason"), [(None, "No such file"), ((32, 64), "too small"), ((64, 640), "ratio")]
)
def test_references_that_cannot_be_used(
    tmp_path: Path, size: tuple[int, int] | None, reason: str
) -> None:
    path = tmp_path / "reference.png"
    if size is not None:
        Image.new("RGB", size).save(path)
    with pytest.raises(UserError, match=rf"(?s)preview\.references: .*reference\.png .*{reason}"):
        open_reference(str(path))


def test_sizes_are_those_of_what_is_loaded(tiny_model: Path, tiny_spec: Spec) -> None:
    for base in (None, "fp8", "nf4"):
        recipe = dataclasses.replace(
            previewed(tiny_model, Path("unused")), precision="bf16", base_weights=base
        )
        model = sample.load_transformer(recipe, tiny_model, CPU)
        pipeline = load_image_pipeline(tiny_model, tiny_spec, model, CPU)
        config = transformer.lora_config(tiny_spec, recipe.lora, dora=False)
        transformer.add_lora(model, config, 0)
        held = [*model.parameters(), *pipeline.vae.parameters(), *pipeline.vae.buffers()]
        found = sample.part_bytes(recipe, tiny_spec, tiny_model)
        assert found["transformer"] == pytest.approx(sum(p.nbytes for p in held), rel=0.01)
    encoder = load_pipeline(tiny_model, tiny_spec, torch.bfloat16).text_encoder
    assert found["text encoder"] == pytest.approx(encoder.get_memory_footprint(), rel=0.01)


def test_what_memory_cannot_hold_is_refused(tmp_path: Path) -> None:
    recipe = previewed(tmp_path, tmp_path)
    sample.check_room(recipe, "transformer", 60 << 30, 60 << 30)
    for changes, part, told in (
        ({"base_weights": "fp8"}, "transformer", r"base_weights fp8 .*Set --base_weights nf4"),
        ({"method": "full"}, "transformer", r"precision fp32 .*Run sample on a larger"),
        ({"prepare": Prepare(text_weights="int8")}, "text encoder", "int8 .*text_weights nf4"),
    ):
        changed = dataclasses.replace(recipe, **changes)
        size = r"takes at least 32\.0 GiB, and 23\.5 GiB are free"
        with pytest.raises(UserError, match=f"the {part} with .*{size}.*"):
            sample.check_room(changed, part, 32 << 30, int(23.5 * 2**30))
        with pytest.raises(UserError, match=told):
            sample.check_room(changed, part, 32 << 30, int(23.5 * 2**30))
