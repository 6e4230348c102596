"""Shards: ordinary WebDataset tars of one bucket, whose samples can be read one by one.

Members of a sample, with the key as stem:

    latent.safetensors  `latent` [32, H/8, W/8] fp32: mean of the VAE's posterior, before patchifying
                        and normalising
    text.safetensors    `text` [rows, text width]: the encoded caption, in the encoder's dtype; with
                        `padding` [2] the first row stands for so many more before it, the last for
                        so many after it, all to 512
    mask.safetensors    `mask` [H/16, W/16] fp32: weights of the loss, if the image has a mask
    references.safetensors  `0`, `1`, ...: reference images as latents, of the bucket's sizes, if any
    json                caption, source file, bucket, and `text_key`: the sample whose text it shares

A sample with several texts has `text1.safetensors`, `text2.safetensors`, ... as well, and in its JSON `captions` and
`text_keys`, the names of their members without the suffix; one with several views of its image (other crops, mirrored)
`latent1.safetensors`, `mask1.safetensors`, `references1.safetensors`, .... A text that recurs in a shard is stored once, with its first
sample: text is most of a sample's bytes. FLUX.2-dev pads captions on the left, and all padding has one embedding, so that it is stored once:
5 MB of 15.7 for a caption of 160 tokens. Every shard stands alone. Latents stay fp32 because they
are small beside the text.

The last member, `__toc__`, is the table of contents: offset, size and XXH3 of every member of every
sample, so that a sample is one read of the file, be it on disk or in a store, and is checked. WebDataset
passes over members of such a name.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save as save_tensors

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_spec import TEXT_TOKENS, TOKEN_CHANNELS
from flux2_ds.data.index import (
    CONDITIONING_NAME,
    INDEX_NAME,
    OLDER,
    PROMPTS_NAME,
    Index,
    Part,
    Shard,
)
from flux2_ds.data.storage import Blob, DamagedError, join
from flux2_ds.errors import MALFORMED, UserError
from flux2_ds.run.atomic import atomic_path

LATENT, TEXT, META = "latent.safetensors", "text.safetensors", "json"
MASK, REFERENCES = "mask.safetensors", "references.safetensors"
_TOC = "__toc__"
_GAP = 4096  # members with less between them are read at once

_DTYPES = {"I64": torch.int64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Fetch = Callable[[Blob, Callable[[memoryview], None]], memoryview]


@dataclass(frozen=True)
class View:
    """One crop of an image. `latent`, `references`: [32, H/8, W/8] fp32. `mask`: [H/16, W/16] fp32 in [0, 1]."""

    latent: torch.Tensor
    mask: torch.Tensor | None = None
    references: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class Record:
    """One sample on its way into a shard: `texts` and `views` of an image, at least one of each."""

    source: str
    texts: tuple[str, ...]
    views: tuple[View, ...]


def write_shard(
    path: Path,
    bucket: Bucket,
    records: Iterable[Record],
    text_of: Callable[[str], torch.Tensor],
    source: str = "",
) -> Shard:
    """Write one shard, atomically. `text_of` gives a caption's [512, D]."""
    with atomic_path(path) as partial:
        with partial.open("wb") as stream:
            facts = _write_tar(stream, bucket, records, text_of)
            stream.flush()
            os.fsync(stream.fileno())
        with partial.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        size = partial.stat().st_size
    return Shard(path.name, bucket, size=size, sha256=sha256, source=source, **facts)


def _write_tar(
    stream: Any, bucket: Bucket, records: Iterable[Record], text_of: Callable[[str], torch.Tensor]
) -> dict[str, Any]:
    """Write a tar; returns the facts of `Shard` that its contents decide."""
    toc: list[dict[str, Part]] = []
    text_bytes = latents = 0
    first: dict[str, tuple[int, str]] = {}  # row and member by text
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, record in enumerate(records):
            views = {
                variant(name, number): data
                for number, view in enumerate(record.views)
                for name, data in _members(view).items()
            }
            members = {LATENT: views.pop(LATENT)}
            names = {variant(TEXT, number): text for number, text in enumerate(record.texts)}
            for name, text in names.items():
                if first.setdefault(text, (row, name)) == (row, name):
                    members[name] = save_tensors(pack_text(text_of(text)))
                    text_bytes += len(members[name])
            members |= views
            latents += len(record.views)
            meta = {
                "caption": record.texts[0],
                "source": record.source,
                "height": bucket.height,
                "width": bucket.width,
                "text_key": _key(first[record.texts[0]][0]),
            }
            if len(names) > 1:
                homes = (first[text] for text in record.texts)
                keys = [f"{_key(row)}.{name.partition('.')[0]}" for row, name in homes]
                meta |= {"captions": record.texts, "text_keys": keys}
            members[META] = json.dumps(meta, ensure_ascii=False).encode()
            parts = {name: _add(tar, f"{_key(row)}.{name}", data) for name, data in members.items()}
            toc.append(parts)
            for name, text in names.items():
                home, member = first[text]
                parts[name] = toc[home][member]
        return {
            "samples": len(toc),
            "masks": sum(MASK in parts for parts in toc),
            "toc": _add(tar, _TOC, _toc_json(toc)),
            "texts": len(first),
            "text_bytes": text_bytes,
            "latents": latents,
        }


def variant(name: str, number: int) -> str:
    """The member of the `number`-th variant of what is in member `name`, which is the first."""
    return name.replace(".", f"{number}.", 1) if number else name


def _members(view: View) -> dict[str, bytes]:
    """A latent, with its mask and reference images if it has any."""
    members = {LATENT: save_tensors({"latent": view.latent.contiguous()})}
    if view.mask is not None:
        members[MASK] = save_tensors({"mask": view.mask.contiguous()})
    if view.references:
        tensors = {str(k): each.contiguous() for k, each in enumerate(view.references)}
        members[REFERENCES] = save_tensors(tensors)
    return members


def _toc_json(toc: list[dict[str, Part]]) -> bytes:
    rows = [{name: astuple(part) for name, part in parts.items()} for parts in toc]
    return json.dumps(rows, separators=(",", ":")).encode()


def _key(row: int) -> str:
    return f"{row:08d}"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> Part:
    """Append a member; the same input makes the same file, because no time is in it."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o444
    tar.addfile(member, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return Part(tar.offset - padded, len(data), xxhash.xxh3_128_hexdigest(data))


class ShardReader:
    """Random access to the samples of one shard, by its table of contents.

    Rows that the index has dropped are not counted. `fetch` reads a blob and calls a check on it, again
    if the check fails; it may keep what it read.
    """

    def __init__(self, location: str | Path, shard: Shard, fetch: Fetch = Blob.view) -> None:
        self._location = str(location)
        self._fetch = fetch
        rows = json.loads(bytes(self._read([shard.toc])[0]))
        gone = set(shard.dropped)
        self._rows = [
            {name: Part(*part) for name, part in members.items()}
            for row, members in enumerate(rows)
            if row not in gone
        ]
        if len(self._rows) != shard.samples:
            raise UserError(
                f"shard {self._location} has {len(self._rows)} samples, index.json counts "
                f"{shard.samples}. Copy both again or prepare the shards again."
            )

    def members(self, row: int, names: Sequence[str]) -> list[memoryview]:
        """The contents of some members of a sample."""
        return self._read([self._rows[row][name] for name in names])

    def meta(self, row: int) -> dict[str, Any]:
        """Caption, source and the rest of the sample's JSON."""
        value: dict[str, Any] = json.loads(bytes(self.members(row, [META])[0]))
        return value

    def views(self, row: int) -> int:
        """How many views of its image a sample has."""
        return sum(name.startswith("latent") for name in self._rows[row])

    def latent(self, row: int, view: int = 0) -> torch.Tensor:
        """[32, H/8, W/8] fp32."""
        return tensors_in(self.members(row, [variant(LATENT, view)])[0])["latent"]

    def texts(self, row: int) -> int:
        """How many texts a sample has."""
        return sum(name.startswith("text") for name in self._rows[row])

    def text(self, row: int, number: int = 0) -> torch.Tensor:
        """One of the sample's texts; [512, text width]."""
        return unpack_text(tensors_in(self.members(row, [variant(TEXT, number)])[0]))

    def mask(self, row: int, view: int = 0) -> torch.Tensor | None:
        """[H/16, W/16] fp32 in [0, 1], or None if the sample has none."""
        if (name := variant(MASK, view)) not in self._rows[row]:
            return None
        return tensors_in(self.members(row, [name])[0])["mask"]

    def references(self, row: int, view: int = 0) -> list[torch.Tensor]:
        """Reference images, [32, h, w] fp32 each."""
        if (name := variant(REFERENCES, view)) not in self._rows[row]:
            return []
        tensors = tensors_in(self.members(row, [name])[0])
        return [tensors[str(k)] for k in range(len(tensors))]

    def sample(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First latent and text; they lie side by side unless the text is another sample's, too."""
        latent, text = self.members(row, [LATENT, TEXT])
        return tensors_in(latent)["latent"], unpack_text(tensors_in(text))

    def text_digest(self, row: int, number: int = 0) -> str:
        """Names a text of a sample, whatever the shard."""
        return self._rows[row][variant(TEXT, number)].xxh3

    def own_text(self, row: int) -> bool:
        """Whether the first text lies beside the first latent."""
        latent, text = self._rows[row][LATENT], self._rows[row][TEXT]
        return 0 <= text.offset - latent.end <= _GAP

    def _read(self, parts: list[Part]) -> list[memoryview]:
        """The parts, checked; those that are close to each other in one read."""
        start, end = min(part.offset for part in parts), max(part.end for part in parts)
        if end - start > sum(part.size for part in parts) + _GAP * len(parts):
            return [piece for part in parts for piece in self._read([part])]

        def check(data: memoryview) -> None:
            for part in parts:
                piece = data[part.offset - start : part.end - start]
                if xxhash.xxh3_128_hexdigest(piece) != part.xxh3:
                    raise DamagedError(
                        f"{part.size} bytes at {part.offset} are not what was written"
                    )

        data = self._fetch(Blob(self._location, start, end - start), check)
        return [data[part.offset - start : part.end - start] for part in parts]


def pack_text(text: torch.Tensor) -> dict[str, torch.Tensor]:
    """An encoded caption [512, text width], without the rows at its ends that repeat to the last bit."""
    bits = text.contiguous().view(torch.uint8)
    repeats = (bits[1:] == bits[:-1]).all(dim=1)
    left = int(repeats.long().cumprod(0).sum())
    right = int(repeats[left:].long().flip(0).cumprod(0).sum())
    if not left and not right:
        return {"text": text.contiguous()}
    kept = text[left : len(text) - right].contiguous()
    return {"text": kept, "padding": torch.tensor([left, right])}


def unpack_text(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The caption that `pack_text` was given, bit by bit."""
    text = tensors["text"]
    if "padding" not in tensors:
        return text
    left, right = tensors["padding"].tolist()
    full = text.new_empty(left + len(text) + right, *text.shape[1:])
    full[:left] = text[0]
    full[left : left + len(text)] = text
    full[left + len(text) :] = text[-1]
    return full


def tensors_in(content: memoryview) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, without a copy of its contents if they may be written to.

    safetensors itself offers this for files on disk alone; from memory it copies, which costs as much as
    reading.
    """
    if content.readonly:
        content = memoryview(bytearray(content))
    start = 8 + int.from_bytes(content[:8], "little")
    header = _header(content)
    header.pop("__metadata__", None)
    data = torch.frombuffer(content, dtype=torch.uint8)[start:]
    return {
        name: data[slice(*facts["data_offsets"])].view(_DTYPES[facts["dtype"]]).view(facts["shape"])
        for name, facts in header.items()
    }


def _header(content: memoryview) -> dict[str, Any]:
    """The header of a safetensors file."""
    header: dict[str, Any] = json.loads(
        bytes(content[8 : 8 + int.from_bytes(content[:8], "little")])
    )
    return header


def _tensor_digest(tensor: torch.Tensor) -> str:
    """Of its bytes, and of the dtype that they are read as."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return xxhash.xxh3_128_hexdigest(b"".join((str(tensor.dtype).encode(), data)))


def read_conditioning(folder: str, index: Index) -> dict[str, torch.Tensor]:
    """`latent_mean`, `latent_std` [128] fp32 and `empty_text` [512, text width] of a folder of shards."""

    def check(data: memoryview) -> None:
        if index.conditioning.xxh3 and full_part(data) != index.conditioning:
            raise DamagedError(f"it is not what {INDEX_NAME} says")

    path = join(folder, CONDITIONING_NAME)
    found = tensors_in(Blob(path).view(check))
    channels = (TOKEN_CHANNELS,)
    expected = {
        "latent_mean": channels,
        "latent_std": channels,
        "empty_text": (TEXT_TOKENS, index.text_width),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != expected:
        raise UserError(f"{path} has {shapes}, not {expected}. Prepare the shards again.")
    return found


def full_part(data: bytes | memoryview) -> Part:
    """All of a file with this content."""
    return Part(0, len(data), xxhash.xxh3_128_hexdigest(data))


def write_prompts(folder: Path, prompts: dict[str, torch.Tensor]) -> None:
    """Write the encoded preview prompts of a folder of shards, and the XXH3 of each."""
    digests = {prompt: _tensor_digest(text) for prompt, text in prompts.items()}
    with atomic_path(folder / PROMPTS_NAME) as partial:
        partial.write_bytes(save_tensors(prompts, {"xxh3": json.dumps(digests)}))


def read_prompts(folder: str, prompts: Iterable[str], text_width: int) -> dict[str, torch.Tensor]:
    """The encoded preview prompts of a folder of shards, [512, text width] each."""
    path = join(folder, PROMPTS_NAME)
    try:
        content = Blob(path).view()
        known = tensors_in(content)
        notes = _header(content).get("__metadata__", {})
        if "xxh3" not in notes:
            raise ValueError(f"it has no digests: {OLDER}")
        digests = json.loads(notes["xxh3"])
        found = {prompt: known[prompt] for prompt in prompts}
        for prompt, text in found.items():
            if _tensor_digest(text) != digests[prompt]:
                raise ValueError(f"{prompt!r} is not what was written")
            if text.shape != (TEXT_TOKENS, text_width):
                raise ValueError(f"{prompt!r} has the shape {tuple(text.shape)}")
        return found
    except (*MALFORMED, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be used ({error}). Remove it and run `flux2-ds prepare` again, which writes it anew."
        ) from error
