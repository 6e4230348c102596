"""The demo, from nothing to its table, against limits far outside of what was measured (docs/demo.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("demo")
    program = [sys.executable, "examples/demo/demo.py", "--out", str(out)]
    subprocess.run(program, cwd=ROOT, check=True)
    return json.loads((out / "demo.json").read_text())


def test_judge_knows_real_images(result: dict[str, Any]) -> None:
    assert result["ceiling of 52"] >= 0.9


def test_base_model_draws_its_objects_and_no_panda(result: dict[str, Any]) -> None:
    base = result["base"]
    assert base["objects named"] >= 0.8
    assert base["backgrounds right"] >= 0.9
    assert base["panda named"] <= 0.1
    assert base["panda rank"] >= 10


@pytest.mark.parametrize("variant", ["pandas alone", "pandas and prior images"])
def test_adapter_draws_pandas(result: dict[str, Any], variant: str) -> None:
    (adapter,) = result["adapters"][variant]
    assert adapter["pairs won"] >= 0.85
    assert adapter["mean gain"] >= 0.15
    assert adapter["panda rank"] <= 6
    assert adapter["objects named panda"] <= 0.15
    assert adapter["backgrounds right"] >= 0.9


def test_prior_images_preserve_the_objects(result: dict[str, Any]) -> None:
    (adapter,) = result["adapters"]["pandas and prior images"]
    assert adapter["objects named"] >= result["base"]["objects named"] - 0.2
