"""The prepared shards of a recipe, and whether they fit it and its model. No torch: the launcher asks, too."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from flux2_ds.config.adapter import adapted_linears
from flux2_ds.config.adapter_file import settings_of_file
from flux2_ds.config.model_spec import RELEASED, Spec
from flux2_ds.config.recipe import Captions, Recipe, is_url
from flux2_ds.data.index import PROMPTS_NAME, Index, encoded_prompts, read_index
from flux2_ds.data.order import Order
from flux2_ds.data.storage import join
from flux2_ds.errors import UserError, counted
from flux2_ds.run.run_dir import check_run_dir
from flux2_ds.run.wandb_run import check_trackers

log = logging.getLogger("flux2_ds")

CAPTIONS = "captions"
"""In an index's settings: those of this section of the recipe that are not the default, if there are any."""


def read_data(recipe: Recipe) -> tuple[Index, Index]:
    """The index of what is trained on and of what is held out, `data.more_shards` included."""
    data = recipe.data
    index = read_index(data.shards)
    shards = list(index.shards)
    for name, folder in data.more_shards.items():
        other = read_index(folder, f"data.more_shards.{name}")
        for what in ("variant", "text_width", "fingerprint"):
            if getattr(other, what) != getattr(index, what):
                raise UserError(
                    f"data.more_shards.{name} {folder} was made by another model than data.shards "
                    f"{data.shards}: {what} is {getattr(other, what)}, not {getattr(index, what)}."
                )
        if index.text_dtype != other.text_dtype:
            raise UserError(
                f"data.more_shards.{name} {folder} has captions in {other.text_dtype}, data.shards "
                f"{data.shards} in {index.text_dtype}. Prepare both with the same prepare.text_weights."
            )
        if name in {shard.source for shard in shards}:
            raise UserError(f"data.more_shards.{name} has the name of a source of data.shards.")
        # Absolute, because the shards' names are looked up in data.shards.
        place = folder if is_url(folder) else str(Path(folder).absolute())
        shards += [replace(s, name=join(place, s.name), source=name) for s in other.shards]
    index = replace(index, shards=shards)
    training, held_out = index.part(held_out=False), index.part(held_out=True)
    check_sources(recipe, training)
    if not training.samples:
        raise UserError(
            f"all samples of data.shards {data.shards} are held out. Lower data.validation_fraction."
        )
    return training, held_out


def check_sources(recipe: Recipe, training: Index) -> None:
    """Refuse settings of sources that have no images to train on."""
    sources = {shard.source for shard in training.shards}
    kept = recipe.preservation.sources
    for setting, names in (
        ("data.weights", recipe.data.weights),
        ("objective.source_shift", recipe.objective.source_shift),
        ("preservation.sources", kept),
    ):
        for name in names:
            if name not in sources:
                raise UserError(
                    f"{setting}.{name}: there is no such source with images to train on; there are "
                    f"{', '.join(sorted(sources))}. Correct the name, or add the source to data.images and prepare."
                )
    served = {name for name in sources if recipe.data.weights.get(name, 1)}
    if not served:
        raise UserError(
            f"data.weights is 0 for {', '.join(sorted(sources))}, which are all sources: nothing is left to train on."
        )
    if served <= set(kept):
        raise UserError(
            f"preservation.sources is {', '.join(kept)}, which are all sources that are served: nothing is left to learn. "
            "Add the images of what is to be learned to data.images under another name."
        )


def build_order(recipe: Recipe, index: Index) -> Order:
    """The order of the samples."""
    data = recipe.data
    return Order(index, recipe.batch.global_size, recipe.seed, data.shuffle_window, data.weights)


def in_steps(recipe: Recipe) -> Recipe:
    """`recipe` with what it gives in epochs counted in steps of its prepared data."""
    validation, preview = recipe.validation, recipe.preview
    if (recipe.epochs, validation.every_epochs, preview.every_epochs) == (None, None, None):
        return recipe
    order = build_order(recipe, read_data(recipe)[0])

    def period(section: Any) -> Any:
        if section.every_epochs is None:
            return section
        every = max(1, round(section.every_epochs * order.steps_per_epoch))
        return replace(section, every=every, every_epochs=None)

    return replace(
        recipe,
        steps=recipe.steps if recipe.epochs is None else order.length(recipe.epochs),
        epochs=None,
        validation=period(validation),
        preview=period(preview),
    )


def length_line(recipe: Recipe, order: Order) -> str:
    """The length of an epoch and of the run, for people; `recipe` counts in steps."""
    epochs = recipe.steps / order.steps_per_epoch
    return (
        f"{counted(round(order.steps_per_epoch, 2), 'step')} an epoch, {epochs:.4g} epochs in all"
    )


def data_warnings(recipe: Recipe, order: Order, held_out: Index) -> list[str]:
    """What a user should know of the prepared data, for people."""
    fraction, found = recipe.data.validation_fraction, order.warnings()
    if fraction and not held_out.samples:
        found.append(
            f"data.validation_fraction is {fraction:g}, but no image is held out: there is no validation loss, and "
            "validation.patience and checkpoint.keep_best do nothing. For one, prepare with a larger fraction into a "
            "new data.shards"
        )
    return found


def validation_line(recipe: Recipe, held_out: Index) -> str:
    """What is held out and when its loss is computed, for people."""
    validation = recipe.validation
    used = min(validation.samples, held_out.samples)
    line = f"{counted(held_out.samples, 'sample')}, the loss of {used} every {counted(validation.every, 'step')}"
    return line + ", once without the adapter" * validation.against_base


def check_run(
    recipe: Recipe, data: tuple[Index, Index] | None, spec: Spec | None, directory: Path | None
) -> None:
    """Refuse what a training cannot start with. All that start one ask this, before processes start or in each.

    `data`, `spec` and `directory`, the model's, are None while they are not known: nothing is prepared, or the
    model is yet to be fetched.
    """
    for check in run_checks(recipe, data, spec, directory).values():
        check()


def run_checks(
    recipe: Recipe, data: tuple[Index, Index] | None, spec: Spec | None, directory: Path | None
) -> dict[str, Callable[[], object]]:
    """The checks of `check_run` by what they look at, for those that report each."""
    checks: dict[str, Callable[[], object]] = {
        "run_dir": partial(check_run_dir, recipe),
        "trackers": partial(check_trackers, recipe.log),
        "previews": partial(check_previews, recipe, directory, prepared=data is not None),
    }
    known = spec or RELEASED.get(recipe.model.path)
    if known is not None and recipe.method != "full":
        checks["adapter"] = partial(adapted_linears, known, recipe.lora)
    checks |= {
        f"merge_first {path}": partial(settings_of_file, "lora.merge_first", path, known)
        for path in recipe.lora.merge_first
    }
    if data is not None:
        checks["shards"] = partial(check_shards, data[0], spec, directory, recipe)
    return checks


def check_shards(index: Index, spec: Spec | None, directory: Path | None, recipe: Recipe) -> None:
    """Refuse shards that another model than that in `directory` made, or that do not fit the recipe. All
    that look at shards ask this. `spec` and `directory` are None while they are not known, because the
    model is yet to be fetched."""
    if spec is not None:
        check_variant(recipe, index, spec)
    check_settings(recipe, index)
    check_masks_and_references(recipe, index)
    if directory is None:
        return
    from flux2_ds.config.model_files import (
        check_fingerprint,  # here: the launcher need not wait for it
    )

    unchecked = check_fingerprint(index.fingerprint, directory, recipe.data.shards)
    if unchecked:
        log.info("not on this machine, so not compared with the shards: %s", ", ".join(unchecked))


def check_previews(recipe: Recipe, directory: Path | None, *, prepared: bool) -> None:
    """Refuse previews while training of what is not there: references, the model's parts, encoded prompts; and
    prompts to preserve that are not encoded."""
    previews = recipe.preview.every is not None
    wanted = {"preview.every": recipe.preview.prompts if previews else []}
    wanted["preservation.prompts"] = recipe.preservation.prompts
    known = set(encoded_prompts(recipe.data.shards)) if prepared and any(wanted.values()) else None
    for setting, prompts in wanted.items():
        for prompt in prompts:
            if known is not None and prompt not in known:
                raise UserError(
                    f"{setting} is set, and {join(recipe.data.shards, PROMPTS_NAME)} has no prompt "
                    f"{prompt!r}. Run `flux2-ds prepare` with this recipe, which adds it, or remove {setting}."
                )
    if not previews:
        return
    for path in recipe.preview.references:
        if not Path(path).is_file():
            raise UserError(f"preview.references: {path} does not exist.")
    for part in ("vae", "scheduler"):
        if directory is not None and not (directory / part).is_dir():
            raise UserError(
                f"preview.every is set, and model.path {directory} has no {part}. Add it, or remove "
                "preview.every."
            )


def given_captions(recipe: Recipe) -> dict[str, Any]:
    """The settings of `captions` that are not the default."""
    default = asdict(Captions())
    return {name: v for name, v in asdict(recipe.captions).items() if v != default[name]}


def check_settings(recipe: Recipe, index: Index) -> None:
    """Refuse shards that were prepared with other settings."""
    captions, given = index.settings.get(CAPTIONS, {}), given_captions(recipe)
    for name in sorted({*captions, *given}):
        wanted, prepared = (each.get(name, getattr(Captions, name)) for each in (given, captions))
        if wanted != prepared:
            raise UserError(
                f"captions.{name} is {wanted!r}, but data.shards {recipe.data.shards} were prepared with "
                f"{prepared!r}. Run `flux2-ds prepare` again, which encodes what differs, or set it back."
            )
    for name, prepared in index.settings.items():
        if name == CAPTIONS:
            continue
        wanted = getattr(recipe.data, name)
        if wanted != prepared:
            raise UserError(
                f"data.{name} is {wanted}, but data.shards {recipe.data.shards} were prepared with "
                f"{prepared}. Prepare shards in another folder, or set it back."
            )


def check_masks_and_references(recipe: Recipe, index: Index) -> None:
    """Refuse masks and references that are wanted and not there."""
    shards = recipe.data.shards
    if recipe.objective.masked_loss and not any(shard.masks for shard in index.shards):
        raise UserError(
            f"objective.masked_loss is true, but no image in data.shards {shards} has a mask. Add "
            "NAME.mask.png beside NAME.png and prepare again, or set it to false."
        )
    if recipe.objective.reference_dropout and not any(s.bucket.references for s in index.shards):
        raise UserError(
            f"objective.reference_dropout is {recipe.objective.reference_dropout:g}, but no image in data.shards {shards} has a "
            "reference image. Add NAME.reference.png beside NAME.png and prepare again, or set it to 0."
        )


def mask_and_reference_lines(recipe: Recipe, index: Index) -> list[str]:
    """Which masks and reference images there are, and whether they are used, for people."""
    lines = []
    masks = sum(shard.masks for shard in index.shards)
    if masks:
        used = (
            "used" if recipe.objective.masked_loss else "not used: objective.masked_loss is false"
        )
        lines.append(f"{counted(masks, 'mask')}, {used}")
    counts = {bucket: n for bucket, n in index.bucket_counts().items() if bucket.references}
    if counts:
        most = max(counts, key=lambda bucket: bucket.all_tokens)
        lines.append(
            f"{sum(counts.values())} of {counted(index.samples, 'sample')} with reference images, in {counted(len(counts), 'bucket')}; the longest "
            f"is {most}: {most.all_tokens} tokens, {most.tokens} of them the image's"
        )
    return lines


def check_variant(recipe: Recipe, index: Index, spec: Spec) -> None:
    """Refuse shards that were prepared for another kind of model."""
    if (index.variant, index.text_width) != (spec.variant, spec.text_width):
        raise UserError(
            f"data.shards {recipe.data.shards} were prepared for FLUX.2-{index.variant} with text "
            f"width {index.text_width}; model.path {recipe.model.path} is FLUX.2-{spec.variant} with "
            f"{spec.text_width}. Prepare the shards with this model."
        )
