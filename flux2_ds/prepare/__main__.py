"""Prepare: photographs and captions in, WebDataset shards of latents and text embeddings out.

    flux2-ds prepare --config recipes/h100x1.yaml

First the captions are encoded, each distinct one once, then the text encoder is freed and the VAE
encodes the pictures, so that both are never in memory together. Starting again goes on after a stop,
and adds what is new since: finished shards are never rewritten.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLFlux2
from tqdm import tqdm

from flux2_ds.data.index import CONDITIONING_NAME, Index, write_index
from flux2_ds.errors import UserError, run_root
from flux2_ds.model import latents
from flux2_ds.model.files import fingerprint, model_directory
from flux2_ds.prepare import ledger
from flux2_ds.prepare.choose import bucket_lines, choose_buckets, with_captions
from flux2_ds.prepare.entries import Picture, write_whole
from flux2_ds.prepare.ledger import Job, Note
from flux2_ds.prepare.pictures import PictureWorker, in_chunks, load_vae
from flux2_ds.prepare.report import Report, write_report
from flux2_ds.prepare.sources import find_entries
from flux2_ds.prepare.texts import TextFiles, TextWorker, copy_known
from flux2_ds.prepare.workers import run_tasks
from flux2_ds.ranges import check_ranges
from flux2_ds.recipe import Recipe, parse_recipe, recipe_parser
from flux2_ds.spec import PIXELS_PER_TOKEN, TEXT_TOKENS, Spec, read_spec
from flux2_ds.tensors import write_tensors

log = logging.getLogger("flux2_ds")

CONTENT_NAME = "content.json"
SETTINGS = ("resolution", "bucket_step", "max_aspect", "max_upscale", "held_out")
"""The data settings that decide which pictures are trained on, which part of them, and how large."""
_CAPTIONS_A_PROCESS = 64  # loading the text encoder once more must pay


def main() -> None:
    """Entry point of `flux2-ds prepare`."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    recipe, _ = parse_recipe(
        recipe_parser("flux2-ds prepare", "Encode photographs and captions into shards.")
    )
    check_ranges(recipe)
    torch.backends.cudnn.allow_tf32 = False  # fp32 encoding means fp32 on a GPU too
    directory = model_directory(
        recipe.model.path, recipe.model.revision, ["vae", "text_encoder", "tokenizer", "scheduler"]
    )
    prepare(recipe, directory, read_spec(directory, allow_distilled=True))


def prepare(recipe: Recipe, directory: Path, spec: Spec) -> Index:
    """Write shards, index.json and report; returns the index.

    Raises:
        UserError: no usable pictures, a folder of something else, or a full disk.
    """
    data, folder = recipe.data, Path(recipe.data.shards)
    report = Report()
    prints = fingerprint(directory)
    content = content_of(recipe, prints)
    check_folder(folder, content)
    entries = find_entries(data.images, data.caption_column, folder / ledger.FOLDER / "tars")
    entries = with_captions(entries, data, report.skipped)
    with claimed(folder, content), full_disk_explained(folder):
        notes = ledger.read_notes(folder)
        seen = ledger.compare(entries, notes)
        if notes and not seen.kept:
            raise UserError(
                f"data.shards {folder} was prepared from other pictures: none of data.images "
                f"{data.images} is among them. Give a new folder."
            )
        report.skipped.reasons |= seen.skipped
        pictures = choose_buckets(seen.fresh, data, report.skipped)
        if not pictures and not seen.kept:
            raise nothing_usable(data.images)
        jobs = ledger.plan_shards(pictures, notes, data.samples_per_shard, data.held_out)
        say_plan(pictures, seen)
        check_disk(folder, jobs, spec, recipe)
        report.dropped = sum(len(rows) for rows in seen.dropped.values())
        report.kept = len(seen.kept)

        started = time.monotonic()
        written = encode(recipe, directory, spec, folder, jobs, notes, report)
        report.seconds = time.monotonic() - started
        report.encoded = sum(len(note.rows) for note in written)
        for note in written:
            for key, (_, reason) in note.skipped.items():
                report.skipped.add(f"{note.shard.source}/{key}", reason)

        settings = {name: getattr(data, name) for name in SETTINGS}
        finished = sorted([*notes, *written], key=lambda note: note.shard.name)
        shards = ledger.shards_of(finished, seen.dropped)
        index = Index(spec.variant, spec.text_width, prints, settings, shards)
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


def check_folder(folder: Path, content: dict[str, Any]) -> None:
    """Check that the output folder is new, or of the same settings and model.

    Raises:
        UserError: it holds something else; nothing in it is touched.
    """
    path = folder / CONTENT_NAME
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [name for name in content if before.get(name) != content[name]]
        if changed:
            raise UserError(
                f"data.shards {folder} was prepared with something else (changed: "
                f"{', '.join(changed)}; {path} has the old values). Give a new folder, or remove "
                "this one."
            )
    elif folder.exists():
        ours = {f"{CONTENT_NAME}.partial", ledger.FOLDER}  # all that a kill right here can leave
        if any(found.name not in ours for found in folder.iterdir()):
            raise UserError(
                f"data.shards {folder} is not empty and was not made by prepare. Give a new folder."
            )


@contextmanager
def claimed(folder: Path, content: dict[str, Any]) -> Iterator[None]:
    """Make the output folder, and keep others out of it.

    Raises:
        UserError: the folder holds something else, or is being written.
    """
    check_folder(folder, content)
    path = folder / CONTENT_NAME
    (folder / ledger.FOLDER).mkdir(parents=True, exist_ok=True)
    with (folder / ledger.FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another prepare is writing data.shards {folder}. Wait for it or stop it."
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s); do not prepare twice at a time", folder, error)
        if not path.is_file():
            write_whole(path, json.dumps(content, indent=1) + "\n")
        yield


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """A full disk is the user's to mend, and nothing that is finished is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of data.shards {folder} is full ({error.strerror}). Free some space and "
            "start again: finished shards are kept."
        ) from error


def say_plan(pictures: list[Picture], seen: ledger.Comparison) -> None:
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


def encode(
    recipe: Recipe,
    directory: Path,
    spec: Spec,
    folder: Path,
    jobs: list[Job],
    notes: list[Note],
    report: Report,
) -> list[Note]:
    """Write the shards, in rounds of as many as their captions fit into the scratch space."""
    settings, texts = recipe.prepare, TextFiles(folder / ".texts")
    written: list[Note] = []
    total = sum(len(job.pictures) for job in jobs)
    make_pictures = partial(PictureWorker, directory, settings, texts, folder)
    limit = int(settings.scratch_gb * 1e9 / text_bytes(spec, recipe))
    for round_ in rounds(jobs, limit):
        captions = {picture.caption for job in round_ for picture in job.pictures}
        unconditioned = not (folder / CONDITIONING_NAME).is_file()
        if unconditioned:
            captions.add("")
        copy_known(texts, captions, folder, [*notes, *written])
        encode_texts(recipe, directory, spec, texts, captions, report)
        if unconditioned:
            write_conditioning(folder, load_vae(directory, settings, torch.device("cpu")), texts)
        with tqdm(desc="pictures", total=total, unit="img") as progress:
            progress.update(sum(len(note.rows) + len(note.skipped) for note in written))
            devices = devices_of(recipe)[: len(round_)]
            written += run_tasks(make_pictures, round_, devices, progress)
        shutil.rmtree(folder / ".texts")
    return written


def encode_texts(
    recipe: Recipe,
    directory: Path,
    spec: Spec,
    texts: TextFiles,
    captions: set[str],
    report: Report,
) -> None:
    """Encode the captions that have no file in `texts` yet, then free the encoder."""
    missing = sorted(caption for caption in captions if not texts.has(caption))
    if not missing:
        return
    make = partial(TextWorker, directory, spec, *text_precision(recipe), texts)
    devices = ["cpu"] if recipe.prepare.text_device == "cpu" else devices_of(recipe)
    devices = devices[: -(-len(missing) // _CAPTIONS_A_PROCESS)]
    batches = list(in_chunks(missing, recipe.prepare.text_batch))
    with tqdm(desc="captions", total=len(missing), unit="txt") as progress:
        for long in run_tasks(make, batches, devices, progress):
            report.long_captions |= long


def write_conditioning(folder: Path, vae: AutoencoderKLFlux2, texts: TextFiles) -> None:
    """Write the latent statistics and the encoded empty caption."""
    mean, std = latents.statistics(vae)
    tensors = {"latent_mean": mean, "latent_std": std, "empty_text": texts.read("")}
    partial_path = folder / f"{CONDITIONING_NAME}.partial"
    write_tensors(partial_path, tensors)
    partial_path.replace(folder / CONDITIONING_NAME)


def rounds(jobs: list[Job], captions: int) -> Iterator[list[Job]]:
    """Consecutive shards with at most about `captions` distinct captions, and at least one shard."""
    round_: list[Job] = []
    distinct: set[str] = set()
    for job in jobs:
        own = {picture.caption for picture in job.pictures}
        if round_ and len(distinct | own) > captions:
            yield round_
            round_, distinct = [], set()
        round_.append(job)
        distinct |= own
    if round_:
        yield round_


def devices_of(recipe: Recipe) -> list[str]:
    """The device of each process.

    Raises:
        UserError: more processes than GPUs.
    """
    wanted = recipe.prepare.processes
    if recipe.launch.accelerator == "cpu":
        return ["cpu"] * (wanted or 1)
    visible = torch.cuda.device_count()
    if (wanted or 1) > visible:
        raise UserError(
            f"prepare.processes is {wanted or 1}, and {visible} GPUs are visible here. Lower it, or "
            "set launch.accelerator to cpu."
        )
    return [f"cuda:{number}" for number in range(wanted or visible)]


def text_precision(recipe: Recipe) -> tuple[torch.dtype, Literal["int8", "nf4"] | None]:
    """The dtype in which captions are encoded, and how the encoder's weights are quantised."""
    weights = recipe.prepare.text_weights
    if weights == "int8" or weights == "nf4":
        return torch.bfloat16, weights
    fp32 = weights == "fp32" or (weights == "auto" and recipe.precision == "fp32")
    return (torch.float32 if fp32 else torch.bfloat16), None


def text_bytes(spec: Spec, recipe: Recipe) -> int:
    """Size of one encoded caption."""
    return TEXT_TOKENS * spec.text_width * text_precision(recipe)[0].itemsize


def finish(folder: Path, index: Index, pictures: list[Picture], report: Report) -> None:
    """Write the report and, last, the index; remove the scratch files."""
    usable = [p for p in pictures if p.entry.name not in report.skipped.reasons]
    usable.sort(key=lambda picture: picture.entry.name)
    summary = write_report(folder, report, index, usable)
    path = write_index(folder, index)
    shutil.rmtree(folder / ".texts", ignore_errors=True)
    log.info("%s%s", summary, path)


def nothing_usable(images: str | dict[str, str]) -> UserError:
    """The error that no picture is left."""
    return UserError(f"none of the pictures in data.images {images} can be used; see above.")


if __name__ == "__main__":
    run_root(main)
