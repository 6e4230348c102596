"""Compiled blocks at ZeRO-3: the losses of plain ones at stage 2."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import trajectory
from pool import launch

from flux2_ds.config.plan import read_deepspeed

STEPS = 2
pytestmark = pytest.mark.dist


def zero3(name: str = "zero3") -> dict[str, Any]:
    """A shipped config; its persistence threshold would keep all of so small a model gathered."""
    config = read_deepspeed(name)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def compilable(name: str) -> dict[str, Any]:
    """As the plan sets it."""
    config = zero3(name)
    config["zero_optimization"]["memory_efficient_linear"] = False
    return config


def test_compiled_blocks_follow_plain_ones_at_stage_2(tmp_path: Path) -> None:
    """Each kind of block is one graph, traced once, and ZeRO-3 gathers what it reads, whether it keeps
    its activations or recomputes."""
    trajectory.base().save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    # A graph takes seconds to trace. Of two kinds of blocks, each kept or recomputed.
    kept, mixed, recomputed = ({"checkpointed": n, "compiled": True} for n in (0, 2, 3))
    kinds: list[dict[str, Any]] = [
        # On batches of another size; with the adapter and without.
        {"method": "lora", "rehearse": True, "base": True, "blocks": kept, "graphs": 6},
        {"method": "dora", "blocks": kept, "graphs": 2},
        # Of the second kind, one block recomputes and one keeps.
        {"method": "full", "blocks": mixed, "graphs": 3},
        # Two blocks of a kind share a graph, though DeepSpeed numbers their parameters; in fp8 the last block is not.
        {"method": "lora", "blocks": recomputed, "graphs": 2},
        {"method": "full", "compute": "fp8", "blocks": recomputed, "graphs": 3},
    ]
    kinds = [{"micro": 1, "steps": STEPS} | kind for kind in kinds]
    plain: dict[str, Any] = {
        "deepspeed": read_deepspeed("zero2"),
        "blocks": {"checkpointed": 0, "compiled": False},
    }
    uncompiled = [
        {name: value for name, value in (kind | plain).items() if name != "graphs"}
        for kind in kinds
    ]
    whole = launch(2, uncompiled, tmp_path)
    # Previews in between compile nothing.
    partitioned = {"deepspeed": compilable("zero3"), "files": str(tmp_path), "previewed": True}
    cases = [kind | partitioned for kind in kinds]
    if shutil.which("c++") is not None:  # for DeepSpeed's CPU Adam
        cases[2]["deepspeed"] = compilable("zero3_offload_optimizer")
        cases[3] |= {
            "deepspeed": compilable("zero3_offload"),
            "blocks": recomputed | {"offload": True},
        }
    parts = launch(2, cases, tmp_path)
    for kind, found, expected in zip(kinds, parts, whole, strict=True):
        assert found[0] == pytest.approx(expected[0], rel=1e-5), kind
        # See test_engine.py on fp8 products.
        assert found == pytest.approx(expected, rel=1e-2 if "compute" in kind else 1e-5), kind
