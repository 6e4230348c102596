"""`bench` on several processes: the same step whatever the stage, and one result for all."""

import json
import sys
from pathlib import Path

import pytest
from forked import ForkedTree
from pool import launch
from test_zero3 import zero3

from flux2_ds.commands.tiny import make_tiny

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("method", ["dora", "full"])
def test_processes_take_the_step_of_one(tmp_path: Path, method: str) -> None:
    """Its samples, weights and adapter are those of one process with more micro-batches, so that the last
    process's last micro-batch has the same loss in every step."""
    cases = [
        {"bench": {"method": method, "deepspeed": config}} for config in ("zero0", "zero2", zero3())
    ]
    ((*alone,),) = launch(1, cases[:1], tmp_path)
    assert len(alone) == 5 and alone[-1] < 0.99 * alone[0]
    for losses in launch(2, cases, tmp_path):
        assert losses == pytest.approx(alone, rel=1e-5)


def test_one_command_times_all_processes(tmp_path: Path) -> None:
    """Started by the launcher through DeepSpeed's; the first process alone speaks, and nothing is left."""
    make_tiny(tmp_path / "model", "klein")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "recipe.yaml").write_text(
        "{run_dir: run, deepspeed: zero2, model: {path: model}, data: {images: i, shards: s}, "
        "batch: {global_size: 4, micro_size: 1}, launch: {accelerator: cpu, processes: 2}}"
    )
    asked = "--width 64 --height 64 --measure 1 --warm-up 1 --json --profile trace/step.json"
    argv = [sys.executable, "-m", "launcher", "bench", "--config", "recipe.yaml", *asked.split()]
    benched = ForkedTree(argv, tmp_path / "out", tmp_path, {"TMPDIR": str(tmp_path / "tmp")})
    code, said = benched.wait(300), (tmp_path / "out").read_text()
    assert code == 0, said
    assert said.count("\n{\n") == 1
    result, _ = json.JSONDecoder().raw_decode(said, said.index("{\n"))
    assert (result["processes"], result["global_batch"], result["micro_batch"]) == (2, 4, 1)
    assert result["kernels"] and (tmp_path / "trace" / "step.json").exists()
    assert "--module flux2_ds.commands.bench" in said
    assert not list((tmp_path / "tmp").glob("flux2-ds-bench-*"))
    assert not (tmp_path / "run").exists()
