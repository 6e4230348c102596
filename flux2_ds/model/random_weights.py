"""A transformer of true shapes without files: on the meta device, or with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from flux2_ds.model import transformer
from flux2_ds.model.weights import place_weight
from flux2_ds.spec import Spec


def fill_randomly(
    model: Flux2Transformer2DModel,
    dtype: torch.dtype,
    base_weights: str | None,
    device: torch.device,
    divide: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give an empty transformer random weights, quantised and divided one by one.

    They are the same in every process, as those of a file would be.
    """
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        weight = torch.ones(parameter.shape, device=device, dtype=dtype)
        if weight.ndim > 1:
            weight.normal_(0, 1 / math.sqrt(weight.shape[1]), generator=generator)
        module = place_weight(model, name, weight, base_weights)
        if divide is not None:
            divide(module)


def empty_transformer(spec: Spec) -> Flux2Transformer2DModel:
    """A transformer of the spec's shapes on the meta device."""
    with torch.device("meta"), no_init_weights():
        return transformer.new_transformer(spec)
