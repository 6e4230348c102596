"""An adapter's tensors under the names of other programs.

Layouts of the same update. `diffusers`: a pair for each linear of diffusers' model; `lycoris`: the same with
underscores, for a LoKr or LoHa. `bfl`: Black Forest Labs' names, in which q, k and v of a double block are one
linear. `kohya`: the same, with underscores and with a LoRA's factors called down and up.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from flux2_ds.config.adapter_file import LOHA, Factors, bfl_place, parts_of
from flux2_ds.errors import UserError

Layout = Literal["diffusers", "bfl", "kohya", "lycoris"]


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


class Kronecker(NamedTuple):
    """LoKr: ΔW [a·b, c·d] = W1 ⊗ W2."""

    w1: torch.Tensor
    """[a, c]."""
    w2: tuple[torch.Tensor, ...]
    """[b, d], or [b, r] and [r, d], whose product it is."""


class Hadamard(NamedTuple):
    """LoHa: ΔW [N, K] = (up₁ · down₁) ∘ (up₂ · down₂)."""

    first: Update
    second: Update


Change = Update | Kronecker | Hadamard
Adapter = dict[str, Any]
"""A `Change` by diffusers' name of the linear; all of one kind."""


def change_of(
    found: Factors, tensors: dict[str, torch.Tensor], magnitude: torch.Tensor | None = None
) -> Change:
    """The update that a linear's tensors make."""
    first, *others = [[tensors[name].float() for name in names] for names in found.matrices]
    if found.method == "lokr":
        return Kronecker(first[0] @ first[1] if len(first) > 1 else first[0], tuple(others[0]))
    products = [Update(down, up[found.rows], magnitude) for up, down in (first, *others)]
    return Hadamard(*products) if others else products[0]


def change_rows(change: Change, rows: slice) -> torch.Tensor:
    """Rows of ΔW in fp32, a DoRA's before its magnitude."""
    if isinstance(change, Update):
        return change.up[rows].float() @ change.down.float()
    if isinstance(change, Hadamard):
        return change_rows(change.first, rows) * change_rows(change.second, rows)
    w1, w2 = change.w1.float(), change.w2[0].float()
    if len(change.w2) > 1:
        w2 = w2 @ change.w2[1].float()
    numbers = torch.arange(len(w1) * len(w2), device=w1.device)[rows]
    left, right = w1[numbers // len(w2)], w2[numbers % len(w2)]
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def change_shape(change: Change) -> tuple[int, int]:
    """Of the linear."""
    if isinstance(change, Kronecker):
        (a, c), b, d = change.w1.shape, change.w2[0].shape[0], change.w2[-1].shape[1]
        return a * b, c * d
    pair = change.first if isinstance(change, Hadamard) else change
    return pair.up.shape[0], pair.down.shape[1]


def change_rank(change: Change) -> int:
    """That an adapter needs to hold it: of a full matrix of a LoKr its longer side."""
    if isinstance(change, Kronecker):
        full = len(change.w2) == 1
        return max(change.w2[0].shape) if full else change.w2[1].shape[0]
    return (change.first if isinstance(change, Hadamard) else change).down.shape[0]


def columns_of(change: Update | Hadamard, ranks: slice) -> Update | Hadamard:
    """The part of an update that some of its ranks make."""
    if isinstance(change, Hadamard):
        return Hadamard(*(Update(each.down[ranks], each.up[:, ranks]) for each in change))
    return change._replace(down=change.down[ranks], up=change.up[:, ranks])


def multiplied(change: Change, factor: float) -> Change:
    """factor · ΔW."""
    if isinstance(change, Kronecker):
        return change._replace(w1=change.w1 * factor)
    if isinstance(change, Hadamard):
        first = change.first._replace(down=change.first.down * factor)
        return change._replace(first=first)
    return change._replace(down=change.down * factor)


def all_tensors(change: Change) -> list[torch.Tensor]:
    """The tensors of an update; of LoKr and LoHa in the order of LyCORIS' names."""
    if isinstance(change, Kronecker):
        return [change.w1, *change.w2]
    if isinstance(change, Hadamard):
        return [t for each in change for t in (each.up, each.down)]
    return [tensor for tensor in change if tensor is not None]


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


def lycoris_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """A LoKr or LoHa for ComfyUI and OneTrainer, a LoKr for diffusers, too; alpha is the rank."""
    tensors: dict[str, torch.Tensor] = {}
    for name, change in adapter.items():
        tensors |= _lycoris(f"lycoris_{name.replace('.', '_')}", change)
    return tensors


def _lycoris(key: str, change: Any) -> dict[str, torch.Tensor]:
    held = all_tensors(change)
    ends: tuple[str, ...] = LOHA if isinstance(change, Hadamard) else ("lokr_w1", "lokr_w2")
    if isinstance(change, Kronecker) and len(held) > len(ends):
        ends = ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
    tensors = {f"{key}.{end}": tensor for end, tensor in zip(ends, held, strict=True)}
    return tensors | {f"{key}.alpha": torch.tensor(float(held[-1].shape[0]))}


def kohya_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """For musubi-tuner and other descendants of kohya's scripts; alpha is the rank."""
    tensors: dict[str, torch.Tensor] = {}
    for module, parts in _modules(adapter).items():
        flat = f"lora_unet_{module.replace('.', '_')}"
        changes = [adapter.get(name) for name in parts]
        (kind,) = {type(change) for change in changes if change is not None}
        if kind is Kronecker:
            if len(parts) > 1:
                raise UserError(
                    "--layout kohya: q, k and v are one linear there, whose update would be no Kronecker product. Export --layout "
                    "lycoris, or --merge true, or train other lora.targets."
                )
            tensors |= _lycoris(flat, changes[0])
            continue
        if kind is Hadamard:
            pairs = (_fuse([change and change[n] for change in changes]) for n in (0, 1))
            tensors |= _lycoris(flat, Hadamard(*(Update(*pair) for pair in pairs)))
            continue
        down, up = _fuse(changes)
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
