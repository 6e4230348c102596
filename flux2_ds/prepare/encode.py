"""Captions and images into shards, by all ranks together."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.index import CONDITIONING_NAME, encoded_prompts
from flux2_ds.data.shards import read_prompts, write_prompts
from flux2_ds.distributed import Process, all_gather_object, barrier, broadcast_object
from flux2_ds.model import latents
from flux2_ds.model.safetensors_file import write_all
from flux2_ds.prepare.captions import CaptionEncoder, CaptionFiles
from flux2_ds.prepare.images import ShardWriter, in_chunks, load_vae
from flux2_ds.prepare.manifest import Manifest
from flux2_ds.prepare.plan import ShardJob, text_bytes, texts_in
from flux2_ds.run.atomic import atomic_path
from flux2_ds.run.environment import given_ranks

CAPTIONS = ".texts"
"""Folder of captions that wait for their shard, in that of the shards."""
_CAPTIONS_A_RANK = 64  # loading the text encoder once more must pay

Item = TypeVar("Item")


@dataclass(frozen=True)
class Encoding:
    """How this rank encodes."""

    recipe: Recipe
    directory: Path
    """Of the model."""
    spec: Spec
    process: Process
    heartbeat: Callable[[int, str], None]

    @property
    def folder(self) -> Path:
        """Of the shards."""
        return Path(self.recipe.data.shards)

    @property
    def captions(self) -> CaptionFiles:
        """The captions that wait for their shard."""
        return CaptionFiles(self.folder / CAPTIONS)


def encode(
    encoding: Encoding, jobs: list[ShardJob], finished: list[Manifest]
) -> tuple[list[Manifest], dict[str, int]]:
    """Write the shards, in rounds of as many as their captions fit into the scratch space. Collective.

    Returns their manifests, and the token counts of captions over 512. Rank 0 knows those `finished`.
    """
    torch.backends.cudnn.allow_tf32 = False  # fp32 encoding means fp32 on a GPU too
    written: list[Manifest] = []
    long_captions: dict[str, int] = {}
    limit = encoding.recipe.prepare.scratch_gb * 1e9 / text_bytes(encoding.spec, encoding.recipe)
    # With nothing new there may still be prompts to encode, or conditioning to write again.
    for number, round_ in enumerate([*rounds(jobs, int(limit))] or [list[ShardJob]()], start=1):
        missing = None
        if encoding.process.is_rank0:
            missing = missing_captions(encoding, round_, [*finished, *written])
        long_captions |= encode_captions(encoding, broadcast_object(missing), number)
        if encoding.process.is_rank0:
            write_conditioning(encoding)
            add_prompts(encoding)
        written += encode_images(encoding, round_, number)
        if encoding.process.is_rank0:
            shutil.rmtree(encoding.captions.folder, ignore_errors=True)
    return written, long_captions


def rounds(jobs: list[ShardJob], captions: int) -> Iterator[list[ShardJob]]:
    """Consecutive shards with at most about `captions` distinct captions, and at least one shard."""
    round_: list[ShardJob] = []
    distinct: set[str] = set()
    for job in jobs:
        own = texts_in([job])
        if round_ and len(distinct | own) > captions:
            yield round_
            round_, distinct = [], set()
        round_.append(job)
        distinct |= own
    if round_:
        yield round_


def missing_captions(
    encoding: Encoding, jobs: list[ShardJob], finished: list[Manifest]
) -> list[str]:
    """The captions and prompts that have yet to be encoded, after those in finished shards were copied."""
    captions = texts_in(jobs)
    if not (encoding.folder / CONDITIONING_NAME).is_file():
        captions.add("")
    captions |= new_prompts(encoding)
    encoding.captions.copy_from_shards(captions, encoding.folder, finished)
    return sorted(caption for caption in captions if not encoding.captions.has(caption))


def encode_captions(encoding: Encoding, captions: list[str], number: int) -> dict[str, int]:
    """Encode this rank's share of the captions, then free the encoder. Collective.

    Returns the token counts of all that are over 512.
    """
    if not captions:
        return {}
    on_cpu = encoding.recipe.prepare.text_device == "cpu"
    ranks = caption_ranks(on_cpu)[: -(-len(captions) // _CAPTIONS_A_RANK)]
    batches = list(in_chunks(captions, encoding.recipe.prepare.text_batch_size))
    own = share(batches, ranks, encoding.process.rank)
    encoder, long_captions = None, dict[str, int]()
    if own:
        encoding.heartbeat(0, "loading the text encoder")
        device = torch.device("cpu") if on_cpu else encoding.process.device
        encoder = CaptionEncoder(
            encoding.recipe, encoding.directory, encoding.spec, encoding.captions, device
        )
    barrier()  # from here on a rank that stands still hangs
    with progress_bar(encoding, "captions", "txt", sum(map(len, own))) as progress:
        for batch in own:
            assert encoder is not None
            encoding.heartbeat(number, "encoding captions")
            long_captions |= encoder.encode(batch)
            progress.update(len(batch))
    del encoder
    empty_cache(encoding)
    encoding.heartbeat(number, "waiting for captions")
    return {caption: n for each in all_gather_object(long_captions) for caption, n in each.items()}


def caption_ranks(on_cpu: bool) -> list[int]:
    """The ranks that encode captions: one of each machine on the CPU, whose memory they share. Collective."""
    given = given_ranks(os.environ)
    local_ranks = all_gather_object(given.local_rank if given else 0)
    return [rank for rank, local in enumerate(local_ranks) if not (on_cpu and local)]


def encode_images(encoding: Encoding, jobs: list[ShardJob], number: int) -> list[Manifest]:
    """Write this rank's share of the shards, then free the VAE; returns all manifests. Collective."""
    if not jobs:
        return []
    process, settings = encoding.process, encoding.recipe.prepare
    own = share(jobs, range(process.world_size), process.rank)
    vae = None
    if own:
        encoding.heartbeat(0, "loading the VAE")
        vae = load_vae(encoding.directory, settings, process.device)
    barrier()
    manifests = []
    total = sum(len(job.images) for job in own)
    with progress_bar(encoding, "images", "img", total) as progress:

        def done(count: int) -> None:
            encoding.heartbeat(number, "encoding images")
            progress.update(count)

        for job in own:
            assert vae is not None
            writer = ShardWriter(vae, settings, encoding.captions, encoding.folder, done)
            manifests.append(writer.write(job))
    del vae
    empty_cache(encoding)
    encoding.heartbeat(number, "waiting for images")
    return [manifest for each in all_gather_object(manifests) for manifest in each]


def share(items: Sequence[Item], ranks: Sequence[int], rank: int) -> list[Item]:
    """The items of `rank`, if `ranks` take turns."""
    return list(items[ranks.index(rank) :: len(ranks)]) if rank in ranks else []


def progress_bar(encoding: Encoding, name: str, unit: str, total: int) -> tqdm:
    """A bar for rank 0's share."""
    rank, world_size = encoding.process.rank, encoding.process.world_size
    title = name if world_size == 1 else f"{name} (rank 0 of {world_size})"
    # Elsewhere than on a terminal a line twice a minute.
    pace = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(None, title, total, unit=unit, disable=rank > 0, mininterval=pace)


def empty_cache(encoding: Encoding) -> None:
    """Return what a freed model held to the GPU, for the next one."""
    if encoding.process.device.type == "cuda":
        torch.cuda.empty_cache()


def new_prompts(encoding: Encoding) -> set[str]:
    """The prompts that training needs and the folder of shards has not yet."""
    preview = encoding.recipe.preview
    wanted = {
        *encoding.recipe.preservation.prompts,
        *(preview.prompts if preview.in_training else []),
    }
    return wanted - encoded_prompts(str(encoding.folder)) if wanted else set()


def add_prompts(encoding: Encoding) -> None:
    """Add the encoded prompts that are new to the folder of shards."""
    new = {prompt: encoding.captions.read(prompt) for prompt in new_prompts(encoding)}
    if new:
        folder, known = str(encoding.folder), encoded_prompts(str(encoding.folder))
        old = read_prompts(folder, known, encoding.spec.text_width) if known else {}
        write_prompts(encoding.folder, old | new)


def write_conditioning(encoding: Encoding) -> None:
    """Write the latent statistics and the encoded empty caption, unless they are there."""
    path = encoding.folder / CONDITIONING_NAME
    if path.is_file():
        return
    exact = replace(
        encoding.recipe.prepare, vae_precision="fp32"
    )  # the statistics keep all their bits
    mean, std = latents.statistics(load_vae(encoding.directory, exact, torch.device("cpu")))
    empty_text = encoding.captions.read("")
    atomic_write_tensors(path, {"latent_mean": mean, "latent_std": std, "empty_text": empty_text})


def atomic_write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file, atomically."""
    with atomic_path(path) as partial:
        write_all(partial, tensors, {})
