"""On a CUDA GPU the trainer computes what it computes on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
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
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of all runs, whose model and shards are made: two shapes, accumulation, evaluation."""
    folder = tmp_path_factory.mktemp("train")
    settings = ["--config", "recipes/smoke-cpu.yaml", "--model.path", str(folder / "model"),
                "--data.shards", str(folder / "shards"), "--data.validation_fraction", "0.2",
                "--data.images", "examples/photos", "--data.resolution", "160",
                "--validation.every", "3", "--checkpoint.every", "6", "--log.every", "1",
                "--log.wandb", "disabled", "--launch.processes", "1"]  # fmt: skip
    run("launcher", "tiny", "--variant", "klein", "--out", str(folder / "model"))
    run("launcher", "prepare", *settings)
    return settings


@pytest.fixture(scope="module")
def expected(
    common: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[float]]:
    """Method -> losses of ten steps in fp32 on the CPU."""

    @cache
    def losses(method: str) -> list[float]:
        run_dir = tmp_path_factory.mktemp(method)
        run("flux2_ds.train", *common, "--run_dir", str(run_dir), "--steps", "10", "--method", method,
            accelerator="cpu")  # fmt: skip
        return losses_of(run_dir)

    return losses


@pytest.mark.parametrize(
    ("module", "settings", "tolerance"),
    [
        ("launcher", ["--precision", "fp32"], 1e-4),
        ("flux2_ds.train", ["--precision", "fp16"], 1e-3),
        ("flux2_ds.train", ["--precision", "fp32", "--activation_checkpointing", "full",
                            "--offload_activations", "true"], 1e-4),
        ("flux2_ds.train", ["--precision", "bf16", "--cuda_graphs", "false"], 3e-3),
        ("flux2_ds.train", ["--precision", "bf16"], 3e-3),
        ("flux2_ds.train", ["--precision", "bf16", "--deepspeed", "zero0"], 3e-3),
        ("flux2_ds.train", ["--precision", "bf16", "--deepspeed", "zero1"], 3e-3),
        ("flux2_ds.train", ["--precision", "bf16", "--deepspeed", "zero2_offload"], 3e-3),
        ("flux2_ds.train", ["--precision", "bf16", "--method", "dora"], 3e-3),
        ("launcher", ["--precision", "fp32", "--launch.processes", "2"], 1e-4),
        ("launcher", ["--precision", "bf16", "--launch.processes", "2"], 3e-3),
        ("launcher", ["--precision", "bf16", "--launch.processes", "2", "--deepspeed", "zero3"], 3e-3),
    ],
)  # fmt: skip
def test_losses_follow_the_cpu(
    module: str,
    settings: list[str],
    tolerance: float,
    common: list[str],
    expected: Callable[[str], list[float]],
    tmp_path: Path,
) -> None:
    """Stopped after the sixth step and continued, with pictures of the prompts before and after."""
    if "2" in settings and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    command = ["train"] if module == "launcher" else []
    for steps in ("6", "10"):
        log = run(module, *command, *common, *settings, "--run_dir", str(tmp_path),
                  "--launch.accelerator", "cuda", "--steps", steps, "--accept_changes", "true")  # fmt: skip
        recorded = "bf16" in settings and not {"--cuda_graphs", "zero3"} & set(settings)
        assert ("replayed as CUDA graphs" in log) == recorded
    method = "dora" if "dora" in settings else "lora"
    assert losses_of(tmp_path) == pytest.approx(expected(method), rel=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_a_killed_process_ends_the_others(common: list[str], tmp_path: Path) -> None:
    """The other one waits for it inside NCCL; the same command then goes on from the checkpoint."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "launcher", "train", *common, "--run_dir", str(run_dir),
               "--launch.accelerator", "cuda", "--launch.processes", "2", "--steps"]  # fmt: skip
    checkpoints = run_dir / "checkpoints"
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen([*command, "100000"], cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while not list(checkpoints.glob("step_*")):
            assert running.poll() is None and time.monotonic() < deadline, Path(
                log.name
            ).read_text()
            time.sleep(0.1)
        os.kill(json.loads((run_dir / "logs" / "rank_1.json").read_text())["pid"], signal.SIGKILL)
        killed = time.monotonic()
        assert running.wait(timeout=60) not in (0, 2, 75)
    finally:
        running.kill()  # and with it, by its keeper, what it has started
    print(f"ended {time.monotonic() - killed:.1f} s after the kill")
    failure = json.loads((run_dir / "logs" / "failure.json").read_text())
    assert failure["where"].startswith("rank 1"), failure
    newest = max(checkpoints.glob("step_*")).name
    steps = str(int(newest.removeprefix("step_")) + 6)
    done = subprocess.run(
        [*command, steps, "--accept_changes", "true"], cwd=ROOT, text=True, capture_output=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "continuing after" in said and newest in said, said
