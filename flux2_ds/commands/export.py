"""Export: a checkpoint to files that diffusers loads.

    flux2-ds export --config RECIPE [--step N] [--dtype bf16] [--weights ema]

An adapter becomes one safetensors file for `load_lora_weights`; a full fine-tune a `transformer`
directory for `Flux2Transformer2DModel.from_pretrained`. Reads the checkpoint and the model's configs
only; the base weights are not loaded.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Literal

import diffusers
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.checkpoint.tensor_store import TensorStore, default_permissions, write_tensors
from flux2_ds.config.model_files import model_directory
from flux2_ds.config.model_spec import read_spec
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import UserError, run_root
from flux2_ds.model.transformer import compute_dtype, exported_name, exported_settings, lora_config
from flux2_ds.run.logging import set_up_console
from flux2_ds.run.run_dir import Weights, as_trained, checkpoints_directory, export_path

log = logging.getLogger("flux2_ds")

Precision = Literal["bf16", "fp16", "fp32"]
FILE_SIZE = "10GB"
"""Of an exported transformer; one such file is in memory at a time."""


def main() -> None:
    """Entry point of `flux2-ds export`."""
    set_up_console()
    parser = recipe_parser("flux2-ds export", "Write a checkpoint in the form diffusers loads.")
    parser.add_argument("--step", type=int | None, default=None,
                        help="Checkpoint to export. Default: the newest.")  # fmt: skip
    parser.add_argument("--dtype", type=Precision | None, default=None,
                        help="Precision of the file. Default: the recipe's, for a DoRA fp32.")  # fmt: skip
    parser.add_argument("--weights", type=Weights, default="trained",
                        help="The trained weights, or their moving average.")  # fmt: skip
    recipe, options = parse_recipe(parser)
    chosen = choose(checkpoints_directory(recipe), options.step)
    # The run's may have changed since.
    recipe = as_trained(recipe, chosen.state()["recipe"], chosen.path)
    path = export(recipe, chosen, file_dtype(recipe, options.dtype), options.weights)
    log.info("exported %s to %s", chosen.path, path)


def file_dtype(recipe: Recipe, asked: Precision | None) -> torch.dtype:
    """Of the file: the one asked for, or the recipe's; of a DoRA fp32, because what its magnitudes learn is often
    less than bf16 tells apart."""
    return compute_dtype(asked or ("fp32" if recipe.method == "dora" else recipe.precision))


def choose(root: Path, step: int | None) -> checkpoint.Checkpoint:
    """The checkpoint of `step`, or the newest intact one.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if step is None:
        found, damaged = checkpoint.newest(root)
        for path, reason in damaged.items():
            log.warning("%s is damaged (%s); exporting the one before", path, reason)
        if found is None:
            raise UserError(f"{root} holds no checkpoint. Train first, or correct run_dir.")
        return found
    found = checkpoint.Checkpoint(checkpoint.checkpoint_path(root, step), step)
    if not found.path.is_dir():
        there = ", ".join(str(one.step) for one in checkpoint.find(root)) or "none"
        raise UserError(f"{root} holds no checkpoint of step {step}. There are: {there}.")
    damage = checkpoint.verify(found)
    if damage:
        raise UserError(f"checkpoint {found.path} cannot be exported: {damage}.")
    return found


def export(
    recipe: Recipe,
    chosen: checkpoint.Checkpoint,
    dtype: torch.dtype,
    weights: Weights = "trained",
) -> Path:
    """Write the export of one checkpoint; returns the file (adapter) or directory (full).

    Raises:
        UserError: the checkpoint has no moving average.
    """
    if weights == "ema" and "ema" not in chosen.kinds():
        raise UserError(
            f"{chosen.path} holds no moving average: it was trained without optimizer.ema_decay. Export "
            "--weights trained, or set optimizer.ema_decay and train in a new run_dir."
        )
    directory = model_directory(recipe.model.path, recipe.model.revision, [])
    spec = read_spec(directory, allow_distilled=recipe.model.allow_distilled)
    store = chosen.store("weights" if weights == "trained" else "ema")
    path = export_path(recipe, chosen.step, weights)
    if recipe.method == "full":
        path.mkdir(parents=True, exist_ok=True)
        export_transformer(store, path, dtype)
        shutil.copy(directory / "transformer" / "config.json", path)
        return path
    scale = 1.0 if recipe.lora.alpha is None else recipe.lora.alpha / recipe.lora.rank
    adapter = {
        exported_name(name): (store.tensor(name) * (scale if ".lora_A." in name else 1)).to(dtype)
        for name in store.shapes
    }
    config = lora_config(spec, exported_settings(recipe.lora), dora=recipe.method == "dora")
    pipeline = getattr(diffusers, spec.pipeline)
    path.parent.mkdir(parents=True, exist_ok=True)
    with default_permissions(path):
        pipeline.save_lora_weights(
            path.parent,
            transformer_lora_layers=adapter,
            weight_name=path.name,
            transformer_lora_adapter_metadata=config.to_dict(),
        )
    return path


def export_transformer(store: TensorStore, path: Path, dtype: torch.dtype) -> None:
    """Write all weights in diffusers' layout."""
    for old in path.glob("diffusion_pytorch_model*.safetensors*"):
        old.unlink()
    split = split_torch_state_dict_into_shards(
        {n: torch.empty(s, dtype=dtype, device="meta") for n, s in store.shapes.items()},
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=FILE_SIZE,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: store.tensor(name).to(dtype) for name in names}
        write_tensors(path / file, tensors, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        name = "diffusion_pytorch_model.safetensors.index.json"
        (path / name).write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    run_root(main)
