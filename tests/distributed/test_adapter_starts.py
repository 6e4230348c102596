"""Adapters that begin with a file, over other adapters, or as a part of the base, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trajectory
from factories import gaussian
from pool import launch
from safetensors.torch import save_file

from flux2_ds.config.adapter import adapted_linears
from flux2_ds.config.plan import read_deepspeed
from flux2_ds.config.recipe import Lora
from flux2_ds.model.adapter_layouts import Update, diffusers_tensors

STEPS = 2
pytestmark = pytest.mark.dist


def test_they_begin_as_plain_pytorch_and_go_on_alike_at_every_stage(tmp_path: Path) -> None:
    base, file = trajectory.base(), str(tmp_path / "a.safetensors")
    base.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    adapter = {
        name: Update(gaussian(2, each.columns, seed=n) / 8, gaussian(each.rows, 2, seed=n + 99) / 8)
        for n, (name, each) in enumerate(adapted_linears(trajectory.SPEC, Lora()).items())
    }
    save_file(diffusers_tensors(adapter), file)
    starts: dict[str, dict[str, Any]] = {
        "init_from": {"init_from": file, "rank": 2},
        "merge_first": {"merge_first": [file], "rank": 2},
        "pissa": {"init": "pissa", "rank": 2},
    }

    def case(kind: str, stage: str, **more: Any) -> dict[str, Any]:
        where = {"files": str(tmp_path), "run_dir": str(tmp_path / f"{kind}-{stage}")}
        settings = {"lora": starts[kind], "name": stage, "deepspeed": read_deepspeed(stage)}
        return where | settings | {"method": "lora", "micro": 1, "steps": STEPS} | more

    alone = launch(1, [case(kind, "zero0") for kind in starts], tmp_path)
    together = [case(kind, stage) for kind in starts for stage in ("zero2", "zero3")]
    halves: list[dict[str, Any]] = []
    for kind in ("init_from", "pissa"):  # what a run that continues does not read, and does
        saved = str(tmp_path / f"saved-{kind}")
        halves += [case(kind, "zero3", steps=1, save=saved), case(kind, "zero3", load=saved)]
    found = launch(2, together + halves, tmp_path)
    for number, expected in enumerate(alone):
        for losses in found[2 * number : 2 * number + 2]:
            assert losses == pytest.approx(expected, rel=1e-5), together[2 * number]
    assert found[6] + found[7] == found[1] and found[8] + found[9] == found[5]

    def plain_loss() -> float:
        batch = trajectory.global_batch(0)
        with torch.no_grad():
            return float(trajectory.loss_of(lambda **x: base(**x, return_dict=False)[0], batch))

    before = plain_loss()
    for name, update in adapter.items():
        base.get_submodule(name).weight.data += update.up @ update.down
    after = plain_loss()
    assert [losses[0] for losses in alone] == pytest.approx([after, after, before], rel=1e-5)
    assert alone[0][1] != pytest.approx(alone[1][1], rel=1e-5) and abs(after - before) > 1e-3
