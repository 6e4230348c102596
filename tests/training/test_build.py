"""What is refused before a model is loaded, and what all processes decide alike."""

import socket
from dataclasses import replace
from typing import Any

import pytest
import torch

from flux2_ds.config.memory import GIB, kept_blocks
from flux2_ds.config.model_spec import RELEASED, Spec
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Batch, Data, Launch, Model, Recipe
from flux2_ds.distributed import Process
from flux2_ds.errors import UserError
from flux2_ds.model import transformer
from flux2_ds.model.load import place_weight
from flux2_ds.ops.quantized_linear import QuantizedLinear
from flux2_ds.training import build as assembly
from flux2_ds.training.build import check_machine, finish_model, placed

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


def test_a_card_that_cannot_compute_it_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A6000")
    cuda = torch.device("cuda")
    check_machine(make_plan(replace(RECIPE, base_weights="int8"), 1), cuda)
    with pytest.raises(UserError, match=r"base_weights is fp8, .* the GPU is NVIDIA RTX A6000"):
        check_machine(make_plan(replace(RECIPE, base_weights="fp8"), 1), cuda)


def test_all_processes_keep_as_many_blocks_as_the_fullest_card_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At stage 3 another number in one of them would leave the others waiting."""
    spec = Spec("klein", "Flux2KleinPipeline", 1, 3, 2, 32, 64, False)
    plan = make_plan(replace(RECIPE, batch=Batch(global_size=2)), 2)
    found: list[int] = []
    monkeypatch.setattr(
        assembly, "configure_blocks", lambda model, **how: found.append(how["checkpointed"])
    )
    monkeypatch.setattr(assembly, "all_gather_object", lambda free: [free, 0.601 * GIB])
    model = transformer.new_transformer(spec)
    finish_model(model, spec, plan, Process(0, 2, CPU), 64)
    assert found == [spec.blocks - kept_blocks(spec, plan, 64, 0.601 * GIB)] and found[0] > 0


def test_where_the_base_is_fits_the_fullest_card(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RELEASED["black-forest-labs/FLUX.2-klein-base-4B"]
    others = {"batch": Batch(global_size=2), "base_weights": "fp8", "deepspeed": "zero0"}

    def decided(placement: str, card: float, host: float) -> tuple[str, float]:
        plan = make_plan(replace(RECIPE, base_placement=placement, **others), 2)
        given = iter([["a", socket.gethostname()], [(80 * GIB, 64 * GIB), (card, host)]])
        monkeypatch.setattr(assembly, "all_gather_object", lambda _: next(given))
        recipe = placed(plan, spec, Process(0, 2, CPU), 4096).recipe
        return recipe.base_placement, recipe.base_resident

    assert decided("auto", 24 * GIB, 8 * GIB) == ("gpu", 0.0)
    assert decided("auto", 5.5 * GIB, 8 * GIB)[0] == "host"
    assert decided("host", 5.5 * GIB, 8 * GIB) == ("host", 0.0)
    for card, host in ((0.5 * GIB, 8 * GIB), (8 * GIB, 0.5 * GIB)):
        with pytest.raises(
            UserError, match=r"is host, and the weights take 1\.0 GiB of a card and 3\.4 GiB"
        ):
            decided("host", card, host)
    with pytest.raises(
        UserError,
        match=r"free are 12\.0 and 0\.5 GiB\. This fits: deepspeed: \w+, .* base_placement: gpu",
    ):
        decided("host", 12 * GIB, 0.5 * GIB)
    with pytest.raises(UserError, match="Nothing fits: use a larger card"):
        decided("auto", 0.5 * GIB, 0.5 * GIB)


@pytest.mark.parametrize("room", [GIB, 0.55 * GIB])
def test_an_8_bit_base_is_held_transposed_where_the_fullest_card_allows(
    monkeypatch: pytest.MonkeyPatch, room: float
) -> None:
    spec = Spec("klein", "Flux2KleinPipeline", 1, 3, 2, 32, 64, False)
    changes = {
        "base_weights": "fp8",
        "batch": Batch(global_size=2),
        "launch": Launch(accelerator="cpu"),
    }
    plan = make_plan(replace(RECIPE, **changes), 2)
    monkeypatch.setattr(assembly, "all_gather_object", lambda free: [free, room])
    model = transformer.new_transformer(spec)
    for name, parameter in list(model.named_parameters()):
        place_weight(model, name, parameter.detach(), "fp8")
    expected = finish_model(model, spec, plan, Process(0, 2, CPU), 64)
    assert expected.transposes == (room == GIB)
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 12 + 3 * 2
    for linear in linears:
        if expected.transposes:
            assert torch.equal(linear.transposed, linear.values.t())
        else:
            assert linear.transposed is None
