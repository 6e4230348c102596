"""Captions to embeddings, each distinct one once, into files that wait for their shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from flux2_ds.config.model_spec import TEXT_TOKENS, Spec
from flux2_ds.data.shards import ShardReader
from flux2_ds.errors import UserError
from flux2_ds.model.text_encoder import TextEncoder
from flux2_ds.prepare.manifest import Note, caption_digest
from flux2_ds.run.atomic import atomic_path

TEXTS = ".texts"
"""Below the shards' folder: captions that wait for their shard."""


class TextFiles:
    """The embeddings of captions, one file each, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, caption: str) -> bool:
        """Whether the caption has been encoded."""
        return self._path(caption).is_file()

    def read(self, caption: str) -> torch.Tensor:
        """[512, text width]."""
        return load_file(self._path(caption))["text"]

    def write(self, caption: str, embedding: torch.Tensor) -> None:
        """Keep an embedding; the file appears whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._path(caption)) as partial:
            partial.write_bytes(save_tensors({"text": embedding.contiguous()}))

    def _path(self, caption: str) -> Path:
        return self._folder / f"{caption_digest(caption)}.safetensors"


def copy_known(texts: TextFiles, captions: set[str], folder: Path, notes: list[Note]) -> None:
    """Take the embeddings of captions that an earlier shard holds from there."""
    by_digest = {caption_digest(caption): caption for caption in captions if not texts.has(caption)}
    for note in notes:
        rows = [(n, by_digest[row.caption]) for n, row in enumerate(note.rows)
                if row.caption in by_digest]  # fmt: skip
        if not rows:
            continue
        reader = ShardReader(folder / note.shard.name, note.shard)
        for number, caption in rows:
            if by_digest.pop(caption_digest(caption), None) is not None:
                texts.write(caption, reader.text(number))


class TextWorker:
    """Encodes batches of captions into `texts`; returns the token counts of those over 512."""

    def __init__(
        self,
        directory: Path,
        spec: Spec,
        dtype: torch.dtype,
        quantization: Literal["int8", "nf4"] | None,
        texts: TextFiles,
        device: torch.device,
    ) -> None:
        self._encoder = TextEncoder(directory, spec, dtype, device, quantization)
        self._directory, self._spec, self._texts = directory, spec, texts

    def __call__(self, captions: list[str], tick: Callable[[int], Any]) -> dict[str, int]:
        """Encode one batch."""
        embeddings = self._encoder.encode(captions)
        wanted = (TEXT_TOKENS, self._spec.text_width)
        if embeddings.shape[1:] != wanted:
            raise UserError(
                f"the text encoder in {self._directory} gives embeddings of shape "
                f"{tuple(embeddings.shape[1:])}, the transformer takes {wanted}: they are of "
                "different models."
            )
        for caption, embedding in zip(captions, embeddings, strict=True):
            self._texts.write(caption, embedding)
        tick(len(captions))
        counts = zip(captions, self._encoder.tokens(captions), strict=True)
        return {caption: count for caption, count in counts if count > TEXT_TOKENS}
