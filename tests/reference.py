"""diffusers' own pipeline, whole, to compare with."""

from pathlib import Path
from typing import Any

import diffusers
import torch

from flux2_ds.config.model_spec import Spec
from flux2_ds.model.pipeline import load_tokenizer


def load_pipeline(directory: Path, spec: Spec, dtype: torch.dtype) -> Any:
    """By `from_pretrained`, but for the tokenizer: dev's `PixtralProcessor` needs torchvision."""
    pipeline = getattr(diffusers, spec.pipeline).from_pretrained(
        directory, tokenizer=None, dtype=dtype
    )
    pipeline.tokenizer = load_tokenizer(directory, spec)
    return pipeline
