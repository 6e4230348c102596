"""Captions to embeddings, by the pipeline's own `encode_prompt`.

Template, system message, length, padding side and the stacked hidden states are the pipeline's; we
pass none of them, so that they cannot differ from inference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input

from flux2_ds.model.pipeline import load_text_pipeline
from flux2_ds.spec import Spec


class TextEncoder:
    """The text half of a FLUX.2 pipeline, without transformer and VAE."""

    def __init__(
        self,
        directory: Path,
        spec: Spec,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Literal["int8", "nf4"] | None = None,
    ) -> None:
        self._pipeline = load_text_pipeline(directory, spec, dtype, device, quantization)
        self._device = device
        self._dtype = dtype
        self._template_tokens = self._count_template(spec)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        """[len(captions), 512, text width], in the encoder's dtype, on the CPU."""
        embeddings, _ = self._pipeline.encode_prompt(captions, device=self._device)
        return embeddings.to("cpu", self._dtype)

    def tokens(self, captions: list[str]) -> list[int]:
        """Number of tokens of each prompt, template included, before `encode` cuts it to 512."""
        ids = self._pipeline.tokenizer(captions, add_special_tokens=False)["input_ids"]
        return [self._template_tokens + len(row) for row in ids]

    def _count_template(self, spec: Spec) -> int:
        """Tokens of the prompt around an empty caption; special tokens keep the two apart."""
        tokenizer = self._pipeline.tokenizer
        if spec.variant == "dev":
            messages = format_input([""], system_message=self._pipeline.system_message)[0]
            options = {"add_generation_prompt": False}
        else:
            messages = [{"role": "user", "content": ""}]
            options = {"add_generation_prompt": True, "enable_thinking": False}
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
