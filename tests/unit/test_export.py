"""An exported checkpoint gives, in diffusers, what the trained model gave."""

import dataclasses
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import Flux2Transformer2DModel

from flux2_ds import checkpoint
from flux2_ds.export import choose, export
from flux2_ds.model import transformer
from flux2_ds.model.pipeline import load_pipeline
from flux2_ds.recipe import Data, Lora, Model, Recipe
from flux2_ds.spec import Spec


def recipe_for(model: Path, run_dir: Path, method: str) -> Recipe:
    return Recipe(
        run_dir=str(run_dir),
        method=method,  # type: ignore[arg-type]
        precision="fp32",
        model=Model(path=str(model)),
        data=Data(images="", shards=""),
        lora=Lora(rank=4, alpha=6.0),
    )


def trained(recipe: Recipe, spec: Spec) -> Flux2Transformer2DModel:
    """The tiny transformer with some change to all that the method trains."""
    model = transformer.load_transformer(Path(recipe.model.path), torch.float32)
    if recipe.method == "full":
        model.requires_grad_(True)
    else:
        config = transformer.lora_config(spec, recipe.lora, dora=recipe.method == "dora")
        transformer.add_lora(model, config, seed=0)
    generator = torch.Generator().manual_seed(5)
    for parameter in transformer.trainable(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def predict(model: Flux2Transformer2DModel, spec: Spec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 128, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, spec.text_width, generator=generator),
            timestep=torch.tensor([0.4]),
            img_ids=torch.tensor([(0.0, y, x, 0) for y in range(2) for x in range(2)]),
            txt_ids=torch.tensor([(0.0, 0, 0, i) for i in range(5)]),
            guidance=torch.ones(1) if spec.guidance else None,
        ).sample


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_diffusers_computes_what_was_trained(
    method: str, tiny_model: Path, tiny_spec: Spec, tmp_path: Path
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", method)
    model = trained(recipe, tiny_spec)
    expected = predict(model, tiny_spec)
    weights = [("weights", name, p) for name, p in transformer.trainable(model).items()]
    checkpoint.save(tmp_path / "run" / "checkpoints", 7, weights, {}, write=True)

    path = export(recipe, choose(tmp_path / "run" / "checkpoints", None), torch.float32)

    if method == "full":
        loaded = Flux2Transformer2DModel.from_pretrained(path)
    else:
        pipeline = load_pipeline(tiny_model, tiny_spec, torch.float32)
        base = predict(pipeline.transformer, tiny_spec)
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        loaded = pipeline.transformer
        assert (base - expected).abs().max() > 1e-2
    torch.testing.assert_close(predict(loaded, tiny_spec), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(getattr(diffusers, tiny_spec.pipeline), type)


def test_the_precision_of_the_file_is_the_one_asked_for(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    recipe = recipe_for(tiny_model, tmp_path / "run", "lora")
    model = trained(recipe, tiny_spec)
    weights = [("weights", name, p) for name, p in transformer.trainable(model).items()]
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, weights, {}, write=True)
    chosen = choose(tmp_path / "run" / "checkpoints", 1)
    path = export(dataclasses.replace(recipe), chosen, torch.bfloat16)
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    linears = 12 * tiny_spec.double_blocks + 2 * tiny_spec.single_blocks
    assert len(tensors) == 2 * linears
    assert path.stat().st_mode & 0o044, "others may read it"
