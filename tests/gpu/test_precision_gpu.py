"""What DeepSpeed does on GPUs only: fp16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_train_gpu import ROOT, losses_of, run

from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.config.model_spec import read_spec
from flux2_ds.config.parse import load_recipe
from flux2_ds.config.plan import make_plan
from flux2_ds.distributed import Process
from flux2_ds.model import transformer
from flux2_ds.training.build import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def moved_share(folder: Path, method: str, precision: str, accelerator: str = "cuda") -> float:
    """Train 50 steps at a learning rate of 1e-4; the share of the trained elements that changed."""
    settings = ["--model.path", str(folder / "model"), "--data.shards", str(folder / "shards"),
                "--data.images", "examples/photos", "--data.resolution", "160",
                "--run_dir", str(folder / method), "--method", method, "--precision", precision,
                "--steps", "50", "--lora.rank", "4", "--optimizer.learning_rate", "1e-4",
                "--optimizer.schedule", "constant", "--optimizer.weight_decay", "0",
                "--log.wandb", "disabled", "--launch.processes", "1",
                "--launch.accelerator", accelerator]  # fmt: skip
    run("launcher", "tiny", "--variant", "klein", "--out", str(folder / "model"))
    run("launcher", "prepare", "--config", "recipes/smoke-cpu.yaml", *settings)
    run("launcher", "train", "--config", "recipes/smoke-cpu.yaml", *settings)
    recipe = load_recipe(ROOT / "recipes" / "smoke-cpu.yaml", settings)
    directory = Path(recipe.model.path)
    plan = make_plan(recipe, 1)
    process = Process(0, 1, torch.device("cpu"))
    model, _ = build_model(directory, read_spec(directory), plan, process, image_tokens=100)
    before = transformer.trainable(model)
    found, _ = checkpoint.newest(Path(recipe.run_dir) / "checkpoints")
    assert found is not None
    after = found.tensors("weights")
    moved = sum(int((after[name] != p.float()).sum()) for name, p in before.items())
    return moved / sum(p.numel() for p in before.values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fp16_loses_no_update(method: str, tmp_path: Path) -> None:
    """fp16 copies, fp32 masters, and a loss scaler that finds its scale."""
    assert moved_share(tmp_path, method, "fp16") > 0.99
    losses = losses_of(tmp_path / method)
    assert losses[-1] < 2 * losses[0]
