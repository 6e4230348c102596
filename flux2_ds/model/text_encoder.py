"""Captions to token ids and embeddings, by the pipeline's own `encode_prompt`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, Literal

import diffusers
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import nn

from flux2_ds.config.model_spec import Spec
from flux2_ds.model.pipeline import load_text_pipeline, load_tokenizer, loading

_TEMPLATE_LIMIT = 10.0  # s for a chat template, which is a program of the model's author


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise a `TimeoutError` in the block after so long. For the main thread."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
        with loading(directory / "tokenizer"), time_limit(_TEMPLATE_LIMIT):
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


@dataclass(frozen=True)
class Prompt:
    """A caption as the text encoder reads it.

    `ids`: token ids without padding, template included. `text`: what they decode to. `length`: with
    padding. `padding`: the side it is on. `layers`: indices of the hidden states that are stacked.
    """

    ids: list[int]
    text: str
    length: int
    padding: str
    layers: list[int]


def read_prompt(directory: Path, spec: Spec, caption: str) -> Prompt:
    """Read what the pipeline's `encode_prompt` asks of its text encoder, here a stand-in."""
    encoder, tokenizer = _StandIn(), load_tokenizer(directory, spec)
    absent = {"transformer": None, "vae": None, "scheduler": None}
    pipeline = getattr(diffusers, spec.pipeline)(
        text_encoder=encoder, tokenizer=tokenizer, **absent
    )
    with loading(directory / "tokenizer"), time_limit(_TEMPLATE_LIMIT):
        pipeline.encode_prompt(caption)
    row, seen = encoder.given["input_ids"][0], encoder.given["attention_mask"][0].bool()
    ids = row[seen].tolist()
    return Prompt(ids, tokenizer.decode(ids), len(row), tokenizer.padding_side, encoder.layers)


class _StandIn(nn.Module):
    """Has the hidden states of a text encoder, of width 1 and empty."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, torch.Tensor] = {}
        self.layers: list[int] = []

    def forward(self, **given: Any) -> SimpleNamespace:
        self.given = given
        return SimpleNamespace(hidden_states=self)

    def __getitem__(self, layer: int) -> torch.Tensor:
        self.layers.append(layer)
        return torch.zeros(*self.given["input_ids"].shape, 1)
