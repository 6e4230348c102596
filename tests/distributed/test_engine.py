"""One golden trajectory: every ZeRO stage, world size, accumulation and method follows plain PyTorch.

And one golden checkpoint: what one stage and world size saved, every other one continues.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import memory
import pytest
import torch
import trajectory
from diffusers import Flux2Transformer2DModel

from flux2_ds import checkpoint
from flux2_ds.plan import read_deepspeed
from flux2_ds.shipped import shipped_directory

STEPS = 8
TOLERANCE = 1e-5  # relative, on every loss; measured: 1e-7
CONFIGS = sorted(path.stem for path in shipped_directory("ds_configs").glob("*.json"))
# What plan.py adds for a full fine-tune in bf16.
BF16 = {
    "bf16": {"enabled": True, "check_grad_overflow": True},
    "data_types": {"grad_accum_dtype": "fp32"},
}
pytestmark = pytest.mark.dist


def configs() -> dict[str, dict[str, Any]]:
    """Every shipped config; offload needs a C++ compiler for DeepSpeed's CPU Adam."""
    found = {name: read_deepspeed(name) for name in CONFIGS}
    for name in ("zero3", "zero3_offload"):
        # The shipped threshold would keep every parameter of so small a model gathered.
        found[name]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if shutil.which("c++") is None:
        found = {name: value for name, value in found.items() if "offload" not in name}
    return found


def launch(world: int, cases: list[dict[str, Any]], folder: Path) -> list[list[float]]:
    """Run the cases in `world` processes; returns the losses of each."""
    (folder / "cases.json").write_text(json.dumps(cases))
    return start(world, trajectory.__file__, folder / "cases.json", folder)


def start(world: int, worker: str, argument: Path, folder: Path) -> Any:
    """Run `worker ARGUMENT RESULTS.json` in `world` processes; returns the results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, worker, argument, folder / "results.json"],
            env={
                **os.environ,
                **common,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            },
            stdout=(folder / f"rank{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    codes = [process.wait(timeout=900) for process in processes]
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, logs
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    return {method: trajectory.reference(method, STEPS) for method in ("lora", "dora", "full")}


def assert_follows(losses: list[float], expected: list[float], what: str) -> None:
    assert losses == pytest.approx(expected, rel=TOLERANCE), what


def test_the_reference_learns(references: dict[str, Any]) -> None:
    """A trajectory that updates nothing must not pass for one that does."""
    model = trajectory.build("lora")
    frozen = [
        trajectory.loss_of(lambda **x: model(**x, return_dict=False)[0], trajectory.global_batch(s))
        for s in range(STEPS)
    ]
    moved = max(abs(a.item() - b) / b for a, b in zip(frozen, references["lora"][0], strict=True))
    assert moved > 1000 * TOLERANCE


@pytest.mark.parametrize("world", [1, 2])
def test_every_config_follows_plain_pytorch(
    world: int, references: dict[str, Any], tmp_path: Path
) -> None:
    cases = [
        {"method": method, "name": name, "deepspeed": config, "micro": 1, "steps": STEPS}
        for name, config in configs().items()
        for method in ("lora", "full")
    ]
    for case in [case for case in cases if case["name"] in ("zero2", "zero3")]:
        if case["method"] == "full":
            cases.append({**case, "micro": 4 // world})
            cases.append({**case, "recompute": True})
        else:
            cases.append({**case, "method": "dora"})
    for case, losses in zip(cases, launch(world, cases, tmp_path), strict=True):
        described = {key: value for key, value in case.items() if key != "deepspeed"}
        assert_follows(losses, references[case["method"]][0], f"{world} processes, {described}")


def test_a_divided_model_follows_plain_pytorch(references: dict[str, Any], tmp_path: Path) -> None:
    """Every process reads its own parts of a sharded checkpoint; shipped persistence threshold."""
    trajectory.base().save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list(tmp_path.glob("transformer/*.safetensors"))) > 2
    config = read_deepspeed("zero3")
    kept_whole = config["zero_optimization"]["stage3_param_persistence_threshold"]
    assert kept_whole > 1000  # so that what persists is trained here, too
    cases = [
        {"method": method, "deepspeed": settings, "files": str(tmp_path), "micro": 1,
         "steps": STEPS}
        for method, settings in (
            ("lora", config), ("dora", config), ("full", config), ("full", configs()["zero3"])
        )
    ]  # fmt: skip
    for case, losses in zip(cases, launch(2, cases, tmp_path), strict=True):
        assert_follows(losses, references[case["method"]][0], str(case))


def test_no_process_holds_more_than_its_part_and_one_tensor(tmp_path: Path) -> None:
    """Peak resident memory of two processes that load 235 MB of weights from sharded files."""
    model = Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=8,
        attention_head_dim=128,
        joint_attention_dim=512,
    ).bfloat16()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.random_(generator=generator)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="100MB")
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    whole, largest = sum(sizes), max(sizes)
    assert len(list(tmp_path.glob("transformer/*.safetensors"))) > 2
    for result in start(2, memory.__file__, tmp_path, tmp_path):
        assert result["wrong"] == []
        assert result["own"] == pytest.approx(whole / 2, rel=1e-3)
        # A tensor is held three times at most: built whole, its rows in the file, its rows read.
        bound = result["own"] + 3 * largest
        assert bound < 0.8 * whole
        assert result["used"] < bound, result


def test_a_checkpoint_continues_on_any_stage_and_world_size(
    references: dict[str, Any], tmp_path: Path
) -> None:
    """Two processes save at stages 2 and 3; all configs continue on one, some on two processes."""
    half = STEPS // 2
    origins = [
        {"method": method, "deepspeed": configs()[name], "micro": 1, "steps": half,
         "save": str(tmp_path / f"{method}-{name}")}
        for method in ("lora", "full")
        for name in ("zero2", "zero3")
    ]  # fmt: skip
    launch(2, origins, tmp_path)

    def continued(method: str, name: str, world: int) -> list[dict[str, Any]]:
        return [
            {"method": method, "deepspeed": configs()[name], "micro": 1, "steps": STEPS,
             "load": origin["save"], "save": f"{origin['save']}-{name}-{world}"}
            for origin in origins
            if origin["method"] == method
        ]  # fmt: skip

    work = {
        1: [case for name in configs() for case in continued("full", name, 1)],
        2: [case for name in ("zero0", "zero2", "zero3") for case in continued("lora", name, 2)],
    }
    for world, cases in work.items():
        for case, losses in zip(cases, launch(world, cases, tmp_path), strict=True):
            expected_losses, expected_weights = references[case["method"]]
            assert_follows(losses, expected_losses[half:], case["save"])
            found, _ = checkpoint.newest(Path(case["save"]))
            assert found is not None
            for name, value in found.tensors("weights").items():
                # Adam divides by the root of tiny second moments, so single elements differ more
                # than the tensor does when the order of a sum changes.
                error = (value - expected_weights[name]).norm() / expected_weights[name].norm()
                assert error < 1e-4, f"{case['save']}: {name} differs by {error:.1e}"


def test_resuming_on_the_same_configuration_is_exact(tmp_path: Path) -> None:
    """N + N steps are 2N steps, to the last bit: losses, weights and Adam's moments."""
    names = ("zero0", "zero2", "zero3", "zero1 bf16", "zero2 bf16", "zero3 bf16")
    cases = []
    for name in names:
        config, _, low = name.partition(" ")
        settings = configs()[config] | (BF16 if low else {})
        common = {"method": "full" if low else "lora", "deepspeed": settings, "micro": 2}
        whole, half, resumed = (str(tmp_path / f"{part}-{name}") for part in "whr")
        cases += [
            {**common, "steps": STEPS, "save": whole},
            {**common, "steps": STEPS // 2, "save": half},
            {**common, "steps": STEPS, "load": half, "save": resumed},
        ]
    results = launch(1, cases, tmp_path)
    for place, name in enumerate(names):
        uninterrupted, _, resumed_losses = results[3 * place : 3 * place + 3]
        assert resumed_losses == uninterrupted[STEPS // 2 :], name
        one, _ = checkpoint.newest(tmp_path / f"w-{name}")
        two, _ = checkpoint.newest(tmp_path / f"r-{name}")
        assert one is not None and two is not None
        assert one.state()["updates"] == two.state()["updates"] == STEPS
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            for parameter, value in one.tensors(kind).items():
                assert torch.equal(value, two.tensors(kind)[parameter]), f"{kind} of {parameter}"
