"""One golden trajectory: on a GPU every ZeRO stage follows plain PyTorch on the same GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flux2_ds.plan import read_deepspeed

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
STEPS = 20
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Relative, on every loss."""
STAGES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    ("method", "dtype"),
    # A full fine-tune in bf16 has fp32 masters, which the plain loop has not.
    [("lora", "float32"), ("lora", "bfloat16"), ("dora", "bfloat16"), ("full", "float32")],
)
def test_every_stage_follows_plain_pytorch(method: str, dtype: str) -> None:
    """In a process of its own, because DeepSpeed chooses its accelerator once."""
    cases = []
    for name in STAGES:
        config = read_deepspeed(name)
        if "zero3" in name:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        cases += [
            {"method": method, "name": f"{name} in {4 // micro} micro-batches", "dtype": dtype,
             "deepspeed": config, "micro": micro, "steps": STEPS}
            for micro in (1, 4)
        ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WORKER, json.dumps(cases)],
        cwd=DISTRIBUTED, env={**os.environ, "DS_ACCELERATOR": "cuda"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    expected, *found = json.loads(done.stdout.splitlines()[-1])
    assert expected[-1] < 0.98 * expected[0]
    worst = {
        case["name"]: max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        for case, losses in zip(cases, found, strict=True)
    }
    print(method, dtype, {name: f"{error:.1e}" for name, error in worst.items()})
    assert max(worst.values()) < TOLERANCE[dtype], worst


WORKER = """
import json, sys, torch, trajectory
from flux2_ds.engine import start_process, stop_process
process, cases = start_process("cuda"), json.loads(sys.argv[1])
first = cases[0]
dtype = getattr(torch, first["dtype"])
losses, _ = trajectory.reference(first["method"], first["steps"], device="cuda", dtype=dtype)
results = [losses, *(trajectory.run_case(case, process) for case in cases)]
stop_process()
print(json.dumps(results))
"""
