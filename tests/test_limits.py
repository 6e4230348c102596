"""docs/limits.md and docs/numerics.md name tests and settings that exist, and say what is true."""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from flux2_ds.config.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["limits", "numerics"]


def code_in(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", (ROOT / "docs" / f"{page}.md").read_text())


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_a_page_names_exist(page: str) -> None:
    named = [each for each in code_in(page) if re.match(r"(tests/.*/)?test_\w+\.py", each)]
    assert len(named) > 10
    for each in named:
        file, _, function = each.partition("::")
        (path,) = ROOT.glob(f"tests/*/{Path(file).name}")
        assert not function or f"\ndef {function}(" in path.read_text(), each


@pytest.mark.parametrize("page", PAGES)
def test_the_settings_that_a_page_names_exist(page: str) -> None:
    kinds = get_type_hints(Recipe)
    named = 0
    for each in code_in(page):
        section, _, setting = each.split(":")[0].partition(".")
        if section not in kinds or not re.fullmatch(r"\w*", setting):
            continue
        named += 1
        if setting:
            assert setting in {field.name for field in dataclasses.fields(kinds[section])}, each
    assert named > 5


def test_the_transformer_cannot_slice_attention() -> None:
    assert hasattr(Flux2KleinPipeline, "enable_attention_slicing")
    assert not hasattr(Flux2Transformer2DModel, "set_attention_slice")
