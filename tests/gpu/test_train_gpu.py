"""On a CUDA GPU the trainer computes what it computes on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def run(*arguments: str) -> str:
    """What the command logs."""
    command = [sys.executable, "-m", "launcher", *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, stderr=subprocess.STDOUT, stdout=subprocess.PIPE)  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses_of(run_dir: Path) -> list[float]:
    records = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(record)["loss"] for record in records]


@pytest.mark.parametrize(
    ("precision", "tolerance", "activations"),
    [
        ("fp32", 1e-3, []),
        ("bf16", 0.03, []),
        ("fp32", 1e-3, ["--activations", "recompute", "--offload_activations", "true"]),
    ],
)
def test_losses_follow_the_cpu(
    precision: str, tolerance: float, activations: list[str], tmp_path: Path
) -> None:
    common = ["--config", "recipes/smoke-cpu.yaml", "--model.path", str(tmp_path / "model"),
              "--data.shards", str(tmp_path / "shards"), "--steps", "10", "--log.every", "1",
              "--log.wandb", "disabled", "--launch.processes", "1"]  # fmt: skip
    run("tiny", "--variant", "klein", "--out", str(tmp_path / "model"))
    run("prepare", *common)
    losses = {}
    for accelerator, chosen in (("cpu", "fp32"), ("cuda", precision)):
        run_dir = tmp_path / accelerator
        run("train", *common, "--run_dir", str(run_dir), "--launch.accelerator", accelerator,
            "--precision", chosen, *activations)  # fmt: skip
        losses[accelerator] = losses_of(run_dir)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=tolerance)


@pytest.mark.parametrize("settings", [[], ["--deepspeed", "zero2", "--batch.micro_size", "1"]])
def test_cuda_graphs_train_as_queued_kernels_do(settings: list[str], tmp_path: Path) -> None:
    """Several shapes, accumulation, evaluation in between, and one more start."""
    common = ["--config", "recipes/smoke-cpu.yaml", "--model.path", str(tmp_path / "model"),
              "--data.shards", str(tmp_path / "shards"), "--data.held_out", "0.2", "--evaluation.every", "3",
              "--checkpoint.every", "6", "--log.every", "1", "--log.wandb", "disabled",
              "--launch.processes", "1", "--launch.accelerator", "cuda", "--precision", "bf16"]  # fmt: skip
    run("tiny", "--variant", "klein", "--out", str(tmp_path / "model"))
    run("prepare", *common)
    losses = {}
    for captured in (True, False):
        arguments = [*common, *settings, "--run_dir", str(tmp_path / str(captured)),
                     "--cuda_graphs", str(captured).lower()]  # fmt: skip
        for steps in ("6", "10"):
            log = run("train", *arguments, "--steps", steps, "--accept_changes", "true")
            assert ("replayed as CUDA graphs" in log) == captured
        losses[captured] = losses_of(tmp_path / str(captured))
    assert len(losses[True]) == 10
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
