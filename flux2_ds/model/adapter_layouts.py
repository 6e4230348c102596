"""An adapter's tensors under the names of other programs.

Three layouts of the same update. `diffusers`: a pair for each linear of diffusers' model. `bfl`: Black
Forest Labs' names, in which q, k and v of a double block are one linear. `kohya`: the same, with
underscores and with the factors called down and up.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import torch

Layout = Literal["diffusers", "bfl", "kohya"]

BFL_DOUBLE = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.to_out.0": ("img_attn.proj", 0),
    "attn.to_add_out": ("txt_attn.proj", 0),
    "ff.linear_in": ("img_mlp.0", 0),
    "ff.linear_out": ("img_mlp.2", 0),
    "ff_context.linear_in": ("txt_mlp.0", 0),
    "ff_context.linear_out": ("txt_mlp.2", 0),
}
BFL_SINGLE = {"attn.to_qkv_mlp_proj": ("linear1", 0), "attn.to_out": ("linear2", 0)}
"""Linear of a block -> Black Forest Labs' linear, and which part of its rows it is."""
_FUSED = 3
"""Linears in a `qkv`."""


class Update(NamedTuple):
    """The change of one linear W [N, K]: ΔW = up · down, with nothing left to scale.

    With a magnitude (DoRA) W becomes m ∘ (W + ΔW) / ‖W + ΔW‖, by rows.
    """

    down: torch.Tensor
    """[r, K]."""
    up: torch.Tensor
    """[N, r]."""
    magnitude: torch.Tensor | None = None
    """m [N]."""


Adapter = dict[str, Update]
"""By diffusers' name of the linear."""


class Place(NamedTuple):
    """Where a linear of diffusers' is in Black Forest Labs' model."""

    module: str
    part: int
    parts: int


def bfl_place(name: str) -> Place:
    """The place of a block's linear, e.g. `transformer_blocks.0.attn.to_k`."""
    single, block, linear = re.fullmatch(
        r"(single_)?transformer_blocks\.(\d+)\.(.+)", name
    ).groups()  # type: ignore[union-attr]
    inner, part = (BFL_SINGLE if single else BFL_DOUBLE)[linear]
    kind = "single" if single else "double"
    parts = _FUSED if inner.endswith("qkv") else 1
    return Place(f"{kind}_blocks.{block}.{inner}", part, parts)


def diffusers_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """For diffusers' `load_lora_weights`; DoRA's m as PEFT has it."""
    tensors = {}
    for name, update in adapter.items():
        tensors[f"transformer.{name}.lora_A.weight"] = update.down
        tensors[f"transformer.{name}.lora_B.weight"] = update.up
        if update.magnitude is not None:
            tensors[f"transformer.{name}.lora_magnitude_vector.weight"] = update.magnitude
    return tensors


def bfl_tensors(
    adapter: Adapter, dora_scales: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """For ComfyUI. No `alpha`, which diffusers refuses beside these names: without one the strength is 1.

    `dora_scales`: [N, 1] of each linear of a DoRA; see `merge.dora_scale`.
    """
    tensors = {}
    for module, parts in _modules(adapter).items():
        down, up = _fuse([adapter.get(name) for name in parts])
        tensors[f"diffusion_model.{module}.lora_A.weight"] = down
        tensors[f"diffusion_model.{module}.lora_B.weight"] = up
        if dora_scales is not None:
            scales = [dora_scales[name] for name in parts]
            tensors[f"diffusion_model.{module}.dora_scale"] = torch.cat(scales)
    return tensors


def kohya_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """For musubi-tuner and other descendants of kohya's scripts; alpha is the rank."""
    tensors = {}
    for module, parts in _modules(adapter).items():
        down, up = _fuse([adapter.get(name) for name in parts])
        flat = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def parts_of(module: str) -> list[str]:
    """Diffusers' names of the linears that one of Black Forest Labs' holds, in the order of their rows."""
    kind, block, inner = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module).groups()  # type: ignore[union-attr]
    table = BFL_SINGLE if kind == "single" else BFL_DOUBLE
    prefix = f"{'single_' if kind == 'single' else ''}transformer_blocks.{block}"
    return [f"{prefix}.{linear}" for linear, (name, _) in table.items() if name == inner]


def _modules(adapter: Adapter) -> dict[str, list[str]]:
    """Black Forest Labs' linears that an adapter changes -> the linears of diffusers' in them."""
    modules = dict.fromkeys(bfl_place(name).module for name in adapter)
    return {module: parts_of(module) for module in modules}


def _fuse(parts: list[Update | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of linears that lie one below the other in one: A = cat(A_i), B = block-diagonal(B_i)."""
    present = [update for update in parts if update is not None]
    nothing = present[0].up.new_zeros(present[0].up.shape[0], 0)
    down = torch.cat([update.down for update in present])
    up = torch.block_diag(*(nothing if part is None else part.up for part in parts))
    return down, up
