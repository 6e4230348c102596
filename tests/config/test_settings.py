"""What stands beside a setting's type: its range, and what a change means for a run that goes on."""

from dataclasses import replace

import pytest

from flux2_ds.config.recipe import Data, Log, Model, Optimizer, Recipe, recipe_values
from flux2_ds.config.settings import MayChange, changes, check_ranges, settings_of
from flux2_ds.errors import UserError

RECIPE = Recipe(run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s"))
MAY_CHANGE = [
    "run_dir",
    "accept_changes",
    "attention",
    "base_placement",
    "base_resident",
    "base_shard_group",
    "compile",
    "cuda_graphs",
    "cache_transposed_base",
    "activation_checkpointing",
    "offload_activations",
    "deepspeed",
    "batch.micro_size",
    "optimizer.nonfinite",
    "data.images",
    "data.caption_column",
    "data.mask_suffixes",
    "data.reference_suffixes",
    "data.num_workers",
    "data.cache",
    "data.cache_gb",
]
SECTIONS = ("captions.", "prepare.", "checkpoint.", "log.", "validation.", "preview.", "launch.")


def test_a_run_may_go_on_with_what_does_not_change_what_is_computed():
    always = {
        name
        for name, setting in settings_of(Recipe).items()
        if any(isinstance(mark, MayChange) and mark.if_({"optimizer.schedule": "rex"}) for mark in setting.marks)
    }  # fmt: skip
    assert always == {*MAY_CHANGE, *(n for n in settings_of(Recipe) if n.startswith(SECTIONS))}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"compile": True, "log": Log(every=3)}, []),
        ({"seed": 3}, ["seed was 0, is 3"]),
        ({"steps": 3}, []),
        (
            {"steps": 3, "optimizer": Optimizer(schedule="cosine")},
            ["optimizer.schedule was 'constant', is 'cosine'", "steps was 1000, is 3"],
        ),
        ({"data": replace(RECIPE.data, images="j", weights={"a": 2.0})},
         ["data.weights was {}, is {'a': 2.0}"]),
    ],
)  # fmt: skip
def test_what_a_change_means_for_a_run_that_goes_on(changed, said):
    now = recipe_values(replace(RECIPE, **changed))
    assert changes(Recipe, recipe_values(RECIPE), now) == said


def test_a_setting_that_a_stored_recipe_does_not_have_is_a_change():
    before = recipe_values(RECIPE)
    del before["lora"]["rank"]
    assert changes(Recipe, before, recipe_values(RECIPE)) == ["lora.rank was None, is 32"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_number_is_finite(value):
    recipe = replace(
        RECIPE, objective=replace(RECIPE.objective, logit_mean=value)
    )  # which has no range
    with pytest.raises(
        UserError, match=r"objective.logit_mean is (nan|inf); it must be a finite number"
    ):
        check_ranges(Recipe, recipe)


def test_a_number_that_no_run_counts_to_is_refused():
    with pytest.raises(UserError, match=r"steps is 1000000000000; it must be below 10¹²"):
        check_ranges(Recipe, replace(RECIPE, steps=10**12))
    check_ranges(Recipe, replace(RECIPE, steps=10**12 - 1, seed=2**64 - 1))
