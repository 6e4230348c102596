"""What settings refuse of each other, and which have no effect beside the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from flux2_ds.config.buckets import bucket_table, resolutions
from flux2_ds.config.deepspeed_config import OFFLOADS, offload_device
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import (
    DEFAULT_SOURCE,
    IN_EPOCHS,
    Log,
    Lora,
    Recipe,
    Validation,
    is_url,
    trigger_words,
)
from flux2_ds.config.settings import check_ranges, settings_of
from flux2_ds.errors import UserError, counted


def check_recipe(recipe: Recipe) -> None:
    """Refuse what is wrong for every command and on any machine."""
    check_ranges(Recipe, recipe)
    for problem in _problems(recipe):
        raise UserError(problem)


def check_training(recipe: Recipe, processes: int, zero: dict[str, Any]) -> None:
    """Refuse what cannot be trained by so many processes with DeepSpeed's `zero_optimization`; the message
    names the setting, its value and a value that works."""
    for problem in _training_problems(recipe, processes, zero):
        raise UserError(problem)


def _problems(recipe: Recipe) -> Iterator[str]:
    if not recipe.preview.prompts:
        yield "preview.prompts is []; it must have one prompt or more."
    yield from _saving_problems(recipe)
    yield from _preservation_problems(recipe)
    yield from _data_problems(recipe)
    yield from _caption_problems(recipe)
    yield from _adapter_problems(recipe)
    yield from _precision_problems(recipe)


def _saving_problems(recipe: Recipe) -> Iterator[str]:
    every = recipe.checkpoint.every
    if recipe.checkpoint.keep_every is not None and recipe.checkpoint.keep_every % every:
        yield (
            f"checkpoint.keep_every is {recipe.checkpoint.keep_every}; it must be a multiple of "
            f"checkpoint.every, which is {every}."
        )
    period = recipe.validation.every
    in_epochs = recipe.validation.every_epochs is not None  # is counted in steps later
    if recipe.checkpoint.keep_best and every % period and not in_epochs:
        yield (
            f"checkpoint.keep_best is true, checkpoint.every {every} and validation.every {period}: not every "
            f"checkpoint has a validation loss. Set checkpoint.every to {math.ceil(every / period) * period}."
        )
    if recipe.validation.against_base and recipe.method == "full":
        yield (
            "validation.against_base is true, but method full has no adapter to switch off. Set "
            "validation.at_start: true, which evaluates the model before it is trained."
        )
    for names in IN_EPOCHS.items():  # the parser keeps the one that is given last
        in_epochs, in_steps = (attrgetter(name)(recipe) for name in names)
        if in_epochs is not None and in_steps != settings_of(Recipe)[names[1]].default:
            yield (
                f"{names[0]} is {in_epochs:g} and {names[1]} is {in_steps}. Leave out one of them."
            )


def _preservation_problems(recipe: Recipe) -> Iterator[str]:
    kept = recipe.preservation
    if kept.uses_base and recipe.method == "full":
        setting = "prompts" if kept.prompts else "target: base"
        yield (
            f"preservation.{setting} needs an adapter to switch off, and method is full. Give regularization images "
            "(preservation.sources) with target: image, or set method: lora."
        )
    if bool(kept.prompts) != bool(kept.share):
        yield (
            f"preservation.prompts is {kept.prompts} and share {kept.share:g}: one has no effect without the other. "
            "Give both, share 0.25 say, or neither."
        )
    if kept.share == 1 and kept.every == 1:
        yield (
            "preservation.share is 1 and preservation.every 1: no sample is left to learn from. Set share to 0.25, say, or "
            "every to 4: every fourth step is then for preservation alone."
        )


def _data_problems(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    for resolution in resolutions(data.resolution) or [0]:
        if not bucket_table(resolution, data.bucket_step, data.max_aspect):
            yield (
                f"data.resolution {data.resolution} with data.bucket_step {data.bucket_step} gives no "
                "bucket. The step must not be larger than a resolution."
            )
    if data.missing_caption == "fixed" and not data.fixed_caption:
        yield "data.missing_caption is fixed but data.fixed_caption is empty. Give the caption."


def _caption_problems(recipe: Recipe) -> Iterator[str]:
    captions, images = recipe.captions, recipe.data.images
    sources = {DEFAULT_SOURCE} if isinstance(images, str) else images.keys()
    for name, value in (
        ("data.caption_column", recipe.data.caption_column),
        ("captions.trigger_word", captions.trigger_word),
        ("captions.prefix", captions.prefix),
        ("captions.suffix", captions.suffix),
    ):
        if isinstance(value, dict) and (unknown := value.keys() - sources):
            yield (
                f"{name}.{min(unknown)}: there is no such source in data.images; there are "
                f"{', '.join(sorted(sources))}."
            )
    suffixes = recipe.data.mask_suffixes + recipe.data.reference_suffixes
    if len({each.lower() for each in suffixes}) < len(suffixes):
        yield (
            f"data.mask_suffixes {recipe.data.mask_suffixes} and data.reference_suffixes "
            f"{recipe.data.reference_suffixes} have one suffix twice. Leave one out."
        )
    if captions.add_trigger_word and not captions.trigger_word:
        yield "captions.add_trigger_word is true, and there is no captions.trigger_word. Give the word."
    drawn = captions.shuffle_tags or captions.tag_dropout > 0
    if drawn and captions.variants == 1:
        yield (
            "captions.variants is 1, and captions.shuffle_tags or tag_dropout is set: every epoch would have the same "
            "tags in the same order. Set captions.variants to 4, say: so many texts of each caption are encoded."
        )
    if captions.variants > 1 and not drawn:
        yield (
            f"captions.variants is {captions.variants}, and all would be the same text. Set captions.shuffle_tags: "
            "true or captions.tag_dropout, or remove it."
        )


def _adapter_problems(recipe: Recipe) -> Iterator[str]:
    lora, files = recipe.lora, ("init_from", "merge_first")
    if recipe.method == "full" and (given := [name for name in files if getattr(lora, name)]):
        yield (
            f"lora.{given[0]} is {getattr(lora, given[0])}, and method is full, which has no adapter. Remove it: `flux2-ds "
            "export --merge true` writes weights with an adapter in them, which model.path may name."
        )
    if recipe.method in ("lokr", "loha"):
        only_lora = {"dropout": "lora or dora", "rslora": "lora or dora", "init": "lora"}
        for name in (name for name in only_lora if _given(lora, name)):
            yield (
                f"lora.{name} is {getattr(lora, name)}, and method {recipe.method}, which has no such thing. Remove it, or "
                f"set method: {only_lora[name]}."
            )
    elif lora.init != "gaussian" and recipe.method != "full":
        reason = None
        if recipe.method == "dora":
            reason = (
                "method is dora, whose magnitudes would be those of a base without its largest part"
            )
        elif recipe.base_weights not in (None, "bf16"):
            reason = f"base_weights is {recipe.base_weights}; what is left of the base would be quantized otherwise"
        elif lora.init_from is not None:
            reason = f"lora.init_from is {lora.init_from}, with which the adapter begins"
        elif recipe.preservation.uses_base or recipe.validation.against_base:
            used = "preservation" if recipe.preservation.uses_base else "validation.against_base"
            reason = (
                f"{used} switches the adapter off, which leaves the base without its largest part"
            )
        if reason:
            yield f"lora.init is {lora.init}, and {reason}. Remove one of them."
    if lora.merge_strengths and len(lora.merge_strengths) != len(lora.merge_first):
        yield (
            f"lora.merge_strengths is {lora.merge_strengths}, and lora.merge_first has {counted(len(lora.merge_first), 'file')}. Give "
            "one strength for each."
        )


def _precision_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.precision == "fp32" and recipe.attention in ("cudnn", "flash", "flash_attn"):
        yield (
            f"attention is {recipe.attention}, which has 16 bits only, and precision is fp32. Set attention: "
            "auto, or precision: bf16."
        )
    base = recipe.base_weights
    if base is not None and recipe.method == "full":
        yield (
            f"base_weights is {base}, but method full trains the base itself. Remove base_weights, or "
            "set method: lora."
        )
    if recipe.compute == "fp8":
        if recipe.method != "full":
            yield (
                f"compute is fp8, which is for weights that are trained, and method is {recipe.method}. Set "
                "base_weights: fp8, with which an adapter's frozen base is multiplied in fp8, and remove compute."
            )
        if recipe.precision != "bf16":
            yield (
                f"compute is fp8 and precision {recipe.precision}; fp8 products are for weights and activations in "
                "bf16. Set precision: bf16, or remove compute."
            )
    if base == "bf16" and recipe.precision != "bf16":
        yield (
            f"base_weights is bf16 and precision {recipe.precision}; an unquantized base has the dtype "
            "of precision. Remove base_weights, or set precision: bf16."
        )
    if base not in (None, "bf16") and recipe.precision == "fp16":
        yield (
            f"base_weights is {base} with precision fp16, whose engine would round the weights' scales. "
            "Set precision: bf16."
        )


def _training_problems(recipe: Recipe, processes: int, zero: dict[str, Any]) -> Iterator[str]:
    if processes < 1:
        yield f"the number of processes is {processes}; it must be at least 1."
    batch, stage = recipe.batch, int(zero.get("stage", 0))
    per_pass = batch.micro_size * processes
    if batch.global_size % per_pass:
        nearest = max(1, round(batch.global_size / per_pass)) * per_pass
        yield (
            f"batch.global_size {batch.global_size} is not a multiple of batch.micro_size "
            f"{batch.micro_size} × {counted(processes, 'process')} = {per_pass}. "
            f"Set batch.global_size to {nearest}, or change micro_size or the number of processes."
        )
    if recipe.precision == "fp16" and recipe.launch.accelerator == "cpu":
        yield (
            "precision is fp16, which DeepSpeed does not offer on the CPU. Set precision to bf16 "
            "or fp32, or launch.accelerator to cuda."
        )
    if stage == 0 and (
        recipe.precision == "fp16" or (recipe.precision == "bf16" and recipe.method == "full")
    ):
        yield (
            f"precision is {recipe.precision} with method {recipe.method}, whose fp32 masters need "
            "ZeRO, and the deepspeed config has stage 0. Set deepspeed: zero1, which costs nothing "
            "on one process, or precision: fp32."
        )
    hpz = zero.get("zero_hpz_partition_size", 1)
    if hpz > 1 and (stage < 3 or processes % min(hpz, processes)):
        yield (
            f"zero_hpz_partition_size in the deepspeed config is {hpz}, with stage {stage} and {processes} processes. "
            "It needs stage 3, and must divide the processes: it is how many GPUs a host has."
        )
    if stage == 3 and recipe.base_weights not in (None, "bf16"):
        elsewhere = "sharded" if processes > 1 else "host"
        yield (
            f"base_weights is {recipe.base_weights}, and the deepspeed config has stage 3, which is for weights that are "
            f"not quantized. Set deepspeed: zero2, with base_placement: {elsewhere} or auto where a GPU cannot hold the "
            "base. A run may continue so."
        )
    yield from _placement_problems(recipe, processes, stage)
    yield from _optimizer_problems(recipe, stage, zero)
    yield from _offload_problems(recipe, stage, zero)
    for name, reason in (
        ("cuda_graphs", why_no_cuda_graphs(recipe, stage)),
        ("cache_transposed_base", why_not_transposed(recipe)),
    ):
        if getattr(recipe, name) and reason:
            yield f"{name} is true, and {reason}. Change that, or remove {name}."
    if stage == 3 and compiles(recipe) and zero.get("memory_efficient_linear"):
        yield (
            "the deepspeed config sets memory_efficient_linear, which cannot be compiled, and the blocks "
            "are compiled. Remove it, or set compile: false."
        )


def _placement_problems(recipe: Recipe, processes: int, stage: int) -> Iterator[str]:
    placement = recipe.base_placement
    if placement in ("gpu", "auto"):
        return
    if recipe.method == "full":
        yield (
            f"base_placement is {placement}, which is for a base that is frozen, and method is full. Set "
            "base_placement: gpu, and deepspeed: zero3_offload or zero3."
        )
    if stage == 3:
        yield (
            f"base_placement is {placement}, and the deepspeed config has stage 3, which partitions the base "
            "itself. Set deepspeed: zero2, or base_placement: gpu."
        )
    if placement != "sharded":
        return
    if processes == 1:
        yield (
            "base_placement is sharded, and there is one process, which would hold all of it. Set "
            "base_placement: gpu or host."
        )
    group = shard_group(recipe, processes)
    if processes % group:
        fitting = [str(n) for n in range(2, processes + 1) if not processes % n]
        yield (
            f"base_placement is sharded over groups of {group} processes, and {processes} processes cannot be "
            f"divided into such. Set base_shard_group to {' or '.join(fitting)}."
        )


def shard_group(recipe: Recipe, processes: int) -> int:
    """How many processes share one copy of a sharded base."""
    return recipe.base_shard_group or min(processes, recipe.launch.processes or 8)


def _optimizer_problems(recipe: Recipe, stage: int, zero: dict[str, Any]) -> Iterator[str]:
    adam = recipe.optimizer
    if adam.name in ("adafactor", "prodigy", "muon") and stage > 0:
        reason = {
            "adafactor": "factors each matrix, and ZeRO flattens the matrices",
            "muon": "orthogonalizes each matrix, and ZeRO flattens the matrices",
            "prodigy": "finds one step size from all weights, and ZeRO gives each process a part",
        }[adam.name]
        other = "adamw8bit, which needs as little memory and works at every stage"
        if offload_device(zero, "offload_optimizer") != "none":
            other = "adamw, which this config keeps in host memory"
        yield (
            f"optimizer.name is {adam.name}, which {reason} (stage {stage}). Set deepspeed: zero0, "
            f"or optimizer.name: {other}."
        )
    if adam.name == "muon" and recipe.method != "lora":
        yield (
            f"optimizer.name is muon, which makes an update of one size in every direction of a matrix, and method "
            f"{recipe.method} trains vectors or factors of a product, too. Set method: lora, or optimizer.name: adamw."
        )
    if adam.name == "prodigy" and adam.learning_rate < 0.1:
        yield (
            f"optimizer.learning_rate is {adam.learning_rate:g}; Prodigy finds its own step size and "
            "multiplies it by this. Set it to 1."
        )


def _offload_problems(recipe: Recipe, stage: int, zero: dict[str, Any]) -> Iterator[str]:
    for part in OFFLOADS:
        device = offload_device(zero, part)
        if device not in ("none", "cpu"):
            yield (
                f"the deepspeed config has {part} on {device!r}, which checkpoints cannot read. "
                'Set "device": "cpu".'
            )
    if offload_device(zero, "offload_param") != "none" and stage != 3:
        yield (
            f"the deepspeed config has offload_param at stage {stage}; DeepSpeed moves parameters at "
            "stage 3 only. Set deepspeed: zero3_offload, or remove offload_param."
        )
    lost = "whose optimizer state checkpoints do not hold"
    wrong = {
        f"zenflow, {lost}": zero.get("zenflow"),
        f"super_offload, {lost}": (zero.get("offload_optimizer") or {}).get("super_offload"),
        "compute_grad_norm false, and clipping, the records and the check for gradients that are not finite need the "
        "norm": not zero.get("compute_grad_norm", True),
        "ignore_unused_parameters false, which nothing here reads": not zero.get(
            "ignore_unused_parameters", True
        ),
        "round_robin_gradients, with which DeepSpeed 0.19.8 takes one parameter's master for another's, so that "
        "checkpoints would hold wrong weights": zero.get("round_robin_gradients"),
    }
    for what in (what for what, found in wrong.items() if found):
        yield f"the deepspeed config has {what}. Remove it."
    optimizer = recipe.optimizer.name
    if offload_device(zero, "offload_optimizer") != "none" and (optimizer != "adamw" or stage == 0):
        yield (
            f"the deepspeed config offloads the optimizer at stage {stage} and optimizer.name is "
            f"{optimizer}; only adamw can be offloaded, at stages 1 to 3. Set "
            "optimizer.name: adamw with deepspeed: zero2_offload, or keep adamw8bit_paged with "
            "deepspeed: zero2, which moves its state to host memory when the card is full."
        )


def compiles(recipe: Recipe) -> bool:
    """Whether the blocks are compiled: by default on CUDA."""
    if recipe.compile is not None:
        return recipe.compile
    return recipe.launch.accelerator == "cuda"


def why_no_cuda_graphs(recipe: Recipe, stage: int) -> str | None:
    """Why passes cannot be recorded as CUDA graphs, which hold work for the card only."""
    if recipe.launch.accelerator != "cuda":
        return f"launch.accelerator is {recipe.launch.accelerator}"
    if stage == 3:
        return "the deepspeed config has stage 3, at which Python gathers the weights"
    if not compiles(recipe):
        return "the blocks are not compiled (compile is false)"
    if recipe.method == "full":
        return "method is full, whose gradients would be held twice"
    if recipe.offload_activations:
        return "offload_activations is true"
    if recipe.base_placement in ("host", "sharded"):
        return f"base_placement is {recipe.base_placement}, and Python brings the blocks"
    if recipe.lora.dropout:
        return f"lora.dropout is {recipe.lora.dropout:g}, which each step seeds anew"
    return None


def why_not_transposed(recipe: Recipe) -> str | None:
    """Why a transposed copy of the base would save nothing, or take what was to be saved."""
    if recipe.base_weights not in ("fp8", "int8"):
        return f"base_weights is {recipe.base_weights or recipe.precision}, not fp8 or int8"
    if recipe.base_placement in ("host", "sharded"):
        return f"base_placement is {recipe.base_placement}, which is to save memory"
    return None


_TIMESTEPS = {
    "shift": ("shift",),
    "max_shift_tokens": ("flux",),
    "logit_mean": ("flux", "shift", "logit_normal"),
    "logit_std": ("flux", "shift", "logit_normal"),
    "mode_scale": ("mode",),
}
"""Setting of `objective` -> the `objective.timestep_sampling` that use it."""


_OF_WANDB = ("project", "entity", "name", "group", "tags", "notes", "alerts", "artifacts")
"""Settings of `log` that are W&B's."""


def ignored_settings(recipe: Recipe, spec: Spec | None = None) -> list[str]:
    """The settings without effect, and why. `spec`: of the model, where it is known."""
    return [f"{setting} ({reason})" for setting, reason in _ignored(recipe, spec)]


def _ignored(recipe: Recipe, spec: Spec | None) -> Iterator[tuple[str, str]]:
    objective, adam, data = recipe.objective, recipe.optimizer, recipe.data
    if recipe.method == "full" and recipe.lora != Lora():
        yield "lora", "method is full"
    elif recipe.method != "lokr":
        for name in ("factor", "decompose_both"):
            if _given(recipe.lora, name):
                yield f"lora.{name}", f"method is {recipe.method}"
    for name, used_by in _TIMESTEPS.items():
        if _given(objective, name) and objective.timestep_sampling not in used_by:
            yield f"objective.{name}", f"timestep_sampling is {objective.timestep_sampling}"
    for name, setting, value in (
        ("huber_delta", "loss", "huber"),
        ("min_snr_gamma", "weighting", "min_snr"),
        ("unmasked_weight", "masked_loss", True),
    ):
        given = getattr(objective, setting)
        if _given(objective, name) and given != value and given != f"pseudo_{value}":
            yield f"objective.{name}", f"objective.{setting} is {given}"
    kept = recipe.preservation
    if _given(kept, "weight") and not kept.sources and not kept.prompts:
        yield "preservation.weight", "there are no preservation.sources and no prompts"
    if kept.prompts and kept.every > recipe.steps and recipe.epochs is None:
        yield (
            "preservation.prompts",
            f"preservation.every is {kept.every}, and there are {recipe.steps} steps",
        )
    if _given(kept, "every") and not kept.prompts:
        yield "preservation.every", "there are no preservation.prompts"
    if _given(kept, "target") and not kept.sources:
        yield "preservation.target", "there are no preservation.sources"
    if _given(objective, "guidance") and spec is not None and not spec.guidance:
        yield "objective.guidance", f"{spec.variant} has no guidance input"
    for name in ("betas", "eps"):
        if _given(adam, name) and adam.name in ("adafactor", "muon"):
            yield f"optimizer.{name}", f"optimizer.name is {adam.name}"
    if _given(adam, "schedule") and adam.warmup_steps >= recipe.steps and recipe.epochs is None:
        yield "optimizer.schedule", f"all {recipe.steps} steps are warm-up"
    if recipe.base_placement in ("gpu", "auto") and recipe.base_resident:
        yield "base_resident", f"base_placement is {recipe.base_placement}"
    if recipe.base_placement in ("gpu", "host") and recipe.base_shard_group:
        yield "base_shard_group", f"base_placement is {recipe.base_placement}"
    if recipe.offload_activations and recipe.activation_checkpointing in ("none", 0.0):
        yield (
            "offload_activations",
            f"activation_checkpointing is {recipe.activation_checkpointing}",
        )
    if recipe.validation != Validation() and not data.validation_fraction and not data.more_shards:
        yield "validation", "data.validation_fraction is 0"
    if recipe.checkpoint.keep_best and not data.validation_fraction and not data.more_shards:
        yield "checkpoint.keep_best", "data.validation_fraction is 0"
    if data.cache and not any(map(is_url, (data.shards, *data.more_shards.values()))):
        yield "data.cache", f"data.shards {data.shards} is on disk"
    if _given(data, "cache_gb") and not data.cache:
        yield "data.cache_gb", "there is no data.cache"
    if data.fixed_caption and data.missing_caption != "fixed":
        yield "data.fixed_caption", f"missing_caption is {data.missing_caption}"
    for name in ("keep_tags", "tag_separator"):
        if _given(recipe.captions, name) and recipe.captions.variants == 1:
            yield f"captions.{name}", "tags are neither shuffled nor dropped"
    if recipe.model.revision and Path(recipe.model.path).is_dir():
        yield "model.revision", f"model.path {recipe.model.path} is a directory"
    if recipe.log.wandb == "disabled":
        for name in _OF_WANDB:
            if getattr(recipe.log, name) != getattr(Log(), name):
                yield f"log.{name}", "log.wandb is disabled"
    elif recipe.log.alerts and not recipe.launch.hang_timeout_s:
        yield "log.alerts for stalls", "launch.hang_timeout_s is 0"


_USUAL_RATES = {"prodigy": (0.1, 10.0), "muon": (1e-5, 1.0)}
_USUAL_OF_METHOD = {"full": (1e-8, 1e-3)}
_USUAL_OF_ADAPTERS = 1e-7, 0.01
"""Learning rates that are in use, with a factor of ten above and below; outside of them is a slip."""


def doubtful_settings(recipe: Recipe) -> Iterator[str]:
    """Find what is possible and can hardly be meant."""
    adam, steps = recipe.optimizer, recipe.steps
    low, high = _USUAL_RATES.get(adam.name, _USUAL_OF_METHOD.get(recipe.method, _USUAL_OF_ADAPTERS))
    if not low <= adam.learning_rate <= high:
        yield (
            f"optimizer.learning_rate is {adam.learning_rate:g}; with {adam.name} and method "
            f"{recipe.method} it is between {low:g} and {high:g}"
        )
    if adam.warmup_steps > steps / 2 and recipe.epochs is None:
        reached = "never reached" if adam.warmup_steps > steps else "hardly used"
        yield (
            f"optimizer.warmup_steps is {adam.warmup_steps} and steps {steps}; the learning rate is {reached}"
        )
    words, prompts = trigger_words(recipe.captions.trigger_word), recipe.preview.prompts
    if recipe.preview.in_training and words and not any(w in p for w in words for p in prompts):
        yield f"captions.trigger_word {', '.join(words)} is in none of preview.prompts, which show what is trained"


def _given(section: Any, name: str) -> bool:
    """Whether the setting is not its default."""
    return bool(getattr(section, name) != getattr(type(section), name))
