"""What the text encoder is given for a caption, asked of the pipeline itself, without the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from flux2_ds.model.pipeline import load_tokenizer
from flux2_ds.spec import Spec


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
    """Let the pipeline's `encode_prompt` call a stand-in that notes what it is asked for."""
    encoder, tokenizer = _StandIn(), load_tokenizer(directory, spec)
    absent = {"transformer": None, "vae": None, "scheduler": None}
    pipeline = getattr(diffusers, spec.pipeline)(
        text_encoder=encoder, tokenizer=tokenizer, **absent
    )
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
