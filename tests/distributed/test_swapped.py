"""The frozen base on NVMe: the losses and checkpoints of ZeRO-3 without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import trajectory
from deepspeed.ops.op_builder import AsyncIOBuilder
from pool import launch

from flux2_ds.config.model_spec import Spec
from flux2_ds.config.plan import make_plan, read_deepspeed
from flux2_ds.config.recipe import Batch, Data, Launch, Model, Recipe

STEPS = 3
WIDE = Spec("klein", "Flux2KleinPipeline", 1, 2, 6, 128, 48, False)
"""As trajectory.SPEC, but most of its weights are as large as DeepSpeed swaps: 1 MiB and more."""
pytestmark = [
    pytest.mark.dist,
    pytest.mark.nvme,
    pytest.mark.skipif(
        shutil.which("c++") is None or not AsyncIOBuilder().is_compatible(verbose=False),
        reason="DeepSpeed's async_io needs a C++ compiler and libaio-dev",
    ),
]


def configs(folder: Path, **offload: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stage 3 as the plan makes it, with the base in place and on NVMe."""
    made = []
    for swapped in ({}, {"offload_param": {"device": "nvme", "nvme_path": str(folder)}}):
        config = read_deepspeed("zero3")
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            **offload,
            **swapped,
        }
        recipe = Recipe(
            run_dir="unused",
            deepspeed=config,
            compile=True,
            batch=Batch(global_size=2),
            model=Model(path="unused"),
            data=Data(images="unused", shards="unused"),
            launch=Launch(accelerator="cpu"),
        )
        made.append({"zero_optimization": make_plan(recipe, 2).zero})
    return made[0], made[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("wide")
    trajectory.base(WIDE).save_pretrained(folder / "transformer")
    return str(folder)


def test_a_swapped_base_follows_one_in_place(tmp_path: Path, files: str) -> None:
    """Blocks that keep and that recompute, with previews in between, which read it, too. Of a quantised base
    the values are swapped; scales stay in host memory, as does the optimizer in the second config."""
    place = tmp_path / "nvme"
    in_place, on_host = configs(place), configs(place, offload_optimizer={"device": "cpu"})
    common = {"method": "lora", "micro": 1, "steps": STEPS, "files": files, "previewed": True}
    blocks = {"blocks": {"kept": 1, "compiled": True}, "graphs": 3}
    kinds: list[tuple[dict[str, Any], tuple[dict[str, Any], dict[str, Any]]]] = [
        ({}, in_place),
        ({"dtype": "bfloat16"}, on_host),
        ({"method": "dora"}, in_place),
        ({"base_weights": "nf4"}, on_host),
    ]
    expected, found = (
        launch(
            2, [common | blocks | kind | {"deepspeed": both[at]} for kind, both in kinds], tmp_path
        )
        for at in (0, 1)
    )
    for (kind, _), one, other in zip(kinds, found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6), kind
    for dtype, least in (("float32", 90e6), ("bfloat16", 40e6), ("uint8", 4e6)):
        files = [file for file in place.rglob("*.swp") if f"{dtype}params" in file.parts]
        assert sum(file.stat().st_size for file in files) > least, dtype


def test_checkpoints_are_those_of_a_base_in_place(tmp_path: Path, files: str) -> None:
    """Written and read; an adapter so large that DeepSpeed would swap it, in fp32 over bf16, is exact."""
    held, swapped = configs(tmp_path / "nvme")
    case: dict[str, Any] = {
        "method": "lora",
        "micro": 1,
        "files": files,
        "dtype": "bfloat16",
        "rank": 300,
    }
    case |= {"blocks": {"kept": 3, "compiled": True}, "graphs": 2}
    whole = {"steps": STEPS, "deepspeed": held, "save": str(tmp_path / "a"), "save_at": 2}
    first = {"steps": 2, "deepspeed": swapped, "save": str(tmp_path / "b")}
    second = {"steps": STEPS, "deepspeed": swapped, "load": str(tmp_path / "b")}
    second["save"] = str(tmp_path / "b")
    losses = launch(2, [case | part for part in (whole, first, second)], tmp_path)
    assert losses[1] + losses[2] == losses[0]
    for file in sorted((tmp_path / "a").rglob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
