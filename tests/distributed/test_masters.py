"""No update is lost to rounding: trainable weights have fp32 masters in every precision.

bf16 has 8 bits: at a weight of 0.25, steps of 1e-4 vanish. After 5 steps at that learning rate nearly
every element must have moved.
"""

from pathlib import Path

import pytest
import torch
import trajectory
from pool import launch

from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Data, Launch, Model, Recipe
from flux2_ds.model import transformer

STEPS, LEARNING_RATE, RANK = 5, 1e-4, 4
# ZeRO holds fp32 copies of whatever it partitions. Without it only an adapter has them, being fp32 itself.
COMBINATIONS: list[tuple[str, str, str | dict]] = [
    ("fp32", "lora", {}),
    ("bf16", "lora", {}),
    ("bf16", "lora", "zero2"),
    ("bf16", "lora", "zero3"),
    ("bf16", "dora", {}),
    ("bf16", "full", "zero1"),
    ("bf16", "full", "zero2"),
    ("bf16", "full", "zero3"),
]
pytestmark = pytest.mark.dist


def case_of(precision: str, method: str, deepspeed: str | dict, folder: Path) -> dict:
    """With the engine's sections as the plan makes them, and the weights as the trainer loads them."""
    recipe = Recipe(
        run_dir="unused",
        method=method,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        deepspeed=deepspeed,
        model=Model(path="unused"),
        data=Data(images="unused", shards="unused"),
        launch=Launch(accelerator="cpu"),
    )
    return {
        "method": method,
        "deepspeed": make_plan(recipe, 1).deepspeed,
        "micro": trajectory.GLOBAL_BATCH,
        "steps": STEPS,
        "save": str(folder / f"{precision}-{method}-{deepspeed or 'zero0'}"),
        "dtype": str(transformer.compute_dtype(precision)).removeprefix("torch."),
        "rank": RANK,
        "spread": 0.0,
        # Weight decay would move every element by itself.
        "optimizer": {"weight_decay": 0.0},
        "learning_rate": LEARNING_RATE,
    }


def test_nearly_every_trained_element_has_moved(tmp_path: Path) -> None:
    cases = [case_of(*combination, tmp_path) for combination in COMBINATIONS]
    launch(1, cases, tmp_path)
    for combination, case in zip(COMBINATIONS, cases, strict=True):
        found, _ = checkpoint.newest(Path(case["save"]))
        assert found is not None and found.step == STEPS
        model = trajectory.build(
            case["method"], dtype=getattr(torch, case["dtype"]), rank=RANK, spread=0.0
        )
        before, after = transformer.trainable(model), found.tensors("weights")
        assert before.keys() == after.keys()
        moved = sum(int((after[name] != p.float()).sum()) for name, p in before.items())
        share = moved / sum(p.numel() for p in before.values())
        assert share > 0.99, f"{combination}: {share:.1%} of the elements moved"
