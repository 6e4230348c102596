"""Captions to embeddings, by the pipeline's own `encode_prompt`.

Template, system message, length, padding side and the stacked hidden states are the pipeline's; we
pass none of them, so that they cannot differ from inference.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flux2_ds.model.pipeline import load_text_pipeline
from flux2_ds.spec import Spec


class TextEncoder:
    """The text half of a FLUX.2 pipeline, without transformer and VAE."""

    def __init__(
        self, directory: Path, spec: Spec, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._pipeline = load_text_pipeline(directory, spec, dtype).to(device)
        self._device = device

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        """[len(captions), 512, text width], in the encoder's dtype, on the CPU."""
        embeddings, _ = self._pipeline.encode_prompt(captions, device=self._device)
        return embeddings.cpu()
