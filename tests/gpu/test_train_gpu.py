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


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "launcher", *arguments], cwd=ROOT, check=True)


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
        records = (run_dir / "metrics.jsonl").read_text().splitlines()
        losses[accelerator] = [json.loads(record)["loss"] for record in records]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=tolerance)
