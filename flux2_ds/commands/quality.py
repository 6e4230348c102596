"""Measure how near a quantized base, or a full fine-tune in fp8, stays to the plain one, on the recipe's own model
and shards.

    flux2-ds quality --config RECIPE [--steps 300] [--modes '[fp8, nf4]'] [--json]

An adapter is trained over the plain base. With it, gradients of the same global batches are taken over
the plain base and over each quantized one, and compared block by block. Then an adapter is trained over
each, from the same start with the same samples, noise and timesteps. One process. With `method: full` the model
itself is trained, and its products are in fp8 (`compute: fp8`).
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from flux2_ds.config.model_files import model_directory
from flux2_ds.config.model_spec import read_spec
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.plan import learning_rate, make_plan
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.dataset import build_order, check_shards, in_steps, read_data
from flux2_ds.data.loader import MicroBatch
from flux2_ds.data.shards import read_conditioning
from flux2_ds.distributed import Process, destroy_process_group, init_process_group
from flux2_ds.errors import UserError, run_root
from flux2_ds.model import transformer
from flux2_ds.ops.quantized_linear import BASE_WEIGHTS
from flux2_ds.run.logging import set_up_console, stdout_to_stderr
from flux2_ds.run.run_dir import with_adapter_file
from flux2_ds.training.build import build_engine, build_loader, build_model, build_objective
from flux2_ds.training.step import seed_dropout, train_step

log = logging.getLogger("flux2_ds")

DRIFT = 0.01
"""A mode whose loss, over the last quarter of the steps, is higher by more than this share is labeled."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Nearness:
    """Of gradients to those over the plain base, over all blocks and global batches.

    `cosine`: between the two; `error`: norm of the difference over the norm of the plain one.
    """

    cosine_median: float
    cosine_worst: float
    error_median: float
    error_worst: float
    worst_block: str
    cosines: dict[str, float]
    """Median of each block."""


@dataclass(frozen=True)
class Trained:
    """The result of training over one base; `losses`: of each step."""

    mode: str
    losses: list[float]
    nearness: Nearness | None

    @property
    def loss(self) -> float:
        """Mean over the last quarter of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 4) :])


class Experiment:
    """The model directory and the data that all modes share."""

    def __init__(self, recipe: Recipe, process: Process, batches: int) -> None:
        self.recipe, self.process = recipe, process
        self.directory = model_directory(recipe.model.path, recipe.model.revision, ["transformer"])
        self.spec = read_spec(self.directory, allow_distilled=recipe.model.allow_distilled)
        self.index, _ = read_data(recipe)
        check_shards(self.index, self.spec, self.directory, recipe)
        conditioning = read_conditioning(recipe.data.shards, self.index)
        order = build_order(recipe, self.index)
        self.loader = build_loader(recipe, self.index, order, process, conditioning)
        self.objective = build_objective(recipe, self.spec, conditioning, process.device)
        self.measured = list(self.loader.steps(recipe.steps, recipe.steps + batches))
        """The global batches after the last one of the training, in micro-batches."""

    def build(self, mode: str) -> tuple[torch.nn.Module, Recipe]:
        """A model with its base in `mode` and a new adapter, or that multiplies in `mode`, and the recipe that it
        follows."""
        full = self.recipe.method == "full"
        # Nothing is warmed up here, so shapes come in any order.
        recipe = replace(
            self.recipe,
            base_weights=cast(Any, mode) if mode in BASE_WEIGHTS and not full else None,
            compute="fp8" if mode == "fp8" and full else "precision",
            precision="fp32" if mode == "fp32" else self.recipe.precision,
            cuda_graphs=False,
            cache_transposed_base=False,
        )
        plan, tokens = make_plan(recipe, 1), self.index.largest_tokens
        return build_model(self.directory, self.spec, plan, self.process, tokens)[0], recipe

    def train(self, model: torch.nn.Module, recipe: Recipe, mode: str) -> list[float]:
        """Train as the recipe says; returns the loss of each step."""
        engine = build_engine(model, make_plan(recipe, 1))
        steps = self.loader.steps(0, recipe.steps)
        losses: list[torch.Tensor] = []
        for step, micro_batches in enumerate(tqdm(steps, mode, recipe.steps, unit="step")):
            seed_dropout(recipe.seed, step, 0)
            losses += train_step(engine, self.objective, micro_batches, learning_rate(recipe, step))
        return torch.stack(losses).view(recipe.steps, -1).mean(1).tolist()

    def gradients(self, model: torch.nn.Module) -> Iterator[Tensors]:
        """For each measured batch the gradient of each block, flat, on the host."""
        for micro_batches in self.measured:
            seed_dropout(self.recipe.seed, self.recipe.steps, 0)
            yield self._gradient(model, micro_batches)

    def _gradient(self, model: torch.nn.Module, micro_batches: list[MicroBatch]) -> Tensors:
        named = transformer.trainable(model)
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
        for micro_batch in micro_batches:
            loss = self.objective.loss(transformer.predictor(model), micro_batch)
            found = torch.autograd.grad(loss, list(named.values()))
            for name, gradient in zip(named, found, strict=True):
                total[name] += gradient
        blocks: dict[str, list[torch.Tensor]] = {}
        for name, gradient in total.items():
            blocks.setdefault(".".join(name.split(".")[:2]), []).append(gradient.flatten().cpu())
        return {block: torch.cat(parts) for block, parts in blocks.items()}


def main() -> None:
    """Entry point of `flux2-ds quality`."""
    parser = recipe_parser(
        "flux2-ds quality", "Compare quantized bases, or fp8 products, with plain ones."
    )
    add = parser.add_argument
    add("--modes", type=list[str] | None, default=None, help="Of base_weights or compute; or fp32.")
    add("--image", type=str, default=None, help="Draw the losses' distance from the plain one.")
    add("--batches", type=int, default=4, help="Global batches whose gradients are compared.")
    add("--json", action="store_true", help="Print one JSON object, with the loss of each step.")
    recipe, options = parse_recipe(parser)
    recipe = with_adapter_file(recipe)
    set_up_console()
    usual = ["fp8"] if recipe.method == "full" else [*BASE_WEIGHTS]
    modes, known = usual if options.modes is None else options.modes, [*usual, "fp32"]
    if not modes or not {*modes} <= {*known}:
        raise UserError(
            f"--modes is {modes}; with method {recipe.method} it must name some of {', '.join(known)}."
        )
    suffixes = Figure().canvas.get_supported_filetypes()
    if options.image is not None and Path(options.image).suffix[1:].lower() not in suffixes:
        raise UserError(f"--image is {options.image}; its suffix must be .{', .'.join(suffixes)}.")
    if options.batches < 1:
        raise UserError(f"--batches is {options.batches}; it must be at least 1.")
    if recipe.lora.init != "gaussian":
        raise UserError(
            f"lora.init is {recipe.lora.init}, which goes with a plain base alone. Set lora.init: gaussian."
        )
    with stdout_to_stderr():
        results = compare(in_steps(recipe), modes, options.batches)
    if options.image is not None:
        draw(results, Path(options.image))
    if options.json:
        print(json.dumps([asdict(each) for each in results], indent=2))
    else:
        print("\n".join(table(results)))


def compare(recipe: Recipe, modes: list[str], batches: int) -> list[Trained]:
    """The plain base's result, then that of each mode."""
    process = init_process_group(recipe.launch.accelerator)
    if process.world_size > 1 or make_plan(recipe, 1).zero_stage == 3:
        raise UserError(
            "quality measures one process with a whole model: start it with flux2-ds quality, and set "
            "deepspeed: zero2 or zero0."
        )
    experiment = Experiment(recipe, process, batches)
    results: list[Trained] = []

    def train(model: torch.nn.Module, changed: Recipe, mode: str, near: Nearness | None) -> None:
        results.append(Trained(mode, experiment.train(model, changed, mode), near))
        log.info("%s: loss %.4f at the end", mode, results[-1].loss)

    model, changed = experiment.build(recipe.precision)
    start = copied_weights(model)
    train(model, changed, recipe.precision, None)
    trained, expected = copied_weights(model), list(experiment.gradients(model))
    for mode in modes:
        del model
        free_memory()
        model, changed = experiment.build(mode)
        set_weights(model, trained)
        near = compared(list(experiment.gradients(model)), expected)
        log.info("%s: gradients' cosine %.4f, error %.3f (medians)", mode, near.cosine_median,
                 near.error_median)  # fmt: skip
        set_weights(model, start)
        train(model, changed, mode, near)
    destroy_process_group()
    return results


def compared(found: list[Tensors], expected: list[Tensors]) -> Nearness:
    """All blocks of all batches."""
    cosines, errors = [], []
    for ours, plain in zip(found, expected, strict=True):
        for block, gradient in plain.items():
            one, other = ours[block].double(), gradient.double()
            cosines.append((float(torch.nn.functional.cosine_similarity(one, other, dim=0)), block))
            errors.append(float((one - other).norm() / other.norm()))
    worst, worst_block = min(cosines)
    median = statistics.median
    blocks = {name: median(c for c, block in cosines if block == name) for name in expected[0]}
    return Nearness(
        median(c for c, _ in cosines), worst, median(errors), max(errors), worst_block, blocks
    )


def copied_weights(model: torch.nn.Module) -> Tensors:
    """The trained weights, on the host."""
    return {name: p.detach().cpu().clone() for name, p in transformer.trainable(model).items()}


@torch.no_grad()
def set_weights(model: torch.nn.Module, weights: Tensors) -> None:
    """Set the trained weights."""
    for name, parameter in transformer.trainable(model).items():
        parameter.copy_(weights[name])


def free_memory() -> None:
    """Give back what a model before this one held."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(results: list[Trained]) -> list[str]:
    """The results as a Markdown table."""
    plain, *others = results
    lines = [
        "| mode | gradient's cosine, median | worst | relative error, median | worst | worst block "
        "| loss | against plain |",
        "|---|---|---|---|---|---|---|---|",
        f"| plain {plain.mode} | | | | | | {plain.loss:.4f} | |",
    ]
    for each in others:
        assert each.nearness is not None
        near, drift = each.nearness, each.loss / plain.loss - 1
        lines.append(
            f"| {each.mode} | {near.cosine_median:.4f} | {near.cosine_worst:.4f} "
            f"| {near.error_median:.3f} | {near.error_worst:.3f} | {near.worst_block} "
            f"| {each.loss:.4f} | {drift:+.2%}{' drifts' if drift > DRIFT else ''} |"
        )
    return lines


def draw(results: list[Trained], path: Path) -> None:
    """How far each mode's loss lies above the plain one's, as running means over a tenth of the steps."""
    plain, *others = results
    window = max(1, len(plain.losses) // 10)
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    for each in others:
        above = np.subtract(each.losses, plain.losses)
        means = np.convolve(above, np.full(window, 1 / window), mode="valid")
        axes.plot(np.arange(window, len(above) + 1), means, label=each.mode)
    axes.set(xlabel="optimizer step", ylabel=f"loss above plain {plain.mode}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    run_root(main)
