"""Which linears an adapter changes, with which rank and scale."""

import math

import pytest

from flux2_ds.config.adapter import adapted_linears, adapter_line
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Data, Lora, Model, Recipe
from flux2_ds.errors import UserError

SPEC = Spec("klein", "Flux2KleinPipeline", 2, 12, 2, 32, 48, False)
QKV = [f"transformer_blocks.{block}.attn.to_{x}" for block in (0, 1) for x in "qkv"]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("attn.to_[qkv]", QKV),
        (["attn.to_v", "attn.to_[qk]"], QKV),
        ("transformer_blocks.1.ff.linear_in", ["transformer_blocks.1.ff.linear_in"]),
        # The start of a name is a block of one kind, not the end of another kind's name.
        ("transformer_blocks.1.attn.to_out.*", ["transformer_blocks.1.attn.to_out.0"]),
        (
            r"single_transformer_blocks.1\d.attn.to_out",
            [
                "single_transformer_blocks.10.attn.to_out",
                "single_transformer_blocks.11.attn.to_out",
            ],
        ),
    ],
)
def test_targets_by_expression(targets: str | list[str], names: list[str]) -> None:
    assert list(adapted_linears(SPEC, Lora(targets=targets))) == names


def test_ranks_and_alphas_by_pattern() -> None:
    """The first pattern that matches holds; alpha is the rank of the linear where none is given."""
    ranks = {"0.attn.to_q": 4, "attn.to_[qk]": 8}
    settings = Lora(rank=16, targets="attn.to_[qkv]", rank_pattern=ranks)
    found = adapted_linears(SPEC, settings)
    assert [each.rank for each in found.values()] == [4, 8, 16, 8, 8, 16]
    assert {each.scale for each in found.values()} == {1.0}
    settings = Lora(rank=16, alpha=8, targets="attn.to_[qkv]", rank_pattern=ranks,
                    alpha_pattern={"attn.to_v": 2.0}, rslora=True)  # fmt: skip
    scales = [8 / 2, 8 / math.sqrt(8), 2 / 4, 8 / math.sqrt(8), 8 / math.sqrt(8), 2 / 4]
    assert [each.scale for each in adapted_linears(SPEC, settings).values()] == scales


def test_counts_for_people() -> None:
    settings = Lora(rank=16, targets=["attn.to_[qk]"], rank_pattern={"attn.to_k": 8})
    recipe = Recipe(run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s"),
                    method="dora", lora=settings)  # fmt: skip
    parameters = 2 * 2 * 64 * (16 + 8) + 4 * 64
    line = f"{parameters:,} parameters in 4 linears: 2 of rank 8, 2 of rank 16"
    assert adapter_line(SPEC, recipe) == line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "attnetion"}, r"lora.targets: attnetion matches no linear.* attention"),
        ({"targets": ["attn.to_q", "to_x"]}, "lora.targets: to_x matches no linear"),
        ({"targets": []}, r"lora.targets is \[\]"),
        ({"targets": "attn.(to_q"}, "lora.targets: .* no regular expression"),
        ({"rank_pattern": {"o_q": 3}}, "lora.rank_pattern: o_q matches no linear"),
        (
            {"targets": "attn.to_q", "alpha_pattern": {"attn.to_k": 3.0}},
            "lora.alpha_pattern: attn.to_k matches no linear",
        ),
    ],
)
def test_what_matches_nothing_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted_linears(SPEC, Lora(**settings))
