"""Captions to embeddings, by the pipeline's own `encode_prompt`.

Template, system message, length, padding side and the stacked hidden states are the pipeline's; we
pass none of them, so that they cannot differ from inference.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch

from flux2_ds.spec import Spec


class TextEncoder:
    """The text half of a FLUX.2 pipeline, without transformer and VAE."""

    def __init__(
        self, directory: Path, spec: Spec, dtype: torch.dtype, device: torch.device
    ) -> None:
        pipeline_class = getattr(diffusers, spec.pipeline)
        self._pipeline = pipeline_class.from_pretrained(
            directory, transformer=None, vae=None, dtype=dtype, use_safetensors=True
        ).to(device)
        self._device = device

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        """[len(captions), 512, text width], in the encoder's dtype, on the CPU."""
        embeddings, _ = self._pipeline.encode_prompt(captions, device=self._device)
        return embeddings.cpu()
