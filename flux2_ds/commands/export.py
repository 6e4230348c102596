"""Export: a checkpoint to files that other programs load.

    flux2-ds export --config RECIPE [--step N] [--dtype bf16] [--weights ema] [--layout diffusers|bfl|kohya]
                    [--title "My cat"] [--trigger "ohwx cat"] [--push ME/MY-CAT]

An adapter becomes one safetensors file for diffusers and one for ComfyUI; docs/adapters.md says which
other programs read which. A full fine-tune becomes a `transformer` directory for
`Flux2Transformer2DModel.from_pretrained`. Each file is read back as those programs read it and
compared with what was trained. The base's weights are read for a DoRA only, a few rows at a time. A
README.md beside the files is their model card.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.checkpoint.tensor_store import TensorStore
from flux2_ds.commands.model_card import (
    PREVIEWS,
    Export,
    Origin,
    check_hub,
    file_metadata,
    push,
    write_card,
)
from flux2_ds.config.adapter import ADAPTER_KINDS, adapted_linears, of_rank
from flux2_ds.config.adapter_file import bfl_place, find_factors, parts_of
from flux2_ds.config.model_files import DIGESTS, file_digests, model_directory
from flux2_ds.config.model_spec import Spec, read_spec
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.recipe import Recipe
from flux2_ds.errors import UserError, run_root
from flux2_ds.model.adapter_layouts import (
    Adapter,
    Layout,
    Update,
    bfl_tensors,
    change_of,
    difference,
    diffusers_tensors,
    kohya_tensors,
    lycoris_tensors,
    multiplied,
    of_lower_rank,
)
from flux2_ds.model.adapter_programs import (
    CHECKED,
    largest_error,
    read_file,
    read_merges,
    read_with,
)
from flux2_ds.model.lora import ADAPTER, exported_magnitude, exported_settings, lora_config
from flux2_ds.model.merge import BaseWeights, dora_scale
from flux2_ds.model.merge_files import write_bfl_transformer
from flux2_ds.model.safetensors_file import write_adapter, write_safetensors
from flux2_ds.model.transformer import compute_dtype
from flux2_ds.run.atomic import PARTIAL, atomic_path
from flux2_ds.run.logging import set_up_console
from flux2_ds.run.run_dir import (
    INITIAL_ADAPTER,
    Weights,
    as_trained,
    checkpoints_directory,
    export_path,
    is_training,
)
from flux2_ds.run.wandb_run import log_export

log = logging.getLogger("flux2_ds")

Precision = Literal["bf16", "fp16", "fp32", "fp8"]
FILE_SIZE = "10GB"
"""Of an exported transformer; one such file is in memory at a time."""
READERS: dict[Layout, str] = {
    "diffusers": "diffusers", "bfl": "comfyui", "kohya": "musubi", "lycoris": "lycoris",
}  # fmt: skip
"""Layout -> the program, or the layout that several have, that its file is named after."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.02}
"""Largest relative error of an update after a file was read back, by the file's precision."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to write of a checkpoint."""

    dtype: torch.dtype
    weights: Weights = "trained"
    layout: Layout | None = None
    merge: bool = False
    keep_merge_first: bool = False
    rank: int | None = None
    title: str | None = None
    trigger: str | None = None
    repository: str | None = None


def main() -> None:
    """Entry point of `flux2-ds export`."""
    set_up_console()
    parser = recipe_parser(
        "flux2-ds export", "Write a checkpoint in the form that diffusers and ComfyUI load."
    )
    parser.add_argument("--step", type=int | None, default=None,
                        help="Checkpoint to export. Default: the newest.")  # fmt: skip
    parser.add_argument("--dtype", type=Precision | None, default=None,
                        help="Precision of the file. Default: the recipe's; for a DoRA, PiSSA and OLoRA fp32.")  # fmt: skip
    parser.add_argument("--weights", type=Weights, default="trained",
                        help="The trained weights, or their moving average.")  # fmt: skip
    parser.add_argument("--layout", type=Layout | None, default=None,
                        help="Names of an adapter's tensors. Default: a file for diffusers and one (bfl) for "
                             "ComfyUI; of a LoKr or LoHa one (lycoris); kohya is musubi-tuner's.")  # fmt: skip
    parser.add_argument("--merge", type=bool, default=False,
                        help="Write the whole transformer with the adapter in it instead of the adapter: a "
                             "directory (--layout diffusers) or one file for ComfyUI (--layout bfl).")  # fmt: skip
    parser.add_argument("--keep_merge_first", type=bool, default=False,
                        help="With --merge: leave the adapters of lora.merge_first in the weights, too.")  # fmt: skip
    parser.add_argument("--rank", type=int | None, default=None,
                        help="Reduce a LoRA to this rank by SVD; says what is lost. Default: as trained.")  # fmt: skip
    parser.add_argument("--title", type=str | None, default=None,
                        help="What user interfaces and the model card call it. Default: run_dir's name.")  # fmt: skip
    parser.add_argument("--trigger", type=str | None, default=None,
                        help="Words that a prompt should have, for user interfaces and the model card. Default: captions.trigger_word.")  # fmt: skip
    parser.add_argument("--push", type=str | None, default=None,
                        help="Upload the export to this repository of the Hugging Face hub, private if new.")  # fmt: skip
    recipe, options = parse_recipe(parser)
    if options.push is not None:
        check_hub(options.push)
    wait_until_written(recipe)
    chosen = choose(checkpoints_directory(recipe), options.step)
    # The run's may have changed since.
    recipe = as_trained(recipe, chosen.state()["recipe"], chosen.path)
    request = Request(
        dtype=file_dtype(
            recipe, options.dtype, merge=options.merge, reduced=options.rank is not None
        ),
        weights=options.weights,
        layout=options.layout,
        merge=options.merge,
        keep_merge_first=options.keep_merge_first,
        rank=options.rank,
        title=options.title,
        trigger=options.trigger,
        repository=options.push,
    )
    log.info("exporting  %s", chosen.path)
    exports, card = export(recipe, chosen, request)
    for written in exports:
        checked = ""
        if written.error is not None:
            checked = (
                f"; read back as they do, the largest error of an update is {written.error:.0e}"
            )
        log.info("exported %s to %s, for %s%s",
                 chosen.path.name, written.path, ", ".join(written.programs), checked)  # fmt: skip
    paths = [written.path for written in exports]
    log_export(recipe.log, Path(recipe.run_dir), paths, chosen.step)
    if options.push is not None:
        paths += card
        message = f"step {chosen.step} of {Path(recipe.run_dir).resolve().name}"
        log.info("pushed to %s", push(options.push, card[0].parent, paths, message))


def file_dtype(
    recipe: Recipe, asked: Precision | None, *, merge: bool = False, reduced: bool = False
) -> torch.dtype:
    """Of the file: the one asked for, or the recipe's; fp32 of a DoRA, because what its magnitudes learn is often
    less than bf16 tells apart, and of what began as a part of the base, whose change is a difference of large factors.
    """
    if asked == "fp8":
        return torch.float8_e4m3fn
    fine = recipe.method == "dora" or (recipe.lora.init != "gaussian" and not reduced)
    return compute_dtype(asked or ("fp32" if fine and not merge else recipe.precision))


def wait_until_written(recipe: Recipe) -> None:
    """Wait for the checkpoint that a training is writing in run_dir, if one is."""
    root, waited = checkpoints_directory(recipe), False
    while (unfinished := list(root.glob(".step_*.partial"))) and is_training(recipe):
        if not waited:
            log.info("waiting for %s, which is still being written", unfinished[0].stem[1:])
        waited = True
        time.sleep(0.2)


def choose(root: Path, step: int | None) -> checkpoint.Checkpoint:
    """The checkpoint of `step`, or the newest intact one. Refuses a damaged one."""
    if step is None:
        found, damaged = checkpoint.newest(root)
        for path, reason in damaged.items():
            log.warning("%s is damaged (%s); exporting the one before", path, reason)
        if found is None:
            raise UserError(f"{root} holds no checkpoint. Train first, or correct run_dir.")
        return found
    found = checkpoint.Checkpoint(checkpoint.checkpoint_path(root, step), step)
    if not found.path.is_dir():
        there = ", ".join(str(one.step) for one in checkpoint.find(root)) or "none"
        raise UserError(f"{root} holds no checkpoint of step {step}. There are: {there}.")
    damage = checkpoint.verify(found)
    if damage:
        raise UserError(f"checkpoint {found.path} cannot be exported: {damage}.")
    return found


def export(
    recipe: Recipe, chosen: checkpoint.Checkpoint, request: Request
) -> tuple[list[Export], list[Path]]:
    """Write the export of one checkpoint, and its model card beside it; returns both."""
    for problem in _problems(recipe, chosen, request):
        raise UserError(problem)
    full, layout = recipe.method == "full", request.layout
    layouts: tuple[Layout, ...] = ("diffusers", "bfl") if layout is None else (layout,)
    if layout is None and recipe.method in ("lokr", "loha"):
        layouts = ("lycoris",)
    dora = recipe.method == "dora" and "bfl" in layouts
    parts = ["transformer"] if request.merge or dora else []
    directory = model_directory(recipe.model.path, recipe.model.revision, parts)
    origin = Origin(
        chosen,
        request.weights,
        read_spec(directory, allow_distilled=recipe.model.allow_distilled),
        directory,
        request.title or Path(recipe.run_dir).resolve().name,
        request.trigger,
        request.repository,
        replace(
            recipe.lora, decompose_both=False
        ),  # W1 is written as a full matrix, which it is in every program
    )
    store = chosen.store("weights" if request.weights == "trained" else "ema")
    path = export_path(recipe, chosen.step, request.weights)
    folder = path.parent
    if request.merge:
        average = "-ema" if request.weights == "ema" else ""
        folder /= f"step_{chosen.step:08d}{average}-merged"
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {} if full else stored_adapter(store, recipe, origin.spec)
    if not full and recipe.lora.init != "gaussian":
        initial = Path(recipe.run_dir) / INITIAL_ADAPTER
        began = read_file("lora.init", str(initial), origin.spec)
        adapter = {name: difference(update, began[name]) for name, update in adapter.items()}
        origin = replace(origin, lora=of_rank(origin.lora, lambda trained: 2 * trained))
    if (rank := request.rank) is not None:
        adapter, origin = _reduced(adapter, rank, origin)
    base = None
    if parts:
        kept = not request.merge or request.keep_merge_first
        merged = read_merges(recipe.lora, origin.spec) if kept else []
        base = BaseWeights(directory / "transformer", merged)
    exports = []
    if full or request.merge:
        shapes = store.shapes if base is None else base.shapes()
        weight = store.tensor if base is None else partial(base.merged, adapter=adapter)
        exports.append(_export_weights(folder, shapes, weight, request, origin))
    else:
        for each in layouts:
            reader = (
                READERS[each] if request.rank is None else f"rank{request.rank}-{READERS[each]}"
            )
            path = export_path(recipe, chosen.step, request.weights, reader)
            exports.append(export_adapter(adapter, path, each, request.dtype, origin, recipe, base))
    return exports, write_card(folder, origin, exports, Path(recipe.run_dir) / PREVIEWS)


def _problems(recipe: Recipe, chosen: checkpoint.Checkpoint, request: Request) -> Iterator[str]:
    """What the checkpoint has not, or no program could load."""
    full, dora, layout = recipe.method == "full", recipe.method == "dora", request.layout
    if request.weights == "ema" and "ema" not in chosen.kinds():
        yield (
            f"{chosen.path} holds no moving average: it was trained without optimizer.ema_decay. Export "
            "--weights trained, or set optimizer.ema_decay and train in a new run_dir."
        )
    whole = full or request.merge
    if full and request.merge:
        yield "--merge is for adapters; method is full. Remove it."
    stacked = bool(recipe.lora.merge_first)
    if request.keep_merge_first and not (request.merge and stacked):
        yield (
            "--keep_merge_first is for --merge of an adapter that was trained with lora.merge_first. Remove it."
        )
    if request.merge and dora and stacked and not request.keep_merge_first:
        yield (
            "--merge: a DoRA's magnitudes are those of the base with lora.merge_first in it. Add --keep_merge_first true."
        )
    if request.rank is not None and (request.rank < 1 or recipe.method != "lora"):
        yield (
            f"--rank is {request.rank}, and method {recipe.method}; it must be at least 1, and is for a LoRA: a DoRA's "
            "magnitudes are those of its whole update, and a LoKr or LoHa is small for its rank. Remove it."
        )
    if whole and layout in ("kohya", "lycoris"):
        yield f"--layout {layout} is for adapters alone. Export --layout bfl, or diffusers."
    if dora and layout == "kohya":
        yield (
            "--layout kohya: the programs that read these names drop the magnitudes of a DoRA, and half "
            "of the update is wrong without them. Export --layout bfl for ComfyUI, or --merge --layout bfl."
        )
    if layout and not whole and (layout, recipe.method) not in CHECKED:
        fitting = " or ".join(each for each, method in CHECKED if method == recipe.method)
        yield (
            f"--layout {layout}: no program loads a {ADAPTER_KINDS[recipe.method]} by these names. Export --layout {fitting}, "
            "or --merge true."
        )
    if request.dtype == torch.float8_e4m3fn and not (whole and layout == "bfl"):
        yield (
            "--dtype fp8 is for all weights in one file: add --layout bfl, and --merge to an adapter."
        )


def _export_weights(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    weight: Callable[[str], torch.Tensor],
    request: Request,
    origin: Origin,
) -> Export:
    """Write all weights in the layout that was asked for, by default diffusers'."""
    if request.layout != "bfl":
        path = folder / "transformer"
        config = origin.directory / "transformer" / "config.json"
        export_transformer(shapes, weight, path, request.dtype, config)
        return Export(path, ("diffusers",))
    run = Path(origin.settings["run_dir"]).resolve().name
    dtype = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.float16: "fp16"}
    kind = dtype.get(request.dtype, "fp32")
    path = folder / f"{run}-step_{origin.checkpoint.step:08d}-comfyui-{kind}.safetensors"
    metadata = file_metadata(origin, path.stem, None, black_forest=True)
    with atomic_path(path) as unfinished:
        write_bfl_transformer(unfinished, shapes, weight, request.dtype, metadata)
    return Export(path, ("ComfyUI",))


def _reduced(adapter: Adapter, rank: int, origin: Origin) -> tuple[Adapter, Origin]:
    """The adapter with at most this rank, and what it says of itself."""
    found = {name: of_lower_rank(update, rank) for name, update in adapter.items()}
    lost = [error for _, error in found.values()]
    worst = max(found, key=lambda name: found[name][1])
    log.info("rank %d: of a linear's update %.1e of its size is lost in the median, at most %.1e (%s)",
             rank, statistics.median(lost), max(lost), worst)  # fmt: skip
    lora = of_rank(origin.lora, lambda trained: min(trained, rank))
    return {name: update for name, (update, _) in found.items()}, replace(origin, lora=lora)


def stored_adapter(store: TensorStore, recipe: Recipe, spec: Spec) -> Adapter:
    """The trained adapter, its scale multiplied into A, or into the first factor."""
    linears, adapter = adapted_linears(spec, recipe.lora), {}
    if recipe.method in ("lokr", "loha"):
        keys = {name.removesuffix(f".{ADAPTER}"): name for name in store.shapes}
        for factors in find_factors(keys, spec, ("{name}",)):
            tensors = {n: store.tensor(keys[n]) for names in factors.matrices for n in names}
            scale = linears[factors.name].scale
            adapter[factors.name] = multiplied(change_of(factors, tensors), scale)
        return adapter
    for name in store.shapes:
        linear, found, _ = name.partition(f".lora_A.{ADAPTER}.weight")
        if found:
            magnitude = f"{linear}.lora_magnitude_vector.{ADAPTER}.weight"
            lora_a = store.tensor(name) * linears[linear].scale
            lora_b = store.tensor(f"{linear}.lora_B.{ADAPTER}.weight")
            dora = magnitude in store.shapes
            adapter[linear] = Update(
                lora_a,
                lora_b,
                exported_magnitude(store.tensor(magnitude), lora_a, lora_b) if dora else None,
            )
    return adapter


def export_adapter(
    adapter: Adapter,
    path: Path,
    layout: Layout,
    dtype: torch.dtype,
    origin: Origin,
    recipe: Recipe,
    base: BaseWeights | None,
) -> Export:
    """Write one file, and keep it only if the programs that it is for load what was trained.

    `base`: for a DoRA in `bfl`.
    """
    if layout == "diffusers":
        tensors = diffusers_tensors(adapter)
    elif layout == "lycoris":
        tensors = lycoris_tensors(adapter)
    elif layout == "kohya":
        tensors = kohya_tensors(adapter)
    elif base is None:
        tensors = bfl_tensors(adapter)
    else:
        names = [part for name in adapter for part in parts_of(bfl_place(name).module)]
        scales = {name: dora_scale(base, name, adapter.get(name)) for name in dict.fromkeys(names)}
        tensors = bfl_tensors(adapter, scales)
    # A rank is not rounded: bf16 has no 261.
    tensors = {n: t if n.endswith(".alpha") else t.to(dtype) for n, t in tensors.items()}
    diffusers_names = layout in ("diffusers", "lycoris")
    metadata = file_metadata(origin, path.stem, tensors, black_forest=not diffusers_names)
    if diffusers_names and recipe.method != "loha":
        config = lora_config(origin.spec, exported_settings(origin.lora), recipe.method)
        metadata["lora_adapter_metadata"] = _adapter_metadata(config.to_dict())
    programs = CHECKED[layout, recipe.method]
    metadata["flux2_ds.checked_for"] = ", ".join(programs)
    with atomic_path(path) as unfinished:
        write_adapter(unfinished, tensors, metadata)
        errors = {
            title: largest_error(read_with(title, unfinished, origin.spec), adapter, base)
            for title in programs
        }
        for title, error in errors.items():
            if error > TOLERANCE[dtype]:
                raise UserError(
                    f"{path} was not kept: as {title} reads it, an update differs from what was trained by "
                    f"{error:.1e} of its size. Export --dtype fp32, or report it with the recipe."
                )
    return Export(path, programs, max(errors.values()))


def _adapter_metadata(config: dict[str, Any]) -> str:
    """PEFT's configuration as diffusers keeps it in a file."""
    values = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    return json.dumps({f"transformer.{k}": v for k, v in values.items()}, indent=2, sort_keys=True)


def export_transformer(
    shapes: dict[str, tuple[int, ...]],
    weight: Callable[[str], torch.Tensor],
    path: Path,
    dtype: torch.dtype,
    config: Path,
) -> None:
    """Write all weights in diffusers' layout, one in memory at a time: a directory that appears complete, with
    the model's config and the files' XXH3."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    split = split_torch_state_dict_into_shards(
        {n: torch.empty(s, dtype=dtype, device="meta") for n, s in shapes.items()},
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=FILE_SIZE,
    )
    for file, names in split.filename_to_tensors.items():
        kinds = {name: (dtype, tuple(shapes[name])) for name in names}
        write_safetensors(partial / file, kinds, lambda n: weight(n).to(dtype), {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        name = "diffusion_pytorch_model.safetensors.index.json"
        (partial / name).write_text(json.dumps(index, indent=2) + "\n")
    shutil.copy(config, partial)
    digests = {name: {"xxh3": facts["xxh3"]} for name, facts in file_digests(partial).items()}
    (partial / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


if __name__ == "__main__":
    run_root(main)
