"""Everything derived from a recipe, every refusal, and the files that are shipped."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from flux2_ds.config.deepspeed_config import _OWNED_BY_RECIPE
from flux2_ds.config.model_spec import RELEASED
from flux2_ds.config.parse import (
    check_urls,
    load_recipe,
    parse_recipe,
    recipe_parser,
    shipped_directory,
    shipped_recipes,
)
from flux2_ds.config.plan import (
    captures,
    compiles,
    learning_rate,
    make_plan,
    streamed_blocks,
    transposable,
)
from flux2_ds.config.recipe import Batch, Data, Model, Optimizer, Recipe
from flux2_ds.config.validate import ignored_settings
from flux2_ds.errors import UserError
from launcher import cli

DS_CONFIGS = sorted(shipped_directory("ds_configs").glob("*.json"))
RECIPES = [path for path in shipped_recipes().values() if "\nrun_dir:" in path.read_text()]
ROOT = shipped_directory("recipes").parent


def make_recipe(**changes: Any) -> Recipe:
    """A small recipe with dotted settings changed: make_recipe(**{"batch.micro_size": 2})."""
    recipe = Recipe(
        run_dir="runs/a", model=Model(path="m"), data=Data(images="photos", shards="shards")
    )
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        if section:
            value = dataclasses.replace(getattr(recipe, section), **{field: value})
        recipe = dataclasses.replace(recipe, **{section or field: value})
    return recipe


def test_directories_of_shipped_files_hold_some():
    assert len(DS_CONFIGS) >= 5
    assert RECIPES


@pytest.mark.parametrize(
    ("global_size", "micro_size", "processes", "accumulation"),
    [(8, 1, 8, 1), (8, 1, 1, 8), (8, 2, 2, 2), (1, 1, 1, 1), (96, 3, 16, 2)],
)
def test_batch_arithmetic(global_size, micro_size, processes, accumulation):
    plan = make_plan(
        make_recipe(batch=Batch(global_size=global_size, micro_size=micro_size)), processes
    )
    assert plan.accumulation == accumulation
    assert plan.deepspeed["train_batch_size"] == global_size
    assert plan.deepspeed["train_micro_batch_size_per_gpu"] == micro_size
    assert plan.deepspeed["gradient_accumulation_steps"] == accumulation


@pytest.mark.parametrize(
    ("global_size", "micro_size", "processes"),
    [(7, 1, 2), (1, 1, 8), (10, 4, 2), (11, 4, 2), (13, 4, 2), (5, 8, 1), (100, 3, 7)],
)
def test_impossible_batch_is_refused_with_a_value_that_works(global_size, micro_size, processes):
    recipe = make_recipe(batch=Batch(global_size=global_size, micro_size=micro_size))
    with pytest.raises(UserError) as caught:
        make_plan(recipe, processes)
    message = str(caught.value)
    assert f"batch.global_size {global_size} " in message
    assert f"{micro_size} × {processes} process" in message
    suggested = int(re.search(r"Set batch\.global_size to (\d+)", message)[1])
    assert abs(suggested - global_size) <= micro_size * processes
    make_plan(make_recipe(batch=Batch(global_size=suggested, micro_size=micro_size)), processes)


@pytest.mark.parametrize("processes", [0, -1])
def test_no_processes_are_refused(processes):
    with pytest.raises(UserError, match="processes"):
        make_plan(make_recipe(), processes)


AT_LEAST_ONE = (
    "steps batch.global_size batch.micro_size lora.rank data.samples_per_shard "
    "prepare.text_batch_size prepare.image_batch_size prepare.decode_threads "
    "data.shuffle_window data.num_workers validation.every validation.samples "
    "checkpoint.every checkpoint.keep_last "
    "checkpoint.keep_every log.every launch.processes preview.steps preview.every "
    "objective.max_shift_tokens"
)
OUT_OF_RANGE = [
    *((name, value) for name in AT_LEAST_ONE.split() for value in (0, -3)),
    *(("data.bucket_step", value) for value in (0, -16, 8, 40)),
    *((f"preview.{side}", value) for side in ("height", "width") for value in (0, -16, 1000)),
    *(("data.max_aspect", value) for value in (0.5, float("inf"))),
    ("data.max_upscale", 0.0),
    *(("prepare.scratch_gb", value) for value in (0.0, float("inf"))),
    *(("data.cache_gb", value) for value in (0.0, float("inf"))),
    *(("launch.hang_timeout_s", value) for value in (-1.0, float("inf"))),
    *(("data.validation_fraction", value) for value in (-0.1, 0.6)),
    *(("data.resolution", value) for value in (48, 0, -1024, [1024, 48])),
    *(("objective.caption_dropout", value) for value in (-0.1, 1.1)),
    *((name, 0.0) for name in ("objective.shift", "objective.logit_std", "lora.alpha")),
    *(("lora.dropout", value) for value in (-0.1, 1.0)),
    *(("optimizer.learning_rate", value) for value in (0.0, float("nan"))),
    *((f"optimizer.{name}", -1) for name in ("warmup_steps", "max_grad_norm")),
    *((f"optimizer.{name}", -1e-8) for name in ("eps", "weight_decay")),
    *(("optimizer.betas", value) for value in ((0.9, 1.0), (-0.1, 0.9))),
    *((name, -1) for name in ("seed", "preview.seed", "objective.guidance")),
    *((name, 2**64) for name in ("seed", "preview.seed")),
    ("optimizer.learning_rate", float("inf")),
    ("checkpoint.keep_every", 750),
    ("preview.prompts", []),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(UserError) as caught:
        make_plan(make_recipe(**{name: value}), 1)
    assert str(caught.value).startswith(f"{name} ")
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.shards", "https://me:secret@host/shards"),
        ("data.shards", "https://secret@host/shards"),
        ("data.images", "sftp://me:secret@host/{0..9}.tar"),
        ("data.images.web", "https://:secret@host/0.tar"),
        ("data.more_shards.web", "http://me:secret@host:80/shards"),
        ("data.shards", "https://host/shards?secret"),
        ("data.images.web", "https://host/{0..9}.tar?Expires=5&Signature=secret"),
        ("data.images", "HTTPS://host/0.tar?sig=secret"),
        ("data.images", "simplecache::https://host/0.tar?sig=secret"),
        ("data.images", "az://container/0.tar?sig=secret"),
        ("data.shards", "https://me:p/secret@host/shards"),
        ("data.shards", "https://host/shards#token=secret"),
        ("data.shards", "https://host/shards;sig=secret"),
        ("model.path", "https://me:secret@host/model"),
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_said(name, value):
    setting, several, _ = name.partition(".web")
    with pytest.raises(UserError) as caught:
        check_urls(make_recipe(**{setting: {"web": value} if several else value}))
    what = "a query" if set("?#;") & set(value) else "a user name or a password"
    assert str(caught.value).startswith(f"{name} is a URL with {what}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket/a@b:c?", "https://host:80/a@b", "sftp://me@host/x", "hf://me/x@main/y", "a?", "s3://b/?.tar"]
)  # fmt: skip
def test_urls_without_a_secret_are_accepted(url):
    check_urls(make_recipe(**{"data.shards": url, "data.images": {"web": url}}))


FULL = {"method": "full", "deepspeed": "zero1"}
FP8 = {"compute": "fp8", "method": "full"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint.keep_best": True, "checkpoint.every": 250, "validation.every": 100},
         r"keep_best is true, checkpoint.every 250 and validation.every 100: .* to 300\."),
        (FULL | {"validation.against_base": True},
         "against_base is true, but method full has no adapter .* validation.at_start: true"),
        ({"preservation.prompts": ["a cat"]},
         r"prompts is \['a cat'\] and share 0: one has no effect without the other"),
        ({"preservation.share": 0.2}, r"prompts is \[\] and share 0.2: one has no effect"),
        ({"preservation.prompts": ["a cat"], "preservation.share": 1.0},
         r"share is 1 and preservation\.every 1: no sample is left .* every to 4"),
        (FULL | {"preservation.prompts": ["a cat"], "preservation.share": 0.2},
         "preservation.prompts needs an adapter to switch off, and method is full"),
        (FULL | {"preservation.sources": ["prior"], "preservation.target": "base"},
         "preservation.target: base needs an adapter to switch off, and method is full"),
        ({"data.missing_caption": "fixed"}, r"data\.fixed_caption is empty"),
        ({"captions.add_trigger_word": True}, "there is no captions.trigger_word"),
        ({"captions.shuffle_tags": True}, "captions.variants is 1, and captions.shuffle_tags"),
        ({"captions.tag_dropout": 0.1}, "variants is 1, and captions.shuffle_tags or tag_dropout"),
        ({"captions.variants": 3}, "captions.variants is 3, and all would be the same text"),
        ({"captions.tag_separator": ""}, "captions.tag_separator is ; it must be not empty"),
        *(
            ({name: {"you": "x"}}, f"{name}.you: there is no such source")
            for name in ("captions.trigger_word", "captions.prefix", "captions.suffix", "data.caption_column")
        ),
        ({"data.images": {"me": "photos"}, "data.caption_column": {"you": "x"}}, "column.you: there is no such"),
        ({"data.mask_suffixes": [".m", ".Reference"]}, r"data\.mask_suffixes .* one suffix twice"),
        ({"data.mask_suffixes": [""]}, r"data\.mask_suffixes .* not empty"),
        # Adapters
        ({"method": "full", "lora.init_from": "f"}, r"lora.init_from is f, and method is full"),
        ({"method": "full", "lora.merge_first": ["f"]}, r"lora.merge_first is \['f'\], and method"),
        ({"method": "dora", "lora.init": "pissa"}, "lora.init is pissa, and method is dora"),
        ({"method": "lokr", "lora.dropout": 0.1}, "lora.dropout is 0.1, and method lokr"),
        ({"method": "loha", "lora.rslora": True}, "lora.rslora is True, and method loha"),
        ({"method": "loha", "lora.init": "olora"}, "Remove it, or set method: lora"),
        ({"base_weights": "nf4", "lora.init": "olora"}, "lora.init is olora, and base_weights is nf4"),
        ({"lora.init": "pissa", "validation.against_base": True},
         "lora.init is pissa, and validation.against_base switches the adapter off"),
        ({"lora.init": "olora", "preservation.prompts": ["a"], "preservation.share": 0.2},
         "lora.init is olora, and preservation switches the adapter off"),
        ({"lora.init_from": "f", "lora.init": "pissa"}, "lora.init is pissa, and lora.init_from is f"),
        ({"lora.merge_strengths": [1.0]}, r"lora.merge_strengths is \[1.0\], .* has 0 files"),
        # Precision
        ({"precision": "fp16", "launch.accelerator": "cpu"}, "precision is fp16, .* on the CPU"),
        ({"method": "full", "deepspeed": {}}, "Set deepspeed: zero1"),
        (FP8 | {"method": "lora"}, "compute is fp8, .* trained, and method is lora. Set base_weights: fp8"),
        (FP8 | {"method": "dora"}, "compute is fp8, .* and method is dora"),
        (FP8 | {"precision": "fp32"}, "compute is fp8 .* precision fp32; .* Set precision: bf16"),
        (FP8 | {"precision": "fp16"}, "compute is fp8 .* precision fp16; .* Set precision: bf16"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_plan(make_recipe(**changes), 1)


def test_the_plan_says_what_is_preserved_and_what_it_costs():
    def line(deepspeed: str = "zero2", **kept: Any) -> str:
        changes = {f"preservation.{name}": value for name, value in kept.items()}
        plan = make_plan(make_recipe(**changes, deepspeed=deepspeed, **{"batch.micro_size": 2}), 1)
        return "".join(text for text in plan.lines() if text.startswith("preserving"))

    assert line() == ""
    images = line(sources=["prior"], weight=0.5)
    assert images == "preserving prior towards their images; weight 0.5; no pass more"
    assert "plain model; weight 1; a forward pass more for each micro-batch with such" in line(
        sources=["prior"], target="base"
    )
    prompts: dict[str, Any] = {"prompts": ["a cat", "a dog"], "share": 0.25}
    said = "2 prompts in 25% of the other samples; weight 1; a forward pass more for 44% of"
    assert said in line(**prompts)
    assert "a forward pass more for every micro-batch" in line("zero3", **prompts)
    said = "in 25% of the other samples of one in 4 steps; weight 1; a forward pass more for 44% of the micro-batches of one in 4"
    assert said in line(**prompts, every=4)
    assert "every micro-batch of one in 4 steps" in line("zero3", **prompts, every=4)
    both = prompts | {"sources": ["prior"], "target": "base", "every": 4}
    assert line(**both).endswith("a forward pass more for each micro-batch with such a sample")
    assert line("zero3", **both).endswith("a forward pass more for every micro-batch")


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint.keep_best": True, "checkpoint.every": 250, "validation.every": 125},
        {"data.max_aspect": 1.0, "data.resolution": 64, "objective.caption_dropout": 1.0},
        {"objective.caption_dropout": 0.0, "optimizer.warmup_steps": 0, "seed": 0},
        {"optimizer.max_grad_norm": 0.0, "optimizer.eps": 0.0, "optimizer.betas": (0.0, 0.0)},
        {"data.missing_caption": "fixed", "data.fixed_caption": "a"},
        {"precision": "bf16", "launch.accelerator": "cpu"},
        {"precision": "fp16", "launch.accelerator": "cuda"},
        {"method": "full", "precision": "fp32", "deepspeed": {}},
        {"deepspeed": {}},  # an adapter is fp32 itself
        {"optimizer.name": "adafactor", "deepspeed": "zero0"},
        {"optimizer.name": "muon", "deepspeed": "zero0"},
        {"optimizer.name": "prodigy", "optimizer.learning_rate": 1.0, "deepspeed": "zero0"},
        {"optimizer.name": "adamw8bit", "deepspeed": "zero3"},
        {"base_weights": "bf16", "deepspeed": "zero3_offload"},
        {"optimizer.name": "adamw8bit_paged", "method": "full"},
        {"precision": "fp16", "deepspeed": "zero1"},
        {"deepspeed": "zero3_offload"},
        FP8 | {"deepspeed": "zero3_offload"},
    ],
)
def test_what_goes_together_is_accepted(changes):
    make_plan(make_recipe(**changes), 2)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_sections(method, precision):
    config = make_plan(make_recipe(method=method, precision=precision), 1).deepspeed
    sections = {name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")}
    # Adapters in bf16 keep fp32 masters themselves: the engine must leave their dtype alone.
    expected = {"fp16"} if precision == "fp16" else set()
    if (method, precision) == ("full", "bf16"):
        expected = {"bf16"}
    assert sections == expected
    accumulated = {"grad_accum_dtype": "fp32"} if expected == {"bf16"} else None
    assert config.get("data_types") == accumulated


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_deepspeed_config(path):
    recipe = make_recipe(
        deepspeed=path.stem,
        batch=Batch(global_size=24, micro_size=2),
        **{"optimizer.max_grad_norm": 0.5},
    )
    plan = make_plan(recipe, 4)
    config = plan.deepspeed
    assert config["train_batch_size"] == 24
    accumulated = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert accumulated * 4 == 24
    assert config["gradient_clipping"] == 0.5
    expected = json.loads(path.read_text())["zero_optimization"]
    if "zero3" in path.stem:
        expected["memory_efficient_linear"] = False  # see test_what_is_compiled
    assert config["zero_optimization"] == expected
    assert plan.zero_stage == int(re.match(r"zero(\d)", path.stem)[1])
    assert plan.offloads("offload_optimizer") == ("offload" in path.stem)
    assert f"ZeRO stage {plan.zero_stage}" in "\n".join(plan.lines())


def test_deepspeed_config_by_path_and_by_value(tmp_path):
    value = {"zero_optimization": {"stage": 1}, "steps_per_print": 5}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(value))
    plans = [make_plan(make_recipe(deepspeed=choice), 1) for choice in (str(path), value)]
    assert plans[0].deepspeed == plans[1].deepspeed
    assert (plans[0].zero_stage, plans[0].deepspeed["steps_per_print"]) == (1, 5)
    assert value == {"zero_optimization": {"stage": 1}, "steps_per_print": 5}  # not written into


@pytest.mark.parametrize(("key", "setting"), _OWNED_BY_RECIPE.items())
def test_key_that_the_recipe_owns_is_refused(key, setting):
    with pytest.raises(UserError, match=rf"'{key}'.* set {re.escape(setting)}"):
        make_plan(make_recipe(deepspeed={key: 1}), 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimisation": {}}', r"'zero_optimisation', which is not offered.*zero_optimization"),
        *(
            (f'{{"{key}": {{}}}}', f"the key '{key}', which is not offered. Remove it")
            for key in ("gradient_predivide_factor", "prescale_gradients", "flops_profiler")
        ),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', 'uses "auto"'),
        ('{"zero_optimization": {"stage": 2, "cpu_offload": true}}', 'an old name: write "offload_optimizer": {'),
        ('{"zero_optimization": ', "is not valid JSON"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "is not valid JSON: 'stage' comes twice"),
        ('{"wall_clock_breakdown": "x"}', "wall_clock_breakdown is 'x', which is no value for it"),
        ('{"communication_data_type": "fp8"}', "communication_data_type is 'fp8'; it must be fp32, "),
        *((text, "must be a JSON object") for text in ("[]", "null", "3")),
        ('{"zero_optimization": null}', "must be a JSON object"),
    ],
)  # fmt: skip
def test_wrong_deepspeed_file_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"mine\.json.* {message}"):
        make_plan(make_recipe(deepspeed=str(path)), 1)


@pytest.mark.parametrize("choice", ["zero9", "absent.json", "ds_configs", "mine"])
def test_unknown_deepspeed_config_is_refused_with_the_names(choice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "mine").write_text("{}")  # which is no .json
    with pytest.raises(UserError) as caught:
        make_plan(make_recipe(deepspeed=choice), 1)
    assert repr(choice) in str(caught.value)
    assert all(path.stem in str(caught.value) for path in DS_CONFIGS)


@pytest.mark.parametrize(
    ("schedule", "warmup", "values"),
    [
        # step:       0       1       2       4          6       9
        ("constant", 2, [0.5e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]),
        ("cosine", 2, [0.5e-3, 1e-3, 1e-3, 0.8535534e-3, 0.5e-3, 0.0380602e-3]),
        ("linear", 2, [0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.125e-3]),
        ("constant", 0, [1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]),
        ("cosine", 0, [1e-3, 0.9755283e-3, 0.9045085e-3, 0.6545085e-3, 0.3454915e-3, 0.0244717e-3]),
        ("rex", 2, [0.5e-3, 1e-3, 1e-3, 0.8571429e-3, 0.6666667e-3, 0.2222222e-3]),
        ("linear", 0, [1e-3, 0.9e-3, 0.8e-3, 0.6e-3, 0.4e-3, 0.1e-3]),
    ],
)
def test_learning_rate(schedule, warmup, values):
    adam = Optimizer(learning_rate=1e-3, schedule=schedule, warmup_steps=warmup)
    recipe = make_recipe(steps=10, optimizer=adam)
    found = [learning_rate(recipe, step) for step in (0, 1, 2, 4, 6, 9)]
    assert found == pytest.approx(values, rel=1e-5)


def test_a_warm_up_that_outlasts_the_run_still_rises():
    recipe = make_recipe(steps=5, **{"optimizer.warmup_steps": 50, "optimizer.schedule": "cosine"})
    rates = [learning_rate(recipe, step) for step in range(5)]
    assert rates == pytest.approx([1e-4 * (step + 1) / 50 for step in range(5)])


def test_plan_says_the_arithmetic():
    changes = {"batch.global_size": 24, "batch.micro_size": 2, "steps": 10, "lora.rank": 16}
    text = "\n".join(make_plan(make_recipe(**changes), 4).lines())
    assert "24 global = 2 micro × 3 accumulation × 4 processes" in text
    assert "10 = 240 samples" in text
    assert "lora rank 16, alpha 16" in text


def test_plan_says_what_the_adapter_begins_with_and_what_it_is_trained_over():
    changes = {"lora.merge_first": ["a.safetensors"], "lora.merge_strengths": [0.5]}
    model = {"model.path": "black-forest-labs/FLUX.2-klein-4B", "model.allow_distilled": True}
    recipe = make_recipe(**changes, **model, **{"lora.init_from": "b.safetensors"})
    text = "\n".join(make_plan(recipe, 1).lines())
    assert "begins as  b.safetensors" in text and "merged     a.safetensors × 0.5" in text
    assert "warning" not in text
    text = "\n".join(make_plan(make_recipe(**model), 1).lines())
    assert "the model is step-distilled" in text and "lora.merge_first" in text


@pytest.mark.parametrize(
    ("changes", "ignored"),
    [
        ({}, []),
        ({"lora.rank": 4, "objective.logit_mean": 0.5, "objective.max_shift_tokens": 64}, []),
        ({"lora.rank": 4, "method": "full"}, ["lora (method is full)"]),
        ({"method": "full"}, []),
        ({"offload_activations": True}, []),
        ({"offload_activations": True, "activation_checkpointing": "none"},
         ["offload_activations (activation_checkpointing is none)"]),
        ({"objective.shift": 2.0}, ["objective.shift (timestep_sampling is flux)"]),
        ({"objective.shift": 2.0, "objective.timestep_sampling": "shift"}, []),
        ({"objective.logit_std": 2.0, "objective.logit_mean": 1.0, "objective.timestep_sampling": "uniform"},
         [f"objective.{name} (timestep_sampling is uniform)" for name in ("logit_mean", "logit_std")]),
        ({"objective.max_shift_tokens": 64, "objective.timestep_sampling": "logit_normal"},
         ["objective.max_shift_tokens (timestep_sampling is logit_normal)"]),
        ({"data.fixed_caption": "a"}, ["data.fixed_caption (missing_caption is error)"]),
        ({"data.fixed_caption": "a", "data.missing_caption": "fixed"}, []),
        ({"optimizer.schedule": "cosine", "optimizer.warmup_steps": 50, "steps": 50},
         ["optimizer.schedule (all 50 steps are warm-up)"]),
        ({"objective.huber_delta": 2.0}, ["objective.huber_delta (objective.loss is mse)"]),
        ({"objective.huber_delta": 2.0, "objective.loss": "pseudo_huber"}, []),
        (
            {"objective.min_snr_gamma": 2.0, "objective.unmasked_weight": 0.5},
            [
                "objective.min_snr_gamma (objective.weighting is none)",
                "objective.unmasked_weight (objective.masked_loss is False)",
            ],
        ),
        ({"preservation.prompts": ["a"], "preservation.share": 0.5, "preservation.every": 11, "steps": 10},
         ["preservation.prompts (preservation.every is 11, and there are 10 steps)"]),
        (
            {"preservation.weight": 2.0, "preservation.target": "base"},
            [
                "preservation.weight (there are no preservation.sources and no prompts)",
                "preservation.target (there are no preservation.sources)",
            ],
        ),
        ({"captions.keep_tags": 2}, ["captions.keep_tags (tags are neither shuffled nor dropped)"]),
        ({"captions.keep_tags": 2, "captions.tag_dropout": 0.1, "captions.variants": 2}, []),
        ({"data.cache_gb": 5.0}, ["data.cache_gb (there is no data.cache)"]),
        ({"log.project": "a", "log.wandb": "disabled"}, ["log.project (log.wandb is disabled)"]),
        ({"model.path": "/", "model.revision": "main"}, ["model.revision (model.path / is a directory)"]),
        ({"model.path": "org/model", "model.revision": "main"}, []),
    ],
)  # fmt: skip
def test_settings_without_effect_are_named_in_the_plan(changes, ignored):
    recipe = make_recipe(**changes)
    assert ignored_settings(recipe) == ignored
    lines = make_plan(recipe, 1).lines()
    said = [line.split(maxsplit=1)[1] for line in lines if line.startswith("ignored")]
    assert said == ignored


@pytest.mark.parametrize(
    ("changes", "doubted"),
    [
        ({}, []),
        ({"optimizer.learning_rate": 0.5}, [r"optimizer\.learning_rate is 0.5; with adamw and method lora"]),
        ({"optimizer.learning_rate": 2e-3, "method": "full"}, [r"optimizer\.learning_rate is 0.002"]),
        ({"optimizer.learning_rate": 1e-9}, [r"optimizer\.learning_rate is 1e-09"]),
        ({"optimizer.learning_rate": 1.0, "optimizer.name": "prodigy"}, []),
        ({"optimizer.warmup_steps": 500, "steps": 1000}, []),
        ({"optimizer.warmup_steps": 900, "steps": 1000}, [r"optimizer\.warmup_steps is 900 .* hardly used"]),
        ({"captions.trigger_word": "ohwx"}, []),
        ({"captions.trigger_word": "ohwx", "preview.every": 5, "preview.prompts": ["ohw"]},
         ["captions.trigger_word ohwx is in none of preview.prompts"]),
        ({"captions.trigger_word": "ohwx", "preview.every": 5, "preview.prompts": ["", "an ohwx"]}, []),
        ({"optimizer.warmup_steps": 1001, "steps": 1000}, [r"optimizer\.warmup_steps is 1001 .* never reached"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_named_in_the_plan(changes, doubted):
    lines = make_plan(
        make_recipe(deepspeed="zero1" if "method" in changes else "zero0", **changes), 1
    ).lines()
    said = [line for line in lines if line.startswith("warning")]
    assert len(said) == len(doubted)
    for line, expected in zip(said, doubted, strict=True):
        assert re.match(rf"warning    {expected}", line)


def test_guidance_is_named_for_a_model_without_an_input_for_it():
    recipe = make_recipe(**{"objective.guidance": 3.5})
    klein, dev = (RELEASED[f"black-forest-labs/FLUX.2-{name}"] for name in ("klein-base-4B", "dev"))
    named = ["objective.guidance (klein has no guidance input)"]
    assert [ignored_settings(recipe, spec) for spec in (None, dev, klein)] == [[], [], named]


def processes_of(path: Path, recipe: Recipe) -> int:
    """Processes on all machines that a shipped recipe is for, by its settings or its name."""
    if recipe.launch.processes is not None:
        return recipe.launch.processes
    for pattern, processes in ((r"x1\b|gpu\d+gb", 1), ("multinode|x16", 16), ("x8", 8)):
        if re.search(pattern, path.stem):
            return processes
    raise AssertionError(f"{path.name} does not say in its name how many processes it is for")


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def shipped_recipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    return request.param


def test_shipped_recipe_resolves_and_is_short(shipped_recipe):
    recipe = load_recipe(shipped_recipe)
    assert make_plan(recipe, processes_of(shipped_recipe, recipe)).accumulation >= 1
    assert len(shipped_recipe.read_text().splitlines()) <= 45


def commands_of(path: Path) -> list[tuple[str, list[str]]]:
    """(command, arguments) of each `flux2-ds` line of the header, and of the trainer by hand."""
    header = re.sub(r"\\\n# *", " ", path.read_text().partition("\nrun_dir")[0])
    found = []
    for line in re.findall(r"^# +((?:flux2-ds|deepspeed) .*)", header, flags=re.MULTILINE):
        if line.startswith("flux2-ds "):
            _, command, *arguments = shlex.split(line)
            found.append((command, arguments))
        else:
            found.append(("by hand", line.partition(" flux2_ds.train ")[2].split()))
    return found


PRESETS = [path for path in shipped_recipes().values() if path not in RECIPES]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_laid_over_the_recipe_of_a_card(preset, monkeypatch, capsys):
    """It holds what is trained, nothing of the hardware; its header's commands are for such a pair."""
    monkeypatch.chdir(ROOT)
    commands = [
        line[4:] for line in preset.read_text().splitlines() if line.startswith("#   flux2")
    ]
    assert [command.split()[1] for command in commands] == ["prepare", "train"]
    for command in commands:
        _, name, *arguments = shlex.split(command)
        assert arguments[:4:2] == ["--config"] * 2 and arguments[3] == preset.stem
        recipe, _ = parse_recipe(recipe_parser(name, ""), arguments)
        alone = load_recipe(arguments[1])
        assert recipe.lora.rank == 32 and recipe.run_dir == alone.run_dir
        assert recipe.model == alone.model and recipe.batch == alone.batch
    monkeypatch.setattr("sys.argv", ["flux2-ds", "plan", *arguments])
    with pytest.raises(SystemExit):  # nothing is prepared
        cli.main()
    shown = re.findall(r"settings   (.*): (\S+)", capsys.readouterr().out)
    origin = {name: where for names, where in shown for name in names.split(", ")}
    assert origin["lora.rank"] == origin["optimizer.learning_rate"] == str(preset)
    length = "steps" if recipe.epochs is None else "epochs"
    assert origin[length] == str(preset) and len({"steps", "epochs"} & origin.keys()) == 1
    assert Path(origin["all others"]).stem == arguments[1]
    with pytest.raises(UserError, match=r"not given: .*model\.path.* before it: --config gpu24gb"):
        load_recipe(preset)  # alone


def test_commands_in_the_header_of_a_shipped_recipe_work(
    shipped_recipe, tmp_path, monkeypatch, capsys
):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node01 slots=8\nnode02 slots=8\n")
    gpus = processes_of(shipped_recipe, load_recipe(shipped_recipe))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    commands = commands_of(shipped_recipe)
    assert {name for name, _ in commands} & {"train", "slurm", "by hand"}
    for name, arguments in commands:
        assert arguments[:2] == ["--config", f"recipes/{shipped_recipe.name}"]
        if name not in ("train", "slurm"):
            parse_recipe(recipe_parser(name, ""), arguments)
            continue
        arguments = [argument for argument in arguments if argument != "--submit"]
        if name == "train":
            arguments.append("--dry-run")
        if "--launch.hostfile" in arguments:
            arguments += ["--launch.hostfile", str(hostfile)]
        monkeypatch.setattr("sys.argv", ["flux2-ds", name, *arguments])
        cli.main()
        assert f"recipes/{shipped_recipe.name}" in capsys.readouterr().out


def zero(**settings: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": settings}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.name": "adafactor"}, r"adafactor, which factors .* \(stage 2\).* zero0"),
        ({"optimizer.name": "prodigy"}, r"prodigy, which finds .* \(stage 2\).* zero0"),
        ({"optimizer.name": "muon"}, r"muon, which orthogonalizes .* \(stage 2\).* zero0"),
        ({"optimizer.name": "muon", "deepspeed": "zero2_offload"},
         r"muon, which .* \(stage 2\).* optimizer.name: adamw, which this config keeps in host"),
        ({"optimizer.name": "muon", "deepspeed": "zero0", "method": "dora"},
         "muon, .* method dora trains vectors or factors .* method: lora"),
        ({"optimizer.name": "prodigy", "deepspeed": "zero0"}, "learning_rate is 0.0001; Prodigy"),
        ({"optimizer.name": "adamw8bit", "deepspeed": "zero2_offload"},
         "offloads the optimizer at stage 2 and optimizer.name is adamw8bit; .*adamw8bit_paged"),
        (zero(offload_optimizer={"device": "cpu"}), "stage 0"),
        (zero(stage=3, offload_optimizer={"device": "nvme"}), "offload_optimizer on 'nvme'"),
        (zero(stage=2, compute_grad_norm=False), "compute_grad_norm false, .* need the norm. Remove it"),
        (zero(stage=2, ignore_unused_parameters=False), "ignore_unused_parameters false, .* Remove it"),
        (zero(stage=2, round_robin_gradients=True), "checkpoints would hold wrong weights. Remove it"),
        (zero(stage=2, zenflow={"topk_ratio": 0.1}), "zenflow, whose optimizer state checkpoints do not hold"),
        (zero(stage=2, offload_param={"device": "cpu"}), "offload_param at stage 2; .* zero3_offload"),
        ({"method": "full", "deepspeed": "zero0"}, "bf16 with method full, .* zero1"),
        ({"precision": "fp16", "deepspeed": "zero0"}, "fp16 with method lora, .* zero1"),
    ],
)  # fmt: skip
def test_what_deepspeed_cannot_do_is_refused_with_what_it_can(changes, message):
    with pytest.raises(UserError, match=message):
        make_plan(make_recipe(**changes), 2)


def test_passes_are_captured_by_default():
    assert captures(make_plan(make_recipe(deepspeed="zero0"), 1))
    assert captures(make_plan(make_recipe(deepspeed="zero2"), 2))
    assert not captures(make_plan(make_recipe(deepspeed="zero2", precision="fp16"), 2))
    assert not captures(make_plan(make_recipe(deepspeed="zero0", cuda_graphs=False), 1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"launch.accelerator": "cpu"}, "launch.accelerator is cpu"),
        ({"deepspeed": "zero3", "compile": True}, "has stage 3"),
        ({"compile": False}, "not compiled"),
        ({"method": "full"}, "method is full"),
        ({"offload_activations": True}, "offload_activations is true"),
        ({"lora.dropout": 0.1}, "lora.dropout is 0.1"),
        ({"base_placement": "host"}, "base_placement is host"),
    ],
)
def test_what_no_cuda_graph_can_hold_is_not_captured(changes, reason):
    changes = {"deepspeed": "zero0" if changes.get("method") != "full" else "zero1", **changes}
    assert not captures(make_plan(make_recipe(**changes), 1))
    with pytest.raises(
        UserError, match=f"cuda_graphs is true, and .*{reason}.* remove cuda_graphs"
    ):
        make_plan(make_recipe(cuda_graphs=True, **changes), 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "base_weights is bf16, not fp8 or int8"),
        ({"base_weights": "nf4_int8"}, "base_weights is nf4_int8, not fp8 or int8"),
        ({"base_weights": "fp8", "base_placement": "host"}, "base_placement is host"),
    ],
)
def test_what_is_not_held_transposed(changes, reason):
    assert not transposable(make_plan(make_recipe(**changes), 1))
    with pytest.raises(UserError, match=f"cache_transposed_base is true, and .*{reason}"):
        make_plan(make_recipe(cache_transposed_base=True, **changes), 1)


def test_the_plan_says_that_products_are_in_fp8():
    said = make_plan(make_recipe(**FP8), 1).lines()[0]
    assert "full fine-tune, bf16, base bf16, multiplied in fp8" in said


def test_an_8_bit_base_may_be_held_transposed():
    for given, expected in ((None, True), (True, True), (False, False)):
        asked = make_recipe(base_weights="int8", cache_transposed_base=given)
        assert transposable(make_plan(asked, 1)) == expected


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"base_placement": "host", "method": "full"}, 1, "frozen, and method is full"),
        ({"base_placement": "sharded", "deepspeed": "zero3"}, 2, "stage 3, .* Set deepspeed: zero2"),
        ({"base_weights": "nf4_fp8", "deepspeed": "zero3_offload"}, 1,
         "base_weights is nf4_fp8, .* stage 3, .* Set deepspeed: zero2, with base_placement: host or auto"),
        ({"base_weights": "int8", "method": "dora"} | zero(stage=3), 2,
         "base_weights is int8, .* base_placement: sharded or auto"),
        ({"base_placement": "sharded"}, 1, "one process, .* Set base_placement: gpu or host"),
        ({"base_placement": "sharded", "base_shard_group": 3}, 4, "groups of 3 .* to 2 or 4"),
        ({"base_placement": "sharded", "base_shard_group": 4}, 2, "groups of 4 .* to 2"),
        ({"base_placement": "sharded"}, 12, "groups of 8 .* to 2 or 3 or 4 or 6 or 12"),
        ({"base_placement": "host", "base_resident": 1.5}, 1, "base_resident is 1.5"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_placed_is_refused(changes, processes, message):
    with pytest.raises(UserError, match=message):
        make_plan(make_recipe(**{"batch.global_size": 24, **changes}), processes)


def test_where_a_base_is():
    def plan(processes=4, **changes):
        return make_plan(make_recipe(**{"batch.global_size": 24, **changes}), processes)

    assert (plan().shard_group, streamed_blocks(plan().recipe, 8)) == (None, [])
    sharded = {"base_placement": "sharded", "base_resident": 0.25}
    assert plan(**sharded).shard_group == 4
    assert plan(**sharded, base_shard_group=2).shard_group == 2
    assert plan(**{**sharded, "launch.processes": 2}).shard_group == 2
    assert plan(24, **sharded).shard_group == 8
    together = [
        plan(n, base_placement=p).passes_together
        for n, p in ((1, "auto"), (2, "auto"), (2, "host"))
    ]
    assert together == [False, True, False] and plan(**sharded).passes_together
    assert streamed_blocks(plan(**sharded).recipe, 8) == [0, 1, 2, 4, 5, 6]
    assert "75% of its blocks sharded over 4 GPUs" in plan(**sharded).lines()[0]
    host = plan(base_placement="host", base_shard_group=2)
    assert host.shard_group is None and streamed_blocks(host.recipe, 3) == [0, 1, 2]
    assert "100% of its blocks in host memory" in host.lines()[0]
    assert ignored_settings(host.recipe) == ["base_shard_group (base_placement is host)"]
    everywhere = make_recipe(base_resident=0.5)
    assert ignored_settings(everywhere) == ["base_resident (base_placement is gpu)"]


def test_what_is_compiled():
    """By default on CUDA; at stage 3 without DeepSpeed's own linear, which cannot be."""
    key = "memory_efficient_linear"
    for stage, changes, expected in (
        ("zero3", {}, True),
        ("zero2", {}, True),
        ("zero3", {"compile": False}, False),
        ("zero3", {"launch.accelerator": "cpu"}, False),
        ("zero3", {"launch.accelerator": "cpu", "compile": True}, True),
    ):
        plan = make_plan(make_recipe(deepspeed=stage, **changes), 2)
        assert compiles(plan.recipe) == expected
        assert plan.zero.get(key) == (False if expected and stage == "zero3" else None)
    own = {"zero_optimization": {"stage": 3, key: True}}
    with pytest.raises(UserError, match=f"sets {key}, .* set compile: false"):
        make_plan(make_recipe(deepspeed=own), 2)
    assert make_plan(make_recipe(deepspeed=own, compile=False), 2).zero[key] is True
