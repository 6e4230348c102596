"""The memory plan against real parameter counts, quantised weights and measured peaks."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_ds.config.autofit import Room, choices, moved_bytes, place_base
from flux2_ds.config.memory import (
    _CUDA_GRAPHS,
    GIB,
    adapter_parameters,
    base_bytes,
    block_matrices,
    estimate,
    kept_blocks,
    not_yet_allocated,
    other_matrices,
)
from flux2_ds.config.model_spec import RELEASED, Spec
from flux2_ds.config.parse import load_recipe, shipped_recipes
from flux2_ds.config.plan import make_plan, read_deepspeed
from flux2_ds.config.recipe import Batch, Checkpoint, Data, Launch, Lora, Model, Optimizer, Recipe
from flux2_ds.errors import UserError, counted
from flux2_ds.model import transformer
from flux2_ds.model.lora import add_lora, lora_config
from flux2_ds.ops.quantized_linear import BASE_WEIGHTS, QuantizedLinear
from launcher.hosts import Hosts
from launcher.plan_report import find_card, plan_memory, size

DEV, KLEIN_4B = "black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-klein-base-4B"
KLEIN_9B = "black-forest-labs/FLUX.2-klein-base-9B"
ZERO2 = {
    "stage": 2,
    "overlap_comm": True,
    "reduce_bucket_size": 200_000_000,
    "reduce_scatter": False,
}
ZERO3 = {**ZERO2, "stage": 3}
RECIPES = [path for path in shipped_recipes().values() if "\nrun_dir:" in path.read_text()]
ALL_LINEARS = Lora(rank=32, targets="all")


def recipe_for(model: str = DEV, processes: int = 1, **settings) -> Recipe:
    settings = {
        "lora": Lora(rank=16, targets="diffusers"),
        "cache_transposed_base": False,
        "batch": Batch(global_size=processes),
        **settings,
    }
    return Recipe(
        run_dir="r", model=Model(path=model), data=Data(images="i", shards="s"), **settings
    )


def estimate_for(model: str, kept: int, processes: int = 1, zero=None, **settings):
    recipe = recipe_for(
        model, deepspeed={"zero_optimization": zero or {}}, processes=processes, **settings
    )
    return estimate(RELEASED[model], make_plan(recipe, processes), 4096, kept)


def streamed(resident: float, checkpointed: float, base: str | None = "nf4_fp8") -> dict[str, Any]:
    """Settings of a base in host memory."""
    return {
        "base_weights": base,
        "base_placement": "host",
        "base_resident": resident,
        "activation_checkpointing": checkpointed,
        "cuda_graphs": False,
    }


GOLDEN = json.loads(Path(__file__).with_name("memory_golden.json").read_text())
"""recipe -> GiB of the card -> bytes by part, on the card and on the host, at 4096 image tokens on 4 processes."""


def recipe_memory(path: Path, card: int) -> list[dict[str, float]]:
    recipe = load_recipe(path, ["--batch.global_size=8", "--batch.micro_size=1"])
    spec, plan = RELEASED.get(recipe.model.path, RELEASED[KLEIN_4B]), make_plan(recipe, 4)
    kept = kept_blocks(spec, plan, 4096, card * GIB)
    found = estimate(spec, plan, 4096, kept, card * GIB)
    return [found.card, found.host]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_memory_of_shipped_recipes_is_what_it_was(path):
    assert {card: recipe_memory(path, int(card)) for card in ("24", "80")} == GOLDEN[path.stem]


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_parameters_are_counted_as_they_are(name):
    spec = RELEASED[name]
    model = transformer.empty_transformer(spec)
    sizes = [p.numel() for p in model.parameters() if p.ndim > 1]
    assert sorted(block_matrices(spec) + other_matrices(spec)) == sorted(sizes)
    assert sum(p.numel() for p in model.parameters()) - sum(sizes) < 1e-5 * sum(sizes)


@pytest.mark.parametrize("method", ["lora", "dora", "lokr", "loha"])
@pytest.mark.parametrize(
    "targets", ["all", "attention", "diffusers", ["attn.to_q", "ff.linear_.*"]]
)
@pytest.mark.parametrize("ranks", [{}, {"attn.to_q": 9}])
def test_adapters_are_counted_as_they_are(method, targets, ranks):
    spec = Spec("dev", "Flux2Pipeline", 2, 3, 4, 32, 96, guidance=True)
    others = {"factor": 6, "decompose_both": True} if method == "lokr" and ranks else {}
    lora = Lora(rank=5, targets=targets, rank_pattern=ranks, **others)
    recipe = recipe_for(method=method, lora=lora)
    model = transformer.new_transformer(spec)
    config = lora_config(spec, recipe.lora, method)
    add_lora(model, config, seed=0)
    count = sum(p.numel() for p in transformer.trainable(model).values())
    assert adapter_parameters(spec, recipe) == count


def test_what_zero3_keeps_whole_is_counted():
    """On several processes, and of an adapter what is small by the shipped config: up to rank 72 for dev."""
    zero = read_deepspeed("zero3")["zero_optimization"]

    def kept_whole(rank, processes=2, **settings):
        lora = Lora(rank=rank, targets="all")
        settings = {"zero": zero, "processes": processes, "lora": lora, **settings}
        return estimate_for(DEV, 56, **settings).card.get("kept whole", 0)

    trained = adapter_parameters(RELEASED[DEV], recipe_for(lora=Lora(rank=72, targets="all")))
    assert kept_whole(72) == 4 * trained
    assert kept_whole(73) < 4 * trained
    assert kept_whole(72, processes=1) == kept_whole(72, method="full") == 0


@pytest.mark.parametrize("name", sorted(BASE_WEIGHTS))
def test_quantised_weights_take_what_is_planned(name):
    spec = Spec("klein", "Flux2KleinPipeline", 0, 1, 4, 64, 96, guidance=False)
    width = spec.width
    linears = [
        QuantizedLinear(torch.randn(9 * width, width), *BASE_WEIGHTS[name]),
        QuantizedLinear(torch.randn(width, 4 * width), *BASE_WEIGHTS[name]),
    ]
    held = sum(p.numel() * p.element_size() for each in linears for p in each.parameters())
    assert base_bytes(spec, name, 2) - 2 * sum(other_matrices(spec)) == pytest.approx(
        held, rel=0.01
    )


@pytest.mark.parametrize(
    ("model", "tokens", "settings", "measured"),
    [  # GiB on an H100 or H200, from docs/benchmarks.md; 4096, 3952 and 1024 tokens are 1024², 1216×832, 512²
        (DEV, 4096, {"base_weights": "fp8"}, 65.9),
        (DEV, 3952, {"base_weights": "fp8"}, 64.9),
        (DEV, 1024, {"base_weights": "fp8"}, 43.5),
        (DEV, 4096, {"base_weights": "fp8", "cache_transposed_base": True}, 95.2),
        (DEV, 4096, {"base_weights": "fp8", "zero": ZERO2}, 67.05),
        (DEV, 4096, {"base_weights": "fp8", "method": "dora"}, 68.7),
        (DEV, 4096, {"base_weights": "nf4_fp8", "activation_checkpointing": "full", "cuda_graphs": False}, 22.0),
        (DEV, 4096, {"base_weights": "nf4", "activation_checkpointing": "full", "cuda_graphs": False}, 22.1),
        (DEV, 4096, {"zero": "zero3_offload", "activation_checkpointing": 0.5}, 21.5),
        (DEV, 4096, {"zero": "zero3", "processes": 2, "lora": ALL_LINEARS}, 69.9),
        (DEV, 4096, {"zero": ZERO3, "processes": 2, "lora": ALL_LINEARS, "compile": False}, 94.5),
        (KLEIN_9B, 4096, {"base_weights": "fp8"}, 22.6),
        (KLEIN_9B, 3952, {"base_weights": "fp8"}, 22.2),
        (KLEIN_9B, 1024, {"base_weights": "fp8"}, 13.8),
        (KLEIN_9B, 4096, {"base_weights": "int8"}, 22.7),
        (KLEIN_9B, 4096, {"base_weights": "fp8", "cache_transposed_base": True}, 30.8),
        (KLEIN_9B, 4096, {"base_weights": "fp8", "cache_transposed_base": True, "method": "dora"}, 31.7),
        (KLEIN_4B, 4096, {"base_weights": "fp8"}, 12.0),
        (KLEIN_4B, 3952, {"base_weights": "fp8"}, 11.8),
        (KLEIN_4B, 1024, {"base_weights": "fp8"}, 6.8),
        (KLEIN_4B, 4096, {"base_weights": "fp8", "cache_transposed_base": True}, 15.5),
        (KLEIN_4B, 4096, {"method": "full", "zero": "zero3_offload_optimizer"}, 16.8),
        (KLEIN_4B, 4096,
         {"method": "full", "zero": "zero2_offload", "batch": Batch(global_size=2, micro_size=2),
          "activation_checkpointing": 0.6}, 16.91),
        (KLEIN_4B, 4096,
         {"method": "full", "zero": "zero2_offload", "batch": Batch(global_size=2, micro_size=1)}, 16.56),
        (KLEIN_4B, 4096, {"method": "full", "zero": "zero3_offload"}, 11.6),
        (KLEIN_4B, 4096, {"method": "full", "zero": ZERO2}, 60.31),
        (KLEIN_4B, 4096, {"method": "full", "zero": ZERO2, "compute": "fp8"}, 60.35),
        (KLEIN_4B, 4096, {"base_weights": "fp8", "activation_checkpointing": 22 / 25}, 6.08),
        (KLEIN_4B, 4096,
         {"base_weights": "fp8", "base_placement": "sharded", "zero": ZERO2, "processes": 2,
          "lora": Lora(rank=16, targets="all")}, 10.65),
        (KLEIN_4B, 4096, streamed(0.5, 24 / 25, "fp8"), 4.05),
        (KLEIN_9B, 4096, streamed(0.25, 28 / 32), 5.61),
        (DEV, 4096, streamed(0.25, 52 / 56), 13.08),
        (DEV, 4096, streamed(0.125, 1.0), 9.72),
        (DEV, 4096,
         {"base_weights": "nf4_fp8", "activation_checkpointing": "full", "offload_activations": True,
          "cuda_graphs": False}, 19.4),
        (DEV, 4096, {**streamed(0.0, 1.0), "offload_activations": True}, 5.19),
        (DEV, 4096, streamed(0.25, 50 / 56), 14.14),
        (DEV, 4096, streamed(0.125, 54 / 56), 10.14),
        (DEV, 4096, streamed(0.0, 48 / 56, None), 14.2),
        (KLEIN_9B, 4096, streamed(0.625, 27 / 32, "fp8"), 10.4),
    ],
)  # fmt: skip
def test_estimates_are_within_five_percent_of_measured_peaks(model, tokens, settings, measured):
    settings = dict(settings)
    zero, processes = settings.pop("zero", {}), settings.pop("processes", 1)
    deepspeed = zero if isinstance(zero, str) else {"zero_optimization": zero}
    settings = {"activation_checkpointing": "none", "deepspeed": deepspeed, **settings}
    recipe, spec = recipe_for(model, processes, **settings), RELEASED[model]
    plan = make_plan(recipe, processes)
    memory = estimate(spec, plan, tokens, kept_blocks(spec, plan, tokens, math.inf))
    assert memory.on_card / GIB == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("compute", "measured"), [("precision", 5.351), ("fp8", 5.365)])
def test_the_estimate_of_a_model_hardly_larger_than_a_bucket(compute, measured):
    """GiB on an H200, from the runs of docs/numerics.md#products-in-fp8: its gradients come when the bucket is full,
    and activations are gone by then. Not with accumulation, where they stay for the next micro-batch."""
    spec = Spec("klein", "Flux2KleinPipeline", 4, 8, 8, 128, 192, guidance=False)
    zero = {"zero_optimization": read_deepspeed("zero2")["zero_optimization"]}
    recipe = recipe_for(method="full", deepspeed=zero, compute=compute)
    recipe = replace(recipe, batch=Batch(global_size=8, micro_size=8))
    plan = make_plan(recipe, 1)
    assert estimate(spec, plan, 64, 12).on_card / GIB == pytest.approx(measured, rel=0.05)
    twice = make_plan(replace(recipe, batch=Batch(global_size=16, micro_size=8)), 1)
    gradients = [estimate(spec, each, 64, 12).card["gradients"] for each in (plan, twice)]
    assert gradients == [0, 4 * sum(block_matrices(spec) + other_matrices(spec))]


def test_offload_moves_and_processes_divide():
    here = estimate_for(DEV, 0, zero=ZERO2)
    partitioned = estimate_for(DEV, 0, processes=4, zero=ZERO2)
    away = estimate_for(DEV, 0, zero={**ZERO2, "offload_optimizer": {"device": "cpu"}})
    assert partitioned.card["optimizer"] == here.card["optimizer"] / 4
    parts = ("fp32 masters", "optimizer")
    assert away.host == {part: here.card[part] for part in parts}
    assert away.on_card == pytest.approx(here.on_card - sum(here.card[part] for part in parts))


def test_fp8_products_of_trained_weights_take_their_operands():
    """And nothing else: not the weights, nor what is saved for the backward pass. By plan they are faster."""
    spec, room = RELEASED[KLEIN_9B], Room(4, 4096, 80 * GIB, math.inf)
    plain, fp8 = (recipe_for(KLEIN_9B, 4, method="full", compute=c) for c in ("precision", "fp8"))
    one, other = (estimate(spec, make_plan(each, 4), 4096, 0) for each in (plain, fp8))
    more = {
        part: other.card[part] - size for part, size in one.card.items() if other.card[part] != size
    }
    widest = max(block_matrices(spec))
    operands = (4096 + 512) * (9 + 1) * spec.width
    assert widest == 9 * spec.width**2 and more == {"working": operands + 2 * widest}
    costs = [choices(each, spec, room)[0].cost for each in (plain, fp8)]
    assert costs[1] < 0.9 * costs[0]


def test_the_gradients_of_a_full_fine_tune_are_where_they_are_summed():
    """Bytes of each parameter on the card and on the host, on two processes."""
    trained = sum(block_matrices(RELEASED[KLEIN_4B]) + other_matrices(RELEASED[KLEIN_4B]))

    def gradients(stage: int, *, offload: bool, passes: int = 1) -> list[float]:
        loose = {"device": "cpu", "pin_memory": False}
        zero = {"stage": stage, **({"offload_optimizer": loose} if offload else {})}
        zero["reduce_bucket_size"] = 1  # as long as all activations are there
        batch = Batch(global_size=2 * passes, micro_size=1)
        memory = estimate_for(KLEIN_4B, 0, processes=2, zero=zero, method="full", batch=batch)
        return [round(part.get("gradients", 0) / trained, 6) for part in (memory.card, memory.host)]

    assert [gradients(stage, offload=False) for stage in (1, 3)] == [[6, 0], [2, 0]]
    assert gradients(1, offload=True) == [6, 0]
    for offload in (False, True):  # group by group
        assert gradients(2, offload=offload) == [pytest.approx(0.85, abs=0.05), 0]
    assert [gradients(2, offload=on, passes=2) for on in (False, True)] == [[2, 0], [0, 2]]
    assert gradients(3, offload=True) == [0, pytest.approx(4)]


def test_what_is_pinned_takes_powers_of_two_at_stage_3():
    """Flat buffers of a full fine-tune of 9.08 B parameters: 36.3 GB become 64 GiB, groups of 4 GB become 4 GiB."""

    def held(config: str) -> dict[str, float]:
        zero = read_deepspeed(config)["zero_optimization"]
        found = estimate_for(KLEIN_9B, 0, zero=zero, method="full").host
        return {part: round(size / GIB, 1) for part, size in found.items()}

    adam = {"optimizer": 67.6}
    assert held("zero2_offload") == {"fp32 masters": 33.8, **adam}
    summed, groups = 64, 9 * 4 + 0.5
    assert held("zero3_offload_optimizer") == {
        "fp32 masters": 33.8,
        "gradients": summed + groups,
        **adam,
    }


def test_a_snapshot_is_in_host_memory_where_there_is_room():
    """12 bytes of each of 9.08 · 10⁹ parameters in fp32, on four processes."""
    plain, beside = (
        estimate_for(KLEIN_9B, 0, 4, ZERO2, method="full", checkpoint=Checkpoint(background=on))
        for on in (False, True)
    )
    assert beside.card == plain.card
    assert beside.on_host - plain.on_host == pytest.approx(12 * 9.08e9 / 4, rel=0.01)
    assert beside.fits(1e12, plain.on_host)


def test_the_average_is_where_the_masters_are():
    offload = {**ZERO2, "offload_optimizer": {"device": "cpu"}}
    average = Optimizer(ema_decay=0.999)
    here = estimate_for(DEV, 0, zero=ZERO2, optimizer=average)
    away = estimate_for(DEV, 0, zero=offload, optimizer=average)
    assert here.card["EMA"] == away.host["EMA"] > 0 and "EMA" not in away.card


def test_stage_3_divides_the_base_and_gathers_some_of_it():
    zero: dict = {"stage": 3, "stage3_max_live_parameters": 500_000_000}
    whole, parts = estimate_for(DEV, 0), estimate_for(DEV, 0, processes=4, zero=zero)
    assert parts.card["base weights"] == pytest.approx(whole.card["base weights"] / 4)
    assert parts.card["gathered weights"] == 5e8 * 2
    everything = zero | {"stage3_max_live_parameters": 10**12}
    small = estimate_for(KLEIN_4B, 0, processes=2, zero=everything)
    # Never more than all of it.
    assert small.card["gathered weights"] == 2 * small.card["base weights"]
    # One process uses weights where they lie, unless that is the host.
    assert "gathered weights" not in estimate_for(DEV, 0, zero=zero).card
    streamed = estimate_for(DEV, 0, zero=zero | {"offload_param": {"device": "cpu"}})
    assert streamed.card["gathered weights"] == 5e8 * 2


def test_reduction_buffers_are_whole_buckets_of_what_deepspeed_reduces():
    """Adapters have fp32 gradients; a full fine-tune in bf16 has another optimizer at stage 1, and the copy of a
    bucket at stage 3."""

    def buffers(stage: int, bucket: int = 10**6, **settings) -> float:
        zero = {**ZERO2, "stage": stage, "reduce_bucket_size": bucket}
        return estimate_for(KLEIN_4B, 0, zero=zero, **settings).card.get("reduction buffers", 0)

    def reduced_in(dtype: str, **settings: Any) -> float:
        zero = {**ZERO2, "reduce_bucket_size": 10**6}
        config = {"zero_optimization": zero, "communication_data_type": dtype}
        plan = make_plan(recipe_for(KLEIN_4B, deepspeed=config, **settings), 1)
        return estimate(RELEASED[KLEIN_4B], plan, 4096, 0).card["reduction buffers"]

    assert [reduced_in(dtype) for dtype in ("fp32", "bf16")] == [8e6, 10e6]
    assert [reduced_in(dtype, method="full") for dtype in ("fp32", "bf16")] == [8e6, 4e6]

    assert [buffers(stage) for stage in (1, 2, 3)] == [8e6, 8e6, 4e6]
    assert [buffers(stage, precision="fp16") for stage in (1, 2, 3)] == [4e6, 4e6, 2e6]
    assert [buffers(stage, method="full") for stage in (1, 2, 3)] == [0, 4e6, 4e6]
    trained = adapter_parameters(RELEASED[KLEIN_4B], recipe_for(KLEIN_4B))
    assert buffers(2, 10**12) == 8 * trained  # see Engine
    scattered = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10**6}
    found = estimate_for(KLEIN_4B, 0, zero=scattered, method="full").card["reduction buffers"]
    assert found == buffers(2, method="full") + 2e6
    none = {"stage": 2, "contiguous_gradients": False}
    assert "reduction buffers" not in estimate_for(KLEIN_4B, 0, zero=none).card


def test_offloaded_inputs_leave_the_card_for_the_host():
    """Pinned powers of two: 54 MiB of 4608 tokens take 64, 48 and 6 MiB of a double block's 64 and 8."""
    for kept, singles, doubles in (0, 48, 8), (20, 28, 8), (50, 0, 6), (56, 0, 0):
        here = estimate_for(DEV, kept, cuda_graphs=False)
        away = estimate_for(DEV, kept, offload_activations=True)
        assert away.host == {"activations": (64 * singles + (64 + 8) * doubles) * 2**20}
        stream = 4608 * 6144 * 2
        saved = here.card["activations"] - away.card["activations"]
        assert saved == pytest.approx((singles + doubles) * stream)


def test_cuda_graphs_are_counted_where_there_is_room():
    """They hold the adapter's gradients twice, and let no other pass use their memory."""
    trained = 4 * adapter_parameters(RELEASED[DEV], recipe_for())
    plan = make_plan(recipe_for(deepspeed="zero0"), 1)
    without = estimate(RELEASED[DEV], plan, 4096, 0, card_bytes=0)
    captured = estimate(RELEASED[DEV], plan, 4096, 0)
    graphs = trained + without.card["batch"]
    assert captured.card == without.card | {_CUDA_GRAPHS: graphs}
    data = replace(plan.recipe.data, validation_fraction=0.1)
    plan = replace(plan, recipe=replace(plan.recipe, data=data, cuda_graphs=True))
    evaluated = estimate(RELEASED[DEV], plan, 4096, 0, card_bytes=0)
    assert evaluated.card[_CUDA_GRAPHS] == graphs + without.card["working"]
    plan = replace(plan, accumulation=2)
    accumulated = estimate(RELEASED[DEV], plan, 4096, 0, card_bytes=0)
    assert accumulated.card[_CUDA_GRAPHS] == graphs + trained + without.card["working"]


def test_a_transposed_base_is_counted_where_there_is_room():
    """After the CUDA graphs, with a byte for each weight of the blocks, and before no kept block."""
    spec = RELEASED[DEV]
    recipe = recipe_for(deepspeed="zero0", base_weights="fp8", cache_transposed_base=None)
    plan = make_plan(recipe, 1)
    both = estimate(spec, plan, 4096, 0)
    assert both.spare == ["cuda_graphs", "cache_transposed_base"]
    turned = both.card["transposed base"]
    assert turned == sum(block_matrices(spec))
    room = both.on_card * 1.03 + GIB
    assert estimate(spec, plan, 4096, 0, room).transposes
    less = estimate(spec, plan, 4096, 0, room - 0.2 * turned)
    assert less.spare == ["cuda_graphs"] and less.on_card == both.on_card - turned
    asked = make_plan(replace(recipe, cache_transposed_base=True), 1)
    assert estimate(spec, asked, 4096, 0, 0).transposes
    never = make_plan(replace(recipe, cache_transposed_base=False), 1)
    assert (
        kept_blocks(spec, plan, 4096, room) == kept_blocks(spec, never, 4096, room) == spec.blocks
    )
    assert kept_blocks(spec, asked, 4096, room) < spec.blocks
    # It says nothing of the bases that cannot be held so.
    listed = choices(asked.recipe, spec, Room(1, 4096, 24 * GIB, 64 * GIB))
    assert any(choice.recipe.base_weights == "nf4_fp8" for choice in listed)


def test_without_a_card_the_plan_counts_the_least():
    plan = make_plan(
        recipe_for(deepspeed="zero0", base_weights="fp8", cache_transposed_base=None), 1
    )
    found = plan_memory(plan, Hosts(1), None, None, None)
    assert found.memory.spare == [] and found.memory == estimate(RELEASED[DEV], plan, 4096, 0, 0)


def test_inputs_are_offloaded_where_nothing_else_fits():
    """A 24 GiB card holds dev at 1536² (9216 image tokens) only so, if the base stays on it."""
    found = choices(recipe_for(), RELEASED[DEV], Room(1, 9216, 24 * GIB, 64 * GIB))
    whole = [c for c in found if c.recipe.base_placement == "gpu"]
    assert (whole[0].recipe.deepspeed, whole[0].recipe.base_weights) == ("zero0", "nf4_fp8")
    assert all(c.recipe.offload_activations == ("base weights" in c.memory.card) for c in whole)
    roomy = choices(recipe_for(), RELEASED[DEV], Room(1, 4096, 24 * GIB, 64 * GIB))
    assert not roomy[0].recipe.offload_activations
    given = recipe_for(offload_activations=True)
    found = choices(given, RELEASED[DEV], Room(1, 4096, 80 * GIB, 64 * GIB))
    assert all(choice.recipe.offload_activations for choice in found)


def test_a_base_in_host_memory_takes_its_own_bytes():
    """Which the adapter, moved by DeepSpeed into one pinned piece, does not; nor what is trained whole."""
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    memory = estimate_for(DEV, 0, zero=zero)
    assert "base weights" not in memory.card
    assert memory.host["base weights"] == pytest.approx(2 * 32.22e9, rel=0.001)
    adapter = 4 * adapter_parameters(RELEASED[DEV], recipe_for())
    assert adapter < memory.host["adapter"] == 2**29
    full = estimate_for(KLEIN_9B, 0, zero=zero, method="full")
    assert full.host["base weights"] == 32 * GIB and "adapter" not in full.host


def test_auto_keeps_as_many_blocks_as_just_fit():
    spec = RELEASED[DEV]
    plan = make_plan(recipe_for(base_weights="fp8", deepspeed="zero0"), 1)
    kept = kept_blocks(spec, plan, 4096, 60 * GIB)
    assert 0 < kept < 56
    assert estimate(spec, plan, 4096, kept).fits(60 * GIB)
    assert not estimate(spec, plan, 4096, kept + 1).fits(60 * GIB)
    assert kept_blocks(spec, plan, 4096, 10 * GIB) == 0
    assert kept_blocks(spec, plan, 4096, math.inf) == 56


@pytest.mark.parametrize(
    ("setting", "kept"),
    [("full", 0), ("none", 56), (1.0, 0), (0.0, 56), (0.5, 28), (0.7, 17), (0.991, 1)],
)
def test_a_share_checkpoints_the_nearest_number_of_blocks(setting, kept):
    plan = make_plan(recipe_for(activation_checkpointing=setting), 1)
    assert kept_blocks(RELEASED[DEV], plan, 4096, 0) == kept


def test_choices_fit_and_the_fastest_is_first():
    found = choices(recipe_for(), RELEASED[DEV], Room(1, 4096, 80 * GIB, 64 * GIB))
    fastest = found[0].recipe
    assert (fastest.deepspeed, fastest.base_weights, fastest.activation_checkpointing) == (
        "zero0",
        "fp8",
        0,
    )
    assert all(c.memory.fits(80 * GIB) and c.memory.on_host <= 64 * GIB for c in found)
    assert [c.cost for c in found] == sorted(c.cost for c in found)
    small = choices(recipe_for(), RELEASED[DEV], Room(1, 4096, 24 * GIB, math.inf))
    assert small[0].recipe.base_weights == "nf4_fp8"
    assert {c.recipe.base_placement for c in small if c.recipe.base_weights == "fp8"} == {"host"}
    assert choices(recipe_for(), RELEASED[DEV], Room(1, 4096, 4 * GIB, 1 * GIB)) == []


@pytest.mark.parametrize(
    ("launch", "hosts", "shared"),
    [
        (Launch(), Hosts(1), 1),
        (Launch(), Hosts(16), 8),
        (Launch(processes=4), Hosts(16), 4),  # --gpus 16 over it
        (Launch(), Hosts(16, Path("hostfile"), slots={"node01": 4, "node02": 12}), 12),
    ],
)
def test_host_memory_is_of_each_host(launch, hosts, shared):
    recipe = recipe_for(processes=hosts.processes, deepspeed="zero3_offload", launch=launch)
    plan = make_plan(recipe, hosts.processes)
    needed = plan_memory(plan, hosts, None, None, None).memory.on_host * shared
    for part, fits in ((0.99, False), (1.01, True)):
        found = plan_memory(plan, hosts, None, find_card("80GiB"), f"{needed * part / GIB:.6f}GiB")
        assert found.fits == fits
        unquantised = [
            choice.recipe.deepspeed for choice in found.others if not choice.recipe.base_weights
        ]
        assert ("zero3_offload" in unquantised) == fits
        totals = [choice["host_total"] for choice in found.values()["choices"]]
        assert all(total <= needed * part for total in totals)
    assert f"host       {needed / GIB:.1f} GiB = {counted(shared, 'process')} × " in "\n".join(
        found.lines()
    )


def test_a_reader_gets_what_needs_less_than_something_faster():
    """One of the fastest over each base, and for each that is left out such a one that needs as little."""
    plan = make_plan(recipe_for(base_weights="fp8"), 1)
    found = plan_memory(plan, Hosts(1), None, find_card("80GiB"), None)
    kept = found.worth_a_line()
    assert len(kept) <= 12 < 25 < len(found.others)
    for choice in found.others:
        assert choice in kept or any(
            other.recipe.base_weights == choice.recipe.base_weights
            and other.memory.on_card <= 1.06 * choice.memory.on_card
            and other.memory.needed_on_host <= choice.memory.needed_on_host
            for other in kept
        )
    assert {choice.recipe.base_weights for choice in kept} == {
        c.recipe.base_weights for c in found.others
    }


def test_sizes():
    assert size("--gpu", "24GiB") == 24 * GIB
    assert size("--host", "64 GB") == 64e9
    for wrong in ("", "many", "24 parsecs", "-1GB", "24", "0GiB"):
        with pytest.raises(UserError, match="--gpu"):
            size("--gpu", wrong)


def test_what_the_first_step_adds_is_known_before_it():
    """Adam's two moments, gradients between micro-batches, and ZeRO's two buffers below stage 3."""
    spec = RELEASED[KLEIN_4B]

    def added(stage: int, micro_batches: int, *, resumed: bool = False) -> float:
        recipe = replace(
            recipe_for(KLEIN_4B, deepspeed=f"zero{stage}"), batch=Batch(global_size=micro_batches)
        )
        plan = make_plan(recipe, 1)
        memory = estimate(spec, plan, 4096, 0)
        return not_yet_allocated(plan, memory, resumed=resumed) / adapter_parameters(spec, recipe)

    assert [added(0, 1), added(0, 2), added(2, 1), added(2, 2), added(3, 1)] == [8, 12, 20, 20, 8]
    assert [added(stage, 2, resumed=True) for stage in (0, 1, 2, 3)] == [4, 12, 12, 0]


@pytest.mark.parametrize("validation_fraction", [0.0, 0.1])
@pytest.mark.parametrize("room", [27.7, 32])
def test_blocks_are_kept_before_passes_are_recorded(room, validation_fraction):
    """Where memory is short the card is busy, and a recomputed block costs more than Python does."""
    recipe = recipe_for(deepspeed="zero0", base_weights="nf4_fp8")
    recipe = replace(recipe, data=replace(recipe.data, validation_fraction=validation_fraction))
    counts = [
        kept_blocks(
            RELEASED[DEV], make_plan(replace(recipe, cuda_graphs=each), 1), 4096, room * GIB
        )
        for each in (None, False, True)
    ]
    assert counts[0] == counts[1] > counts[2]


def test_a_base_elsewhere_leaves_two_blocks_on_the_card():
    spec, weight = RELEASED[DEV], RELEASED[DEV].width ** 2
    everywhere = estimate_for(DEV, 0, base_weights="fp8", cuda_graphs=False)
    host = estimate_for(DEV, 0, base_weights="fp8", base_placement="host")
    blocks = base_bytes(spec, "fp8", 2) - 2 * sum(other_matrices(spec))
    four = estimate_for(DEV, 0, 4, base_weights="fp8", base_placement="host")
    assert four.host == {"base weights": pytest.approx(blocks / 4)}  # they share one copy
    assert host.host == {"base weights": pytest.approx(blocks)}
    buffers = 2 * 26 * weight  # a double block's linears, with their rows' scales
    assert host.card["streaming buffers"] == pytest.approx(buffers, rel=1e-3)
    difference = everywhere.on_card - host.on_card
    assert difference == pytest.approx(blocks - host.card["streaming buffers"])
    shared = {"base_weights": "fp8", "base_placement": "sharded", "base_resident": 0.5}
    sharded = estimate_for(DEV, 0, processes=4, **shared)
    streamed = sum(26 if n < 8 else 13 for n in range(0, 56, 2)) * weight
    assert not sharded.host
    found = everywhere.card["base weights"] - sharded.card["base weights"]
    assert found == pytest.approx(0.75 * streamed, rel=1e-3)


@pytest.mark.parametrize(
    ("processes", "card", "host", "changes", "expected"),
    [
        (1, 80, 64, {}, ("gpu", 0.0)),
        (1, 32, 64, {}, ("host", 0.625)),
        (1, 32, 4, {}, ("gpu", 0.0)),  # nothing fits, which the start says
        (8, 32, 64, {}, ("host", 0.625)),
        (8, 32, 64, {"launch": Launch(link="nvlink")}, ("sharded", 0.0)),
        (1, 32, 64, {"launch": Launch(link="pcie5")}, ("host", 0.375)),
        (1, 32, 64, {"deepspeed": "zero3", "base_weights": None}, ("gpu", 0.0)),
        (1, 32, 64, {"cuda_graphs": True}, ("gpu", 0.0)),
        (1, 32, 64, {"base_placement": "host"}, ("host", 0.0)),
    ],
)
def test_auto_places_the_base_where_it_fits(processes, card, host, changes, expected):
    settings = {"base_placement": "auto", "base_weights": "fp8", "deepspeed": "zero2", **changes}
    recipe = recipe_for(processes=processes, **settings)
    spec, room = RELEASED[DEV], (card * GIB, host * GIB)
    placed = place_base(recipe, spec, Room(processes, 4096, *room))
    assert (placed.base_placement, placed.base_resident) == expected
    if expected[0] != "gpu" and changes.get("base_placement") != "host":
        plan = make_plan(placed, processes)
        kept = kept_blocks(spec, plan, 4096, room[0])
        assert estimate(spec, plan, 4096, kept, room[0]).fits(*room)


def test_the_plan_says_what_crosses_the_link():
    spec = RELEASED[DEV]
    single = base_bytes(spec, "fp8", 2) - 2 * sum(other_matrices(spec))
    single *= 13 / sum(26 if n < 8 else 13 for n in range(56))

    def moved(processes=1, **changes):
        recipe = recipe_for(base_weights="fp8", processes=processes, **changes)
        return moved_bytes(make_plan(recipe, processes), spec) / single

    assert moved(base_placement="host") == pytest.approx(2 * 64 - 2 * 2 - 2)
    assert moved(base_placement="host", base_resident=54 / 56) == pytest.approx(0)
    assert moved(4, base_placement="sharded") == pytest.approx(0.75 * 122)
    recipe = recipe_for(KLEIN_9B, base_placement="auto", base_weights="nf4_fp8", deepspeed="zero0")
    told = plan_memory(make_plan(recipe, 1), Hosts(1), None, find_card("7.5GiB"), "32GiB")
    assert told.fits and told.values()["streamed_per_micro_batch"] == told.moved
    (line,) = [line for line in told.lines() if line.startswith("streams")]
    assert "(host, 25% of the blocks resident)" in line and "s over pcie3" in line
    assert "base_placement" not in " ".join(told.lines())
    fixed = make_plan(replace(recipe, base_placement="gpu"), 1)
    elsewhere = plan_memory(fixed, Hosts(1), None, find_card("6GiB"), "32GiB")
    assert not elsewhere.fits and "--base_placement host" in elsewhere.refusal()


def test_what_fits_can_be_trained():
    """Also where the recipe asks for what some combinations cannot do."""
    asked = recipe_for(cuda_graphs=True)
    found = choices(asked, RELEASED[DEV], Room(1, 9216, 30 * GIB, 256 * GIB))
    assert not any(choice.recipe.offload_activations for choice in found)
    for choice in found:
        make_plan(choice.recipe, 1)
    roomy = choices(recipe_for(), RELEASED[DEV], Room(1, 4096, 80 * GIB, 256 * GIB))
    assert {choice.recipe.base_weights for choice in roomy} == {None, *BASE_WEIGHTS}
    partitioned = [c for c in roomy if str(c.recipe.deepspeed).startswith("zero3")]
    assert {choice.recipe.base_weights for choice in partitioned} == {None}
