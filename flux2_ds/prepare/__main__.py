"""Prepare: photographs and captions in, WebDataset shards of latents and text embeddings out.

    flux2-ds prepare --config recipes/h100x1.yaml

First the captions are encoded, each distinct one once, then the text encoder is freed and the VAE
encodes the pictures, so that both are never in memory together. Starting again goes on after a stop,
and adds what is new since: finished shards are never rewritten.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flux2_ds.config.model_files import fingerprint, model_directory
from flux2_ds.config.model_spec import PIXELS_PER_TOKEN, Spec, read_spec
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.config.recipe import Recipe, is_url
from flux2_ds.config.validate import check_recipe
from flux2_ds.data.index import CONDITIONING_NAME, Index, write_index
from flux2_ds.data.shards import tensors_in, whole_part
from flux2_ds.errors import UserError, run_root
from flux2_ds.prepare import manifest
from flux2_ds.prepare.choose import bucket_lines, choose_buckets, with_captions
from flux2_ds.prepare.encode import Encoding, encode, text_bytes, text_precision
from flux2_ds.prepare.manifest import Job
from flux2_ds.prepare.report import Report, write_report
from flux2_ds.prepare.source_images import Picture
from flux2_ds.prepare.sources import find_entries
from flux2_ds.prepare.team import Team
from flux2_ds.prepare.texts import TEXTS
from flux2_ds.run.atomic import atomic_write_text
from flux2_ds.run.logging import set_up_console
from flux2_ds.run.run_dir import hold

log = logging.getLogger("flux2_ds")

CONTENT_NAME = "content.json"
SETTINGS = ("resolution", "bucket_step", "max_aspect", "max_upscale", "validation_fraction")
"""The data settings that decide which pictures are trained on, which part of them, and how large."""


def main() -> None:
    """Entry point of `flux2-ds prepare`."""
    set_up_console()
    recipe, _ = parse_recipe(
        recipe_parser("flux2-ds prepare", "Encode photographs and captions into shards.")
    )
    check_recipe(recipe)
    check_target(recipe.data.shards)
    torch.backends.cudnn.allow_tf32 = False  # fp32 encoding means fp32 on a GPU too
    directory = model_directory(
        recipe.model.path, recipe.model.revision, ["vae", "text_encoder", "tokenizer", "scheduler"]
    )
    spec, team = read_spec(directory, allow_distilled=True), Team.of_environment()
    if team.node == 0:
        prepare(recipe, directory, spec, team)
    else:
        assist(recipe, directory, spec, team)


def assist(recipe: Recipe, directory: Path, spec: Spec, team: Team) -> None:
    """What all machines but the first do: encode, until the first is done.

    Raises:
        UserError: this machine has other settings or another model than the first.
    """
    encoding = Encoding(recipe, directory, spec)
    content = content_of(recipe, fingerprint(directory))
    for kind, work in team.phases(encoding.folder):
        check_folder(encoding.folder, content)
        work(encoding.worker(kind), encoding.devices(kind))


def prepare(recipe: Recipe, directory: Path, spec: Spec, team: Team | None = None) -> Index:
    """Write shards, index.json and report; returns the index. Other machines of the team assist.

    Raises:
        UserError: no usable pictures, a folder of something else, or a full disk.
    """
    data, folder = recipe.data, Path(recipe.data.shards)
    team = team or Team()
    report = Report()
    prints = fingerprint(directory)
    content = content_of(recipe, prints)
    if not untouched(folder):
        check_folder(folder, content)
    scratch = folder / manifest.FOLDER / "tars"
    source_images = find_entries(data.images, data.caption_column, scratch, made_here(recipe))
    source_images = with_captions(source_images, data, report.skipped)
    with claimed(folder, content), full_disk_explained(folder), team.gathered(folder):
        notes = manifest.read_notes(folder)
        seen = manifest.compare(source_images, notes)
        if not seen.kept and manifest.of_others(source_images, notes):
            raise UserError(
                f"data.shards {folder} was prepared from other pictures: none of data.images "
                f"{data.images} is among them. Give a new folder."
            )
        report.skipped.reasons |= seen.skipped
        pictures = choose_buckets(seen.fresh, data, report.skipped)
        if not pictures and not seen.kept:
            raise nothing_usable(data.images)
        jobs = manifest.plan_shards(
            pictures, notes, data.samples_per_shard, data.validation_fraction
        )
        say_plan(pictures, seen)
        check_disk(folder, jobs, spec, recipe)
        report.dropped = sum(len(rows) for rows in seen.dropped.values())
        report.kept = len(seen.kept)

        started = time.monotonic()
        written = encode(Encoding(recipe, directory, spec), team, jobs, notes, report)
        report.seconds = time.monotonic() - started
        report.encoded = sum(len(note.rows) for note in written)
        for note in written:
            for key, (_, reason) in note.skipped.items():
                report.skipped.add(f"{note.shard.source}/{key}", reason)

        settings = {name: getattr(data, name) for name in SETTINGS}
        finished = sorted([*notes, *written], key=lambda note: note.shard.name)
        shards = manifest.shards_of(finished, seen.dropped)
        conditioning = (folder / CONDITIONING_NAME).read_bytes()
        index = Index(
            spec.variant,
            spec.text_width,
            prints,
            settings,
            shards,
            whole_part(conditioning),
            str(tensors_in(memoryview(conditioning))["empty_text"].dtype).removeprefix("torch."),
        )
        if not index.samples:
            raise nothing_usable(data.images)
        finish(folder, index, [*seen.kept, *pictures], report)
    return index


def content_of(recipe: Recipe, prints: dict[str, str]) -> dict[str, Any]:
    """What every sample in a folder of shards has in common."""
    dtype, quantization = text_precision(recipe)
    return {
        "settings": {name: getattr(recipe.data, name) for name in SETTINGS},
        "encoding": {
            "text_weights": quantization or str(dtype),
            "vae_precision": recipe.prepare.vae_precision,
            "vae_tiling": recipe.prepare.vae_tiling,
            "reference_resolution": recipe.prepare.reference_resolution,
        },
        "model": prints,
    }


def made_here(recipe: Recipe) -> list[Path]:
    """Folders whose pictures are ours: contact sheets and previews."""
    data = recipe.data
    return [Path(each) for each in (data.shards, *data.more_shards.values(), recipe.run_dir)]


def check_target(shards: str) -> None:
    """Check that the output folder is one of a file system.

    Raises:
        UserError: it is a URL.
    """
    if is_url(shards):
        raise UserError(
            f"data.shards {shards} is a URL, and prepare writes to a file system. Give a folder, copy it "
            "to the store when it is finished, index.json last, and train from the URL."
        )


_SECTIONS = {"settings": "data.", "encoding": "prepare.", "model": "the model's "}


def check_folder(folder: Path, content: dict[str, Any]) -> None:
    """Check that the output folder is of the same settings and model, or that nothing is in it.

    Raises:
        UserError: it holds something else; nothing in it is touched.
    """
    path = folder / CONTENT_NAME
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [
            f"{_SECTIONS[part]}{name} was {before.get(part, {}).get(name)!r}, is {value!r}"
            for part, values in content.items()
            for name, value in values.items()
            if before.get(part, {}).get(name) != value
        ]
        if changed:
            raise UserError(
                f"data.shards {folder} was prepared with something else ({path}): {'; '.join(changed)}. Set it "
                "back, give a new folder, or remove this one."
            )
    elif not untouched(folder):
        raise UserError(
            f"data.shards {folder} is not empty and was not made by prepare. Give a new folder."
        )


def untouched(folder: Path) -> bool:
    """Whether nothing has been encoded into a folder: it is new, or a start that was refused or killed
    before has left its settings, which bind nobody."""
    ours = {CONTENT_NAME, f"{CONTENT_NAME}.partial", manifest.FOLDER}
    return not folder.exists() or (
        all(found.name in ours for found in folder.iterdir()) and not manifest.read_notes(folder)
    )


@contextmanager
def claimed(folder: Path, content: dict[str, Any]) -> Iterator[None]:
    """Make the output folder, and keep others out of it.

    Raises:
        UserError: the folder holds something else, or is being written.
    """
    if not untouched(folder):
        check_folder(folder, content)
    path = folder / CONTENT_NAME
    taken = f"another prepare is writing data.shards {folder}. Wait for it or stop it."
    with hold(folder / manifest.FOLDER / "lock", taken, "do not prepare twice at a time"):
        if untouched(folder):
            atomic_write_text(path, json.dumps(content, indent=1) + "\n")
        yield


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """A full disk is the user's to mend, and nothing that is finished is lost."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors names the cause in its message alone.
        full = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)}
        reason = next((each for each in full if each in str(error)), None)
        if reason is None:
            raise
        raise UserError(
            f"the disk of data.shards {folder} is full ({reason}). Free some space and "
            "start again: finished shards are kept."
        ) from error


def say_plan(pictures: list[Picture], seen: manifest.Comparison) -> None:
    """Log what is there and what is to be encoded."""
    if seen.kept:
        log.info("%d pictures are encoded already", len(seen.kept))
    for name, rows in seen.dropped.items():
        log.info("%d samples of %s are dropped: changed or gone", len(rows), name)
    if pictures:
        log.info("%d pictures to encode:", len(pictures))
        for line in bucket_lines(picture.bucket for picture in pictures):
            log.info(line)


def check_disk(folder: Path, jobs: list[Job], spec: Spec, recipe: Recipe) -> None:
    """Say how much will be written and refuse what cannot fit.

    Raises:
        UserError: naming the space needed and the space there is.
    """
    text = text_bytes(spec, recipe)
    shards = sum(
        sum(4 * 128 * tokens_of(picture, recipe) for picture in job.pictures)
        + text * len({picture.caption for picture in job.pictures})
        for job in jobs
    )
    waiting = text * len({picture.caption for job in jobs for picture in job.pictures})
    needed = shards + min(waiting, recipe.prepare.scratch_gb * 1e9)
    free = shutil.disk_usage(folder).free
    if jobs:
        log.info("%.2f GB of shards to write, %.2f GB free", shards / 1e9, free / 1e9)
    if needed > free:
        raise UserError(
            f"data.shards {folder} needs {needed / 1e9:.2f} GB more, of which "
            f"{(needed - shards) / 1e9:.2f} GB for the time of encoding (prepare.scratch_gb is "
            f"{recipe.prepare.scratch_gb:g}), and its disk has {free / 1e9:.2f} GB free."
        )


def tokens_of(picture: Picture, recipe: Recipe) -> int:
    """Image tokens of a picture and, at most, of its references."""
    largest = (recipe.prepare.reference_resolution // PIXELS_PER_TOKEN) ** 2
    return picture.bucket.tokens + largest * len(picture.entry.references)


def finish(folder: Path, index: Index, pictures: list[Picture], report: Report) -> None:
    """Write the report and, last, the index; remove the scratch files."""
    usable = [p for p in pictures if p.entry.name not in report.skipped.reasons]
    usable.sort(key=lambda picture: picture.entry.name)
    summary = write_report(folder, report, index, usable)
    path = write_index(folder, index)
    shutil.rmtree(folder / TEXTS, ignore_errors=True)
    log.info("%s%s", summary, path)


def nothing_usable(images: str | dict[str, str]) -> UserError:
    """The error that no picture is left."""
    return UserError(f"none of the pictures in data.images {images} can be used; see above.")


if __name__ == "__main__":
    run_root(main)
