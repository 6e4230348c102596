"""An adapter's tensors under the names of other programs.

Three layouts of the same update. `diffusers`: a pair for each linear of diffusers' model. `bfl`: Black
Forest Labs' names, in which q, k and v of a double block are one linear. `kohya`: the same, with
underscores and with the factors called down and up.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from flux2_ds.config.adapter_file import bfl_place, parts_of

Layout = Literal["diffusers", "bfl", "kohya"]


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


def difference(update: Update, began: Update) -> Update:
    """The change of W + ΔW, where `began` was taken out of W: of twice the rank."""
    return Update(torch.cat([update.down, began.down]), torch.cat([update.up, -began.up], dim=1))


def of_lower_rank(update: Update, rank: int) -> tuple[Update, float]:
    """The nearest update of at most this rank, and ‖ΔW' - ΔW‖ / ‖ΔW‖: its singular values from the first on
    (Eckart and Young, 1936), from the triangles of two QRs instead of a matrix of the weight's size."""
    (left, rest), (right, other) = (
        torch.linalg.qr(factor.double()) for factor in (update.up, update.down.t())
    )
    u, s, vt = torch.linalg.svd(rest @ other.t())
    root = s[:rank].sqrt()
    up, down = left @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ right.t()
    size = s.norm().item()
    lost = s[rank:].norm().item() / size if size else 0.0
    return Update(down.float(), up.float()), lost


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
