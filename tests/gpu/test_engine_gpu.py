"""One golden trajectory: on one, two and four GPUs every ZeRO stage follows plain PyTorch on one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_ds.config.parse import shipped_directory
from flux2_ds.config.plan import read_deepspeed

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
STEPS = 20
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Relative, on every loss."""
KINDS = [("lora", "float32"), ("lora", "bfloat16"), ("dora", "bfloat16"), ("full", "float32")]
"""Method and the base's dtype. A full fine-tune in bf16 has fp32 masters, which the plain loop has not."""
STAGES = sorted(path.stem for path in shipped_directory("ds_configs").glob("*.json"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("method", "dtype"), KINDS)
def test_every_stage_follows_plain_pytorch(
    method: str, dtype: str, world_size: int, tmp_path: Path
) -> None:
    """In processes of their own, because DeepSpeed chooses its accelerator once."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    given = {"method": method, "dtype": dtype, "steps": STEPS}
    cases = []
    for name in STAGES:
        config = read_deepspeed(name)
        if "zero3" in name:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        cases += [
            given | {"name": name, "deepspeed": config, "micro": micro}
            for micro in sorted({1, 4 // world_size})
        ]
        if method == "full" and name in ("zero1", "zero2"):  # whose update is one compiled pass
            cases.append(cases[-1] | {"blocks": {"checkpointed": 0, "compiled": True}})
    expected, found = train(cases, world_size, tmp_path)
    assert expected[-1] < 0.98 * expected[0]
    worst = 0.0
    for case, losses in zip(cases, found, strict=True):
        error = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        worst = max(worst, error)
        assert error < TOLERANCE[dtype], (case, error)
    print(f"{world_size} GPUs, {method} {dtype}: {worst:.1e}")


def train(
    cases: list[dict[str, Any]], world_size: int, folder: Path
) -> tuple[list[float], list[list[float]]]:
    """Losses of plain PyTorch, and of each case in `world_size` processes with a GPU each."""
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    logs = [folder / f"{rank}.log" for rank in range(world_size)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder)],
            cwd=DISTRIBUTED, stdout=log.open("w"), stderr=subprocess.STDOUT,
            env={**os.environ, **meeting, "DS_ACCELERATOR": "cuda", "WORLD_SIZE": str(world_size),
                 "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    while None in (codes := [process.poll() for process in processes]):
        if any(codes):  # the others would wait for it in NCCL
            for process in processes:
                process.kill()
        time.sleep(0.1)
    assert codes == [0] * world_size, "\n".join(log.read_text() for log in logs)
    expected, found = json.loads((folder / "losses.json").read_text())
    return expected, found


WORKER = """
import json, sys, torch, trajectory
from pathlib import Path
from flux2_ds.distributed import destroy_process_group, init_process_group
process, folder = init_process_group("cuda"), Path(sys.argv[1])
cases = json.loads((folder / "cases.json").read_text())
method, steps, dtype = (cases[0][name] for name in ("method", "steps", "dtype"))
expected, *_ = trajectory.reference(method, steps, device="cuda", dtype=getattr(torch, dtype))
found = [trajectory.run_case(case, process) for case in cases]
if process.is_rank0:
    (folder / "losses.json").write_text(json.dumps([expected, found]))
destroy_process_group()
"""
