"""Which values each setting may have, whatever the hardware and the other settings. Pure, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from flux2_ds.data.buckets import bucket_table, resolutions
from flux2_ds.errors import UserError
from flux2_ds.recipe import Data, Recipe
from flux2_ds.spec import PIXELS_PER_TOKEN


def check_ranges(recipe: Recipe) -> None:
    """Refuse settings that are wrong whatever the hardware.

    Raises:
        UserError: naming the setting, its value and the rule.
    """
    data, preview = recipe.data, recipe.preview
    _check_urls(data)
    at_least_one: dict[str, int | None] = {
        "steps": recipe.steps,
        "batch.global_size": recipe.batch.global_size,
        "batch.micro_size": recipe.batch.micro_size,
        "lora.rank": recipe.lora.rank,
        "data.samples_per_shard": data.samples_per_shard,
        "data.shuffle_window": data.shuffle_window,
        "data.readers": data.readers,
        "prepare.processes": recipe.prepare.processes,
        "prepare.text_batch": recipe.prepare.text_batch,
        "prepare.image_batch": recipe.prepare.image_batch,
        "prepare.decode_threads": recipe.prepare.decode_threads,
        "evaluation.every": recipe.evaluation.every,
        "evaluation.samples": recipe.evaluation.samples,
        "checkpoint.every": recipe.checkpoint.every,
        "checkpoint.keep_last": recipe.checkpoint.keep_last,
        "checkpoint.keep_every": recipe.checkpoint.keep_every,
        "log.every": recipe.log.every,
        "launch.processes": recipe.launch.processes,
        "preview.steps": preview.steps,
        "preview.every": preview.every,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")

    def require(name: str, value: Any, ok: Callable[[Any], bool], rule: str) -> None:
        if not ok(value):
            raise UserError(f"{name} is {value}; it must be {rule}.")

    token = PIXELS_PER_TOKEN
    adam = recipe.optimizer
    require("launch.hang_after", recipe.launch.hang_after, lambda v: v >= 0, "0 or more")
    require("data.bucket_step", data.bucket_step, lambda v: v > 0 and v % token == 0,
            f"a multiple of {token}")  # fmt: skip
    require("preview.height", preview.height, lambda v: v > 0 and v % token == 0,
            f"a multiple of {token}")  # fmt: skip
    require("preview.width", preview.width, lambda v: v > 0 and v % token == 0,
            f"a multiple of {token}")  # fmt: skip
    require("data.max_aspect", data.max_aspect, lambda v: 1 <= v <= 64, "between 1 and 64")
    require("data.max_upscale", data.max_upscale, lambda v: v > 0, "positive")
    require("data.held_out", data.held_out, lambda v: 0 <= v <= 0.5, "between 0 and 0.5")
    require("data.cache_gb", data.cache_gb, lambda v: v > 0, "positive")
    saving = recipe.checkpoint
    require("checkpoint.keep_every", saving.keep_every,
            lambda v: v is None or v % saving.every == 0,
            f"a multiple of checkpoint.every, which is {saving.every}")  # fmt: skip
    for name, weight in data.weights.items():
        require(f"data.weights.{name}", weight, lambda v: 0 < v < math.inf, "positive")
    require("prepare.scratch_gb", recipe.prepare.scratch_gb, lambda v: v > 0, "positive")
    require("prepare.reference_resolution", recipe.prepare.reference_resolution,
            lambda v: v >= token, f"at least {token}")  # fmt: skip
    require("objective.caption_dropout", recipe.objective.caption_dropout,
            lambda v: 0 <= v <= 1, "between 0 and 1")  # fmt: skip
    require("lora.dropout", recipe.lora.dropout, lambda v: 0 <= v < 1, "in [0, 1)")
    require("optimizer.learning_rate", adam.learning_rate, lambda v: v > 0, "positive")
    require("optimizer.warmup_steps", adam.warmup_steps, lambda v: v >= 0, "0 or more")
    require("optimizer.max_grad_norm", adam.max_grad_norm, lambda v: v >= 0, "0 or more")
    require("activations", recipe.activations, lambda v: isinstance(v, str) or 0 <= v <= 1,
            "auto, recompute, keep or between 0 and 1")  # fmt: skip
    require("seed", recipe.seed, lambda v: v >= 0, "0 or more")
    require("preview.prompts", preview.prompts, bool, "one prompt or more")
    require("preview.seed", preview.seed, lambda v: v >= 0, "0 or more")
    require("optimizer.betas", adam.betas, lambda v: all(0 <= b < 1 for b in v), "in [0, 1)")
    require("optimizer.eps", adam.eps, lambda v: v >= 0, "0 or more")
    require("optimizer.ema_decay", adam.ema_decay, lambda v: v is None or 0 < v < 1, "in (0, 1)")
    require("optimizer.weight_decay", adam.weight_decay, lambda v: v >= 0, "0 or more")
    require("lora.alpha", recipe.lora.alpha, lambda v: v is None or v > 0, "positive")
    require("objective.shift", recipe.objective.shift, lambda v: v > 0, "positive")
    require("objective.guidance", recipe.objective.guidance, lambda v: v >= 0, "0 or more")
    require("objective.max_shift_tokens", recipe.objective.max_shift_tokens,
            lambda v: v >= 1, "at least 1")  # fmt: skip
    require("objective.std", recipe.objective.std, lambda v: v > 0, "positive")
    require("objective.mode_scale", recipe.objective.mode_scale, lambda v: -1 <= v <= 1.75,
            "between -1 and 1.75")  # fmt: skip
    for resolution in resolutions(data.resolution) or [0]:
        if not bucket_table(resolution, data.bucket_step, data.max_aspect):
            raise UserError(
                f"data.resolution {data.resolution} with data.bucket_step {data.bucket_step} gives no "
                "bucket. The step must not be larger than a resolution."
            )
    if data.missing_caption == "fixed" and not data.fixed_caption:
        raise UserError(
            "data.missing_caption is fixed but data.fixed_caption is empty. Give the caption."
        )


def _check_urls(data: Data) -> None:
    """Refuse what may be a secret: passwords, a server's user names and queries. `sftp://me@host` has none."""
    images = {"": data.images} if isinstance(data.images, str) else data.images
    named = {
        "data.shards": data.shards,
        **{f"data.images.{name}".rstrip("."): location for name, location in images.items()},
        **{f"data.more_shards.{name}": location for name, location in data.more_shards.items()},
    }
    for name, location in named.items():
        if re.search(r"https?://[^/]*@|://[^/]*:[^/]*@", location):
            raise UserError(
                f"{name} is a URL with a user name or a password in it, and logs, recipe.yaml and W&B would "
                "show it. Take it out and give credentials as docs/data.md says under Reading."
            )
        if re.match(r"https?://[^?]*\?", location):
            raise UserError(
                f"{name} is a URL with a query (?...), such as signed URLs have; logs, recipe.yaml and W&B "
                "would show it, and it does not name a folder or a .tar. Take it out and give credentials as "
                "docs/data.md says under Reading."
            )
