"""What a generation of GPUs cannot compute, and which card a name means."""

import re
from dataclasses import replace

import pytest

from flux2_ds.config.cards import CARD_NAMES, Card, card_named, card_problem, peak_tflops
from flux2_ds.config.recipe import Data, Model, Recipe

RECIPE = Recipe(run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s"))
TURING, AMPERE, ADA, HOPPER = (7, 5), (8, 6), (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("changes", "refused", "runs", "words"),
    [
        ({"precision": "bf16"}, TURING, AMPERE, "precision is bf16, .* Ampere .* precision: fp16"),
        ({"precision": "fp32"}, None, TURING, ""),
        ({"attention": "cudnn"}, TURING, AMPERE, "attention is cudnn, .* attention: auto"),
        ({"attention": "flash_attn"}, TURING, AMPERE, "attention is flash_attn, .* attention: auto"),
        ({"attention": "efficient"}, None, TURING, ""),
        ({"compute": "fp8"}, AMPERE, ADA, "compute is fp8, .* Ada, Hopper or newer; .* remove compute"),
        ({"base_weights": "int8"}, TURING, AMPERE, "is int8, .* Ampere .*, or remove base_weights"),
        ({"base_weights": "fp8"}, AMPERE, ADA, "is fp8, .* or set base_weights: int8, or remove"),
        ({"base_weights": "nf4_fp8"}, AMPERE, ADA, "is nf4_fp8, .* set base_weights: nf4_int8"),
        ({"base_weights": "nf4_int8"}, TURING, AMPERE, "is nf4_int8, .* or remove base_weights"),
        ({"base_weights": "nf4"}, TURING, AMPERE, "is nf4, .* another GPU, or remove base_weights"),
    ],
)  # fmt: skip
def test_what_a_card_cannot_compute_is_refused_with_what_works(changes, refused, runs, words):
    recipe = replace(RECIPE, **{"precision": "fp32"} | changes)
    assert card_problem(recipe, Card("new", runs)) is None
    if refused is not None:
        problem = card_problem(recipe, Card("old", refused))
        assert problem is not None
        assert re.search(words, problem)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("rtx 3090", "RTX 3090"),
        *((name, name) for name in CARD_NAMES),
        ("A100", None),
        ("24GiB", None),
        ("", None),
    ],
)
def test_a_card_is_known_by_its_name(name, card):
    found = card_named(name)
    assert (found and found.name) == card


def test_mfu_is_a_share_of_the_products_own_peak():
    assert peak_tflops("NVIDIA H200", "fp8") == 2 * peak_tflops("NVIDIA H200", "bf16") == 1979
    assert peak_tflops("NVIDIA A100-SXM4-40GB", "fp8") is None
    assert peak_tflops("", "bf16") is None is peak_tflops("NVIDIA H200", "fp32")
