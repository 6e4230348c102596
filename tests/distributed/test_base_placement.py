"""A frozen base in host memory or sharded over the ranks: the losses of one on every device, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trajectory
from pool import launch

from flux2_ds.config.plan import read_deepspeed

STEPS = 2
ALL = [0, 1, 2]
pytestmark = pytest.mark.dist


def recomputing(checkpointed: int) -> dict[str, Any]:
    return {"checkpointed": checkpointed, "compiled": False}


KINDS: list[dict[str, Any]] = [
    {"method": "lora", "deepspeed": {}, "base": True},
    {"method": "lora", "deepspeed": read_deepspeed("zero2"), "base": True},
    {"method": "lora", "deepspeed": read_deepspeed("zero2"), "dtype": "bfloat16", "rehearse": True},
    {"method": "dora", "deepspeed": read_deepspeed("zero1"), "base_weights": "nf4", "previewed": True,
     "blocks": recomputing(2)},
    {"method": "lora", "deepspeed": read_deepspeed("zero2"), "base_weights": "fp8",
     "blocks": recomputing(3)},
]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> str:
    trajectory.base().save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("world_size", "kinds", "placements"),
    [
        (1, KINDS[::2], [{"streamed": ALL}]),
        (2, KINDS, [{"streamed": ALL}, {"streamed": [0, 2], "shard_group": 2}]),
        (4, KINDS[1::2], [{"streamed": ALL, "shard_group": 4}, {"streamed": ALL, "shard_group": 2}]),
    ],
)  # fmt: skip
def test_wherever_the_base_is_the_losses_are_the_same(
    world_size: int, kinds: list[dict[str, Any]], placements: Any, files: str, tmp_path: Path
) -> None:
    kinds = [kind | {"files": files, "micro": 1, "steps": STEPS} for kind in kinds]
    cases = kinds + [kind | placed for placed in placements for kind in kinds]
    found = launch(world_size, cases, tmp_path)
    for number, losses in enumerate(found):
        assert losses == found[number % len(kinds)], cases[number]
        assert losses[0] != losses[-1]


def test_a_checkpoint_continues_over_a_base_anywhere_else(files: str, tmp_path: Path) -> None:
    places: list[dict[str, Any]] = [
        {}, {"streamed": ALL}, {"streamed": ALL, "shard_group": 2}
    ]  # fmt: skip
    whole = KINDS[3] | {"files": files, "micro": 1, "steps": STEPS}
    cases = [whole]
    for number, place in enumerate(places):
        half = whole | {"steps": STEPS // 2, "save": str(tmp_path / f"saved-{number}")}
        cases += [half | place, whole | {"load": half["save"]} | places[number - 1]]
    expected, *found = launch(2, cases, tmp_path)
    for before, after in zip(found[::2], found[1::2], strict=True):
        assert before + after == expected
