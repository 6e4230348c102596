"""Export: a checkpoint to files that diffusers loads.

    flux2-ds export --config RECIPE [--step N] [--dtype bf16]

An adapter becomes one safetensors file for `load_lora_weights`; a full fine-tune a `transformer`
directory for `Flux2Transformer2DModel.from_pretrained`. Reads the checkpoint and the model's configs
only; the base weights are not loaded.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Literal

import diffusers
import torch
from huggingface_hub import save_torch_state_dict

from flux2_ds import checkpoint
from flux2_ds.errors import UserError, run_root
from flux2_ds.model.files import model_directory
from flux2_ds.model.transformer import compute_dtype, exported_name, lora_config
from flux2_ds.recipe import Recipe, parse_recipe, recipe_parser
from flux2_ds.rundir import export_path, trained_recipe
from flux2_ds.spec import read_spec
from flux2_ds.tensors import use_default_permissions

log = logging.getLogger("flux2_ds")


def main() -> None:
    """Entry point of `flux2-ds export`."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    parser = recipe_parser("flux2-ds export", "Write a checkpoint in the form diffusers loads.")
    parser.add_argument("--step", type=int | None, default=None,
                        help="Checkpoint to export. Default: the newest.")  # fmt: skip
    parser.add_argument("--dtype", type=Literal["bf16", "fp16", "fp32"] | None, default=None,
                        help="Precision of the file. Default: the recipe's.")  # fmt: skip
    recipe, options = parse_recipe(parser)
    recipe = trained_recipe(recipe)
    chosen = choose(Path(recipe.run_dir) / "checkpoints", options.step)
    path = export(recipe, chosen, compute_dtype(options.dtype or recipe.precision))
    log.info("exported %s to %s", chosen.path, path)


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
    damage = checkpoint.verify(found)
    if damage:
        raise UserError(f"checkpoint {found.path} cannot be exported: {damage}.")
    return found


def export(recipe: Recipe, chosen: checkpoint.Checkpoint, dtype: torch.dtype) -> Path:
    """Write the export of one checkpoint; returns the file (adapter) or directory (full)."""
    directory = model_directory(recipe.model.path, recipe.model.revision, [])
    spec = read_spec(directory, allow_distilled=recipe.model.allow_distilled)
    weights = {name: value.to(dtype) for name, value in chosen.tensors("weights").items()}
    path = export_path(recipe, chosen.step)
    if recipe.method == "full":
        path.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(
            weights,
            path,
            filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
            max_shard_size="10GB",
        )
        for file in path.glob("*.safetensors"):
            use_default_permissions(file)
        shutil.copy(directory / "transformer" / "config.json", path)
        return path
    config = lora_config(spec, recipe.lora, dora=recipe.method == "dora").to_dict()
    pipeline = getattr(diffusers, spec.pipeline)
    pipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers={exported_name(name): value for name, value in weights.items()},
        weight_name=path.name,
        transformer_lora_adapter_metadata=config,
    )
    use_default_permissions(path)
    return path


if __name__ == "__main__":
    run_root(main)
