"""Which values each setting may have, whatever the hardware and the other settings. Pure, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from flux2_ds.data.buckets import bucket_table, resolutions
from flux2_ds.errors import UserError
from flux2_ds.recipe import Data, Recipe
from flux2_ds.spec import PIXELS_PER_TOKEN

_TOKEN = PIXELS_PER_TOKEN
_RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("between 0 and 2⁶⁴ - 1", lambda v: 0 <= v < 2**64, "seed preview.seed"),
    ("at least 1", lambda v: v >= 1,
     "steps batch.global_size batch.micro_size lora.rank data.samples_per_shard data.shuffle_window "
     "data.readers prepare.processes prepare.text_batch prepare.image_batch prepare.decode_threads "
     "evaluation.every evaluation.samples checkpoint.every checkpoint.keep_last checkpoint.keep_every "
     "log.every launch.processes preview.steps preview.every objective.max_shift_tokens"),
    ("0 or more", lambda v: v >= 0,
     "launch.hang_after objective.guidance optimizer.warmup_steps "
     "optimizer.max_grad_norm optimizer.eps optimizer.weight_decay"),
    ("positive", lambda v: v > 0,
     "data.max_upscale data.cache_gb prepare.scratch_gb optimizer.learning_rate lora.alpha "
     "objective.shift objective.std"),
    (f"a multiple of {_TOKEN}", lambda v: v > 0 and v % _TOKEN == 0,
     "data.bucket_step preview.height preview.width"),
    (f"at least {_TOKEN}", lambda v: v >= _TOKEN, "prepare.reference_resolution"),
    ("between 0 and 1", lambda v: 0 <= v <= 1, "objective.caption_dropout"),
    ("in [0, 1)", lambda v: 0 <= v < 1, "lora.dropout"),
    ("in [0, 1)", lambda v: all(0 <= beta < 1 for beta in v), "optimizer.betas"),
    ("in (0, 1)", lambda v: 0 < v < 1, "optimizer.ema_decay"),
    ("between 0 and 0.5", lambda v: 0 <= v <= 0.5, "data.held_out"),
    ("between 1 and 64", lambda v: 1 <= v <= 64, "data.max_aspect"),
    ("between -1 and 1.75", lambda v: -1 <= v <= 1.75, "objective.mode_scale"),
    ("auto, recompute, keep or between 0 and 1", lambda v: isinstance(v, str) or 0 <= v <= 1, "activations"),
    ("one prompt or more", bool, "preview.prompts"),
]  # fmt: skip
"""What a setting must be, if it is given, and the settings of which that holds."""


def check_ranges(recipe: Recipe) -> None:
    """Refuse settings that are wrong whatever the hardware.

    Raises:
        UserError: naming the setting, its value and the rule.
    """
    data, every = recipe.data, recipe.checkpoint.every
    _check_urls(data)
    for rule, holds, names in _RULES:
        for name in names.split():
            _require(name, attrgetter(name)(recipe), holds, rule)
    for name, weight in data.weights.items():
        _require(f"data.weights.{name}", weight, lambda v: 0 < v < math.inf, "positive")
    _require(
        "checkpoint.keep_every",
        recipe.checkpoint.keep_every,
        lambda v: v % every == 0,
        f"a multiple of checkpoint.every, which is {every}",
    )
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


def _require(name: str, value: Any, holds: Callable[[Any], bool], rule: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number.")
    if value is not None and not holds(value):
        raise UserError(f"{name} is {value}; it must be {rule}.")


def _check_urls(data: Data) -> None:
    """Refuse what may be a secret: passwords, a server's user names and queries. `sftp://me@host` has none."""
    images = {"": data.images} if isinstance(data.images, str) else data.images
    named = {
        "data.shards": data.shards,
        **{f"data.images.{name}".rstrip("."): location for name, location in images.items()},
        **{f"data.more_shards.{name}": location for name, location in data.more_shards.items()},
    }
    for name, location in named.items():
        if re.search(r"https?://[^/]*@|://[^/]*:[^/]*@", location, re.IGNORECASE):
            raise UserError(
                f"{name} is a URL with a user name or a password in it, and logs, recipe.yaml and W&B would "
                "show it. Take it out and give credentials as docs/data.md says under Reading."
            )
        # In other stores' names a ? may stand for any character.
        if re.search(r"https?://[^?]*\?|://[^?]*\?[^/]*=", location, re.IGNORECASE):
            raise UserError(
                f"{name} is a URL with a query (?...), such as signed URLs have; logs, recipe.yaml and W&B "
                "would show it, and it does not name a folder or a .tar. Take it out and give credentials as "
                "docs/data.md says under Reading."
            )
