"""`bench` on a card, with a base in host memory and with one held twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_train_gpu import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_what_a_step_takes_is_said(tmp_path: Path) -> None:
    model = tmp_path / "model"
    run("launcher", "tiny", "--variant", "klein", "--size", "mid", "--out", str(model))
    common = ["bench", "--config", "recipes/smoke-cpu.yaml", "--model.path", str(model), "--precision",
              "bf16", "--batch.global_size", "1", "--batch.micro_size", "1", "--launch.processes", "1",
              "--launch.accelerator", "cuda", "--width", "256", "--height", "256", "--measure", "2",
              "--warm-up", "1", "--json"]  # fmt: skip
    found = {}
    for name, settings in {
        "streamed": ["--deepspeed", "zero3_offload"],
        "twice": ["--deepspeed", "zero0", "--base_weights", "fp8"],
        "once": [
            "--deepspeed",
            "zero0",
            "--base_weights",
            "fp8",
            "--cache_transposed_base",
            "false",
        ],
    }.items():
        printed = run("launcher", *common, *settings)
        found[name] = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])
    assert found["twice"]["cache_transposed_base"] and not found["once"]["cache_transposed_base"]
    copy = found["twice"]["peak_gib"] - found["once"]["peak_gib"]
    expected = found["twice"]["predicted_gib"] - found["once"]["predicted_gib"]
    assert copy == pytest.approx(expected, rel=0.1)
    # What the compiler takes is counted with it, about 1.1 GiB.
    streamed = found["streamed"]
    assert 0 <= streamed["host_gib"] - streamed["predicted_host_gib"] < 1.5
