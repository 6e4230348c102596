"""An exported checkpoint gives, in diffusers, what the trained model gave."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from reference import load_pipeline
from safetensors import safe_open
from safetensors.torch import load_file

from flux2_ds.checkpoint.tensor_store import TensorShard
from flux2_ds.commands import export as export_module
from flux2_ds.commands.export import choose, export, file_dtype
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Data, Lora, Model, Recipe, recipe_values
from flux2_ds.errors import UserError
from flux2_ds.model import transformer
from flux2_ds.run.run_dir import as_trained


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
    model = Flux2Transformer2DModel.from_pretrained(recipe.model.path, subfolder="transformer")
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
    method: str,
    tiny_model: Path,
    tiny_spec: Spec,
    tmp_path: Path,
    write_checkpoint: Callable[..., Path],
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", method)
    model = trained(recipe, tiny_spec)
    expected = predict(model, tiny_spec)
    weights = [("weights", name, p) for name, p in transformer.trainable(model).items()]
    write_checkpoint(tmp_path / "run" / "checkpoints", 7, weights)

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


def test_a_program_that_reads_no_metadata_applies_the_trained_strength(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", "lora")
    named = transformer.trainable(trained(recipe, tiny_spec))
    write_checkpoint(
        tmp_path / "run" / "checkpoints", 1, [("weights", name, p) for name, p in named.items()]
    )
    path = export(recipe, choose(tmp_path / "run" / "checkpoints", 1), torch.float32)
    tensors = load_file(path)
    for name, down in named.items():
        if ".lora_A." in name:
            up = named[name.replace(".lora_A.", ".lora_B.")]
            key = f"transformer.{transformer.exported_name(name)}"
            found = tensors[key.replace(".lora_A.", ".lora_B.")] @ tensors[key]
            torch.testing.assert_close(found, 6 / 4 * up @ down)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == metadata["transformer.r"] == 4


def test_the_precision_of_the_file_is_the_one_asked_for(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", "lora")
    model = trained(recipe, tiny_spec)
    weights = [("weights", name, p) for name, p in transformer.trainable(model).items()]
    write_checkpoint(tmp_path / "run" / "checkpoints", 1, weights)
    chosen = choose(tmp_path / "run" / "checkpoints", 1)
    assert file_dtype(recipe, "bf16") == torch.bfloat16
    assert file_dtype(dataclasses.replace(recipe, method="dora"), None) == torch.float32
    path = export(recipe, chosen, torch.bfloat16)
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    linears = 12 * tiny_spec.double_blocks + 2 * tiny_spec.single_blocks
    assert len(tensors) == 2 * linears
    assert path.stat().st_mode & 0o044, "others may read it"


def test_an_export_in_several_files_and_of_the_average(
    tiny_model: Path,
    tiny_spec: Spec,
    tmp_path: Path,
    write_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", "full")
    model = trained(recipe, tiny_spec)
    tensor_shards = [
        TensorShard(kind, name, p.detach().flatten() * factor, 0, tuple(p.shape))
        for kind, factor in (("weights", 1), ("ema", 2))
        for name, p in model.named_parameters()
    ]
    write_checkpoint(tmp_path / "run" / "checkpoints", 3, tensor_shards)
    chosen = choose(tmp_path / "run" / "checkpoints", 3)
    monkeypatch.setattr(export_module, "FILE_SIZE", "1MB")
    path = export(recipe, chosen, torch.float32, "ema")
    assert path.parent.name == "step_00000003-ema"
    assert len(list(path.glob("*.safetensors"))) > 2
    loaded = dict(Flux2Transformer2DModel.from_pretrained(path).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name], parameter * 2)


def test_what_is_not_there_is_named(
    tiny_model: Path, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (3, 6):
        write_checkpoint(root, step, [("weights", "a", torch.zeros(1))])
    with pytest.raises(UserError, match=r"no checkpoint of step 7\. There are: 3, 6\."):
        choose(root, 7)
    recipe = recipe_for(tiny_model, tmp_path / "run", "lora")
    with pytest.raises(UserError, match=r"trained without optimizer\.ema_decay"):
        export(recipe, choose(root, 6), torch.float32, "ema")


def test_adapter_settings_are_those_of_the_checkpoint(
    tiny_model: Path, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", "dora")
    state = {"recipe": recipe_values(recipe)}
    write_checkpoint(tmp_path / "run/checkpoints", 3, [("weights", "a", torch.zeros(1))], state)
    now = dataclasses.replace(recipe, method="lora", precision="bf16", lora=Lora(rank=4, alpha=9.0))
    chosen = choose(tmp_path / "run/checkpoints", 3)
    found = as_trained(now, chosen.state()["recipe"], chosen.path)
    assert found == dataclasses.replace(recipe, precision="bf16")
