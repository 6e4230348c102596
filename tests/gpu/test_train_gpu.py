"""On a CUDA GPU the trainer computes what it computes on the CPU."""

from __future__ import annotations

import json
import os
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


def run(module: str, *arguments: str, accelerator: str = "cuda") -> str:
    """What the command logs."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, text=True, stderr=subprocess.STDOUT, stdout=subprocess.PIPE,
        env={**os.environ, "DS_ACCELERATOR": accelerator},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses_of(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of all runs, whose model and shards are made: two shapes, accumulation, evaluation."""
    folder = tmp_path_factory.mktemp("train")
    settings = ["--config", "recipes/smoke-cpu.yaml", "--model.path", str(folder / "model"),
                "--data.shards", str(folder / "shards"), "--data.held_out", "0.2",
                "--evaluation.every", "3", "--checkpoint.every", "6", "--log.every", "1",
                "--log.wandb", "disabled", "--launch.processes", "1"]  # fmt: skip
    run("launcher", "tiny", "--variant", "klein", "--out", str(folder / "model"))
    run("launcher", "prepare", *settings)
    return settings


@pytest.fixture(scope="module")
def expected(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of ten steps in fp32 on the CPU."""
    run_dir = tmp_path_factory.mktemp("cpu")
    run("flux2_ds.train", *common, "--run_dir", str(run_dir), "--steps", "10", accelerator="cpu")
    return losses_of(run_dir)


@pytest.mark.parametrize(
    ("module", "settings", "tolerance"),
    [
        ("launcher", ["--precision", "fp32"], 1e-4),
        ("flux2_ds.train", ["--precision", "fp16"], 1e-3),
        ("flux2_ds.train", ["--precision", "fp32", "--activations", "recompute",
                            "--offload_activations", "true"], 1e-4),
        ("flux2_ds.train", ["--precision", "bf16"], 3e-3),
        ("flux2_ds.train", ["--precision", "bf16", "--cuda_graphs", "true"], 3e-3),
        ("flux2_ds.train", ["--precision", "bf16", "--cuda_graphs", "true", "--deepspeed", "zero0"], 3e-3),
    ],
)  # fmt: skip
def test_losses_follow_the_cpu(
    module: str,
    settings: list[str],
    tolerance: float,
    common: list[str],
    expected: list[float],
    tmp_path: Path,
) -> None:
    """Stopped after the sixth step and continued."""
    command = ["train"] if module == "launcher" else []
    for steps in ("6", "10"):
        log = run(module, *command, *common, *settings, "--run_dir", str(tmp_path),
                  "--launch.accelerator", "cuda", "--steps", steps, "--accept_changes", "true")  # fmt: skip
        assert ("replayed as CUDA graphs" in log) == ("--cuda_graphs" in settings)
    assert losses_of(tmp_path) == pytest.approx(expected, rel=tolerance)
