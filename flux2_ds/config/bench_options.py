"""The options of `flux2-ds bench`, and what it refuses. No torch: the launcher refuses before it starts anything."""

from __future__ import annotations

import argparse
from typing import Any

from flux2_ds.config.buckets import Bucket, bucket_table, resolutions
from flux2_ds.config.plan import Plan
from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is timed, and what is told of it."""
    add = parser.add_argument
    for side in ("--width", "--height"):
        add(side, type=int, help="Of the images, in px. Default: the recipe's largest.")
    add("--measure", type=int, default=10, help="Steps in a row that are timed, three times.")
    add("--warm-up", type=int, default=3, help="Steps before them.")
    add("--card", type=float, help="Use no more than so many GiB of each card.")
    add(
        "--against",
        choices=["diffusers", "bare"],
        help="Also time the loop of diffusers' example, or the same step without DeepSpeed, on one GPU.",
    )
    add("--profile", help="Write a trace of rank 0 here; list its costliest kernels.")
    add("--json", action="store_true", help="Print one JSON object.")
    add("--result", help="Write that JSON object here, too.")


def bench_bucket(options: Any, recipe: Recipe) -> Bucket:
    """The image that is timed: of the recipe's largest buckets the one nearest to a square, in the width
    and height that the options give."""
    data = recipe.data
    table = bucket_table(resolutions(data.resolution)[0], data.bucket_step, data.max_aspect)
    largest = max(table, key=lambda bucket: (bucket.tokens, -abs(bucket.width - bucket.height)))
    width = largest.width if options.width is None else options.width
    return Bucket(largest.height if options.height is None else options.height, width)


def check_options(options: Any, plan: Plan) -> None:
    """Refuse options that do not go together, or not with the plan."""
    bucket = bench_bucket(options, plan.recipe)
    if bucket.width % 16 or bucket.height % 16 or min(bucket.width, bucket.height) < 16:
        raise UserError(
            f"--width {bucket.width} and --height {bucket.height} must be multiples of 16."
        )
    if options.measure < 1 or options.warm_up < 1:
        raise UserError(
            f"--measure {options.measure} and --warm-up {options.warm_up} must be at least 1."
        )
    if options.against is not None and plan.processes > 1:
        raise UserError(
            f"--against {options.against} compares steps of one process, and these are "
            f"{plan.processes}. Add --launch.processes 1."
        )
    if options.against == "bare" and (plan.zero_stage or plan.recipe.method == "full"):
        raise UserError(
            "--against bare is plain torch, without ZeRO and fp32 masters. Set deepspeed: zero0 and "
            "method: lora."
        )
