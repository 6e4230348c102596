"""LoKr and LoHa at every ZeRO stage, over quantized, streamed and partitioned bases, and when they continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trajectory
from pool import launch
from test_zero3 import zero3

from flux2_ds.config.plan import read_deepspeed

STEPS = 2
pytestmark = pytest.mark.dist


def test_they_follow_plain_pytorch_and_continue_to_the_last_bit(tmp_path: Path) -> None:
    trajectory.base().save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    files = {"files": str(tmp_path), "micro": 1, "steps": STEPS}
    two = files | {"deepspeed": read_deepspeed("zero2"), "optimizer": {"ema_decay": 0.9}}
    three = two | {"deepspeed": zero3()}
    placed = two | {"streamed": [0, 1, 2], "shard_group": 2}
    half = {"steps": 1, "save": str(tmp_path / "lokr")}
    rest = {"load": half["save"]}
    lokr = [two, placed, two | half, two | rest, three, three | rest]
    loha = [two, three, two | {"base_weights": "nf4"}, placed | {"base_weights": "nf4"}]
    cases: list[dict[str, Any]] = [case | {"method": "lokr"} for case in lokr]
    cases += [case | {"method": "loha"} for case in loha]
    found = launch(2, cases, tmp_path)
    plain, *_ = trajectory.reference("lokr", STEPS)
    assert found[0] == pytest.approx(plain, rel=1e-5)
    assert found[0] == found[1] == found[2] + found[3]
    assert found[4] == pytest.approx(plain, rel=1e-5)
    assert found[5] == pytest.approx(plain[1:], rel=1e-5)
    plain, *_ = trajectory.reference("loha", STEPS)
    assert found[6] == pytest.approx(plain, rel=1e-5)
    assert found[7] == pytest.approx(plain, rel=1e-5)
    assert found[9] == found[8] != found[6]
