"""Captions and pictures into shards, with all machines and their devices."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import load_file
from tqdm import tqdm

from flux2_ds.checkpoint.tensor_store import write_tensors
from flux2_ds.config.model_spec import TEXT_TOKENS, Spec
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.index import CONDITIONING_NAME, PROMPTS_NAME
from flux2_ds.errors import UserError
from flux2_ds.model import latents
from flux2_ds.prepare.manifest import Job, Note
from flux2_ds.prepare.pictures import PictureWorker, in_chunks, load_vae
from flux2_ds.prepare.report import Report
from flux2_ds.prepare.team import CAPTIONS, PICTURES, Kind, Make, Team
from flux2_ds.prepare.texts import TEXTS, TextFiles, TextWorker, copy_known
from flux2_ds.run.atomic import atomic_path


@dataclass(frozen=True)
class Encoding:
    """How captions and pictures are encoded: on every machine alike."""

    recipe: Recipe
    directory: Path
    spec: Spec

    @property
    def folder(self) -> Path:
        """Of the shards."""
        return Path(self.recipe.data.shards)

    @property
    def texts(self) -> TextFiles:
        """The captions that wait for their shard."""
        return TextFiles(self.folder / TEXTS)

    def worker(self, kind: Kind) -> Make:
        """What does tasks of a kind, for a device."""
        if kind is CAPTIONS:
            precision = text_precision(self.recipe)
            return partial(TextWorker, self.directory, self.spec, *precision, self.texts)
        return partial(PictureWorker, self.directory, self.recipe.prepare, self.texts, self.folder)

    def devices(self, kind: Kind) -> list[str]:
        """The devices of this machine for tasks of a kind."""
        if kind is CAPTIONS and self.recipe.prepare.text_device == "cpu":
            return ["cpu"]
        return devices_of(self.recipe)


def encode(
    encoding: Encoding, team: Team, jobs: list[Job], notes: list[Note], report: Report
) -> list[Note]:
    """Write the shards, in rounds of as many as their captions fit into the scratch space."""
    folder, texts, settings = encoding.folder, encoding.texts, encoding.recipe.prepare
    written: list[Note] = []
    prompts = new_prompts(encoding.recipe)
    total = sum(len(job.pictures) for job in jobs)
    limit = int(settings.scratch_gb * 1e9 / text_bytes(encoding.spec, encoding.recipe))
    # With nothing new there may still be prompts to encode, or conditioning to write again.
    for round_ in [*rounds(jobs, limit)] or [list[Job]()]:
        captions = {picture.caption for job in round_ for picture in job.pictures}
        unconditioned = not (folder / CONDITIONING_NAME).is_file()
        if unconditioned:
            captions.add("")
        captions |= prompts
        copy_known(texts, captions, folder, [*notes, *written])
        encode_texts(encoding, team, captions, report)
        if unconditioned:
            exact = replace(settings, vae_precision="fp32")  # the statistics keep all their bits
            vae = load_vae(encoding.directory, exact, torch.device("cpu"))
            write_conditioning(folder, vae, texts)
        write_prompts(folder, prompts, texts)
        prompts = set()
        if round_:
            with tqdm(desc="pictures", total=total, unit="img") as progress:
                progress.update(sum(len(note.rows) + len(note.skipped) for note in written))
                make, devices = encoding.worker(PICTURES), encoding.devices(PICTURES)
                written += team.run(PICTURES, make, devices, round_, progress)
        shutil.rmtree(folder / TEXTS, ignore_errors=True)
    return written


def new_prompts(recipe: Recipe) -> set[str]:
    """The prompts of previews in training that the folder of shards has not yet."""
    if recipe.preview.every is None:
        return set()
    return set(recipe.preview.prompts) - known_prompts(Path(recipe.data.shards)).keys()


def known_prompts(folder: Path) -> dict[str, torch.Tensor]:
    """The encoded prompts in a folder of shards."""
    path = folder / PROMPTS_NAME
    return load_file(path) if path.is_file() else {}


def write_prompts(folder: Path, prompts: set[str], texts: TextFiles) -> None:
    """Add encoded prompts to the folder of shards."""
    if prompts:
        new = {prompt: texts.read(prompt) for prompt in prompts}
        atomic_write_tensors(folder / PROMPTS_NAME, known_prompts(folder) | new)


def encode_texts(encoding: Encoding, team: Team, captions: set[str], report: Report) -> None:
    """Encode the captions that have no file yet, then free the encoder."""
    missing = sorted(caption for caption in captions if not encoding.texts.has(caption))
    if not missing:
        return
    make, devices = encoding.worker(CAPTIONS), encoding.devices(CAPTIONS)
    batches = list(in_chunks(missing, encoding.recipe.prepare.text_batch_size))
    with tqdm(desc="captions", total=len(missing), unit="txt") as progress:
        for long in team.run(CAPTIONS, make, devices, batches, progress):
            report.long_captions |= long


def write_conditioning(folder: Path, vae: AutoencoderKLFlux2, texts: TextFiles) -> None:
    """Write the latent statistics and the encoded empty caption."""
    mean, std = latents.statistics(vae)
    tensors = {"latent_mean": mean, "latent_std": std, "empty_text": texts.read("")}
    atomic_write_tensors(folder / CONDITIONING_NAME, tensors)


def atomic_write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that appears whole or not at all."""
    with atomic_path(path) as partial:
        write_tensors(partial, tensors)


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
