"""What is refused before a model is loaded, and what all processes decide alike."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from flux2_ds import assembly
from flux2_ds.assembly import check_machine, finish_model
from flux2_ds.engine import Process
from flux2_ds.errors import UserError
from flux2_ds.memory import GIB, kept_blocks
from flux2_ds.model import transformer
from flux2_ds.plan import make_plan
from flux2_ds.recipe import Batch, Data, Model, Recipe
from flux2_ds.spec import Spec

CPU = torch.device("cpu")
RECIPE = Recipe(run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"attention": "efficient"}, None),
        ({"attention": "xformers"}, "attention is xformers: .*xformers.* Or set attention: auto"),
        ({"deepspeed": {"zero_optimization": {"overlap_com": True}}}, "deepspeed config: overlap_com"),
    ],
)  # fmt: skip
def test_what_cannot_run_here_is_refused_before_a_model_is_loaded(
    changes: dict[str, Any], message: str | None
) -> None:
    plan = make_plan(replace(RECIPE, **changes), 1)
    if message is None:
        check_machine(plan, CPU)
    else:
        with pytest.raises(UserError, match=message):
            check_machine(plan, CPU)


def test_all_processes_keep_as_many_blocks_as_the_fullest_card_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At stage 3 another number in one of them would leave the others waiting."""
    spec = Spec("klein", "Flux2KleinPipeline", 1, 3, 2, 32, 64, False)
    plan = make_plan(replace(RECIPE, batch=Batch(global_size=2)), 2)
    kept: list[int] = []
    monkeypatch.setattr(assembly, "arrange_blocks", lambda model, **how: kept.append(how["kept"]))
    monkeypatch.setattr(assembly, "exchange", lambda free: [free, 0.601 * GIB])
    model = transformer.new_transformer(spec)
    finish_model(model, spec, plan, Process(0, 2, CPU), 64)
    assert kept == [kept_blocks(spec, plan, 64, 0.601 * GIB)] and kept[0] < spec.blocks
