"""Captions to embeddings, each distinct one once, into files that wait for their shards."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from flux2_ds.config.model_spec import TEXT_TOKENS, Spec
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.shards import ShardReader, pack_text, unpack_text
from flux2_ds.errors import UserError
from flux2_ds.model.text_encoder import TextEncoder
from flux2_ds.prepare.folder import text_weights
from flux2_ds.prepare.manifest import Manifest, caption_digest
from flux2_ds.run.atomic import atomic_path


class CaptionFiles:
    """The embeddings of captions, one file each, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, caption: str) -> bool:
        """Whether the caption has been encoded."""
        return self._path(caption).is_file()

    def read(self, caption: str) -> torch.Tensor:
        """[512, text width]."""
        return unpack_text(load_file(self._path(caption)))

    def write(self, caption: str, embedding: torch.Tensor) -> None:
        """Store an embedding, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._path(caption)) as partial:
            partial.write_bytes(save_tensors(pack_text(embedding)))

    def copy_from_shards(self, captions: set[str], folder: Path, manifests: list[Manifest]) -> None:
        """Take the embeddings of captions that a finished shard holds from there, also of rows that are dropped."""
        wanted = {caption_digest(caption): caption for caption in captions if not self.has(caption)}
        for manifest in manifests:
            places = [
                (number, variant, digest)
                for number, row in enumerate(manifest.rows)
                for variant, digest in enumerate(row.texts.split(","))
                if digest in wanted
            ]
            if not places:
                continue
            reader = ShardReader(folder / manifest.shard.name, manifest.shard)
            for number, variant, digest in places:
                caption = wanted.pop(digest, None)
                if caption is not None:
                    self.write(caption, reader.text(number, variant))

    def _path(self, caption: str) -> Path:
        return self.folder / f"{caption_digest(caption)}.safetensors"


class CaptionEncoder:
    """Encodes batches of captions into files."""

    def __init__(
        self, recipe: Recipe, directory: Path, spec: Spec, files: CaptionFiles, device: torch.device
    ) -> None:
        dtype, quantization = text_precision(recipe)
        self._encoder = TextEncoder(directory, spec, dtype, device, quantization)
        self._directory, self._spec, self._files = directory, spec, files

    def encode(self, captions: list[str]) -> dict[str, int]:
        """Encode one batch; returns the token counts of those over 512."""
        embeddings = self._encoder.encode(captions)
        wanted = (TEXT_TOKENS, self._spec.text_width)
        if embeddings.shape[1:] != wanted:
            raise UserError(
                f"the text encoder in {self._directory} gives embeddings of shape "
                f"{tuple(embeddings.shape[1:])}, the transformer takes {wanted}: they are of "
                "different models."
            )
        for caption, embedding in zip(captions, embeddings, strict=True):
            self._files.write(caption, embedding)
        counts = zip(captions, self._encoder.tokens(captions), strict=True)
        return {caption: count for caption, count in counts if count > TEXT_TOKENS}


def text_precision(recipe: Recipe) -> tuple[torch.dtype, Literal["int8", "nf4"] | None]:
    """The dtype in which captions are encoded, and how the encoder's weights are quantised."""
    weights = text_weights(recipe)
    if weights == "int8" or weights == "nf4":
        return torch.bfloat16, weights
    return (torch.float32 if weights == "fp32" else torch.bfloat16), None
