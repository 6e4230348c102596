"""A base's weights with an adapter in them, in fp32 and a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from flux2_ds.config.adapter import adapted_linears
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Lora
from flux2_ds.errors import UserError
from flux2_ds.model.adapter_layouts import Adapter, Change, Update, change_rows
from flux2_ds.model.load import Edit, open_file, tensor_files

ELEMENTS = 1 << 25
"""Of a weight that are in memory at once: 128 MiB in fp32."""


Merges = Sequence[tuple[Adapter, float]]
"""Adapters that are part of the base, and their strengths."""


def merge_into(merges: Merges) -> Edit:
    """A function that puts adapters into the weights of a base, one after the other, in fp32."""

    def edit(name: str, weight: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        updates = [(adapter[linear], strength) for adapter, strength in merges if linear in adapter]
        if not updates:
            return weight.to(dtype)
        merged = weight.new_empty(weight.shape, dtype=dtype)
        step = max(1, ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            part = weight[start : start + step].float()
            rows = slice(first + start, first + start + part.shape[0])
            for update, strength in updates:
                part = torch.lerp(part, changed_rows(part, update, rows), strength)
            merged[start : start + step] = part
        return merged

    return edit


def initial_adapter(base: BaseWeights, spec: Spec, settings: Lora, device: torch.device) -> Adapter:
    """What `lora.init` lets an adapter begin as, from the base's own weights.

    PiSSA (arXiv 2404.02948): the largest r singular values S of W, A = √(S/s)·Vᵀ, B = U·√(S/s) with the scale s,
    by randomized subspace iteration, as PEFT's `pissa_niter_16`. OLoRA (arXiv 2406.01775): of W = QR, B = the first
    r columns of Q, A = the first r rows of R.
    """
    adapter = {}
    for name, linear in adapted_linears(spec, settings).items():
        weight = torch.cat([rows.to(device) for _, rows in base.rows(name)])
        rank = linear.rank
        if rank > min(weight.shape):
            raise UserError(
                f"lora.init is {settings.init}, and {name} {list(weight.shape)} has no rank {rank}. Lower lora.rank."
            )
        if settings.init == "pissa":
            wide = min(
                2 * rank + 8, *weight.shape
            )  # values that are not kept sharpen those that are
            u, s, v = (x[..., :rank] for x in torch.svd_lowrank(weight, q=wide, niter=16))
            up, down = u * (s / linear.scale).sqrt(), (v * (s * linear.scale).sqrt()).t()
        else:
            up, _ = torch.linalg.qr(weight[:, :rank])
            down = linear.scale * up.t() @ weight
        adapter[name] = Update(down.contiguous().cpu(), up.contiguous().cpu())
    return adapter


class BaseWeights:
    """A transformer's weights in its files, with `merges` in them."""

    def __init__(self, directory: Path, merges: Merges = ()) -> None:
        self.directory = directory
        self._merge = merge_into(merges)
        self._files = tensor_files(directory)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights, by name."""
        shapes = {}
        for name, path in self._files.items():
            with open_file(path) as file:
                shapes[name] = tuple(file.get_slice(name).get_shape())
        return shapes

    def merged(self, name: str, adapter: Adapter) -> torch.Tensor:
        """The weight `name` in fp32, with the adapter's update if it has one for it."""
        update = adapter.get(name.removesuffix(".weight"))
        if update is None:
            with open_file(self._files[name]) as file:
                return self._merge(name, file.get_tensor(name), 0, torch.float32)
        chunks = self.rows(name.removesuffix(".weight"))
        return torch.cat([changed_rows(weight, update, rows) for rows, weight in chunks])

    def rows(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some rows of the linear `name` [N, K] after the others, in fp32, and which they are."""
        key = f"{name}.weight"
        if key not in self._files:
            raise UserError(
                f"{self.directory} has no {key}. model.path is not the model of this adapter; correct it."
            )
        # Opened anew for each tensor: pages of the file stay resident only while it is open.
        with open_file(self._files[key]) as file:
            stored = file.get_slice(key)
            count, width = stored.get_shape()
            step = max(1, ELEMENTS // width)
            for start in range(0, count, step):
                rows = slice(start, min(start + step, count))
                yield rows, self._merge(key, stored[rows], start, torch.float32)


def changed_rows(weight: torch.Tensor, update: Change, rows: slice) -> torch.Tensor:
    """Rows of W with the update in them, from these rows of W; fp32."""
    if not isinstance(update, Update):
        return weight + change_rows(update, rows).to(weight)
    changed = torch.addmm(weight, update.up[rows].to(weight), update.down.to(weight))
    if update.magnitude is None:
        return changed
    return changed * _gain(changed, update.magnitude[rows].to(weight))[:, None]


def dora_scale(base: BaseWeights, name: str, update: Update | None) -> torch.Tensor:
    """m·‖W‖/‖W + ΔW‖ by rows [N, 1], with which ComfyUI makes (W + ΔW)·dora_scale/(‖W‖ + ε).

    Without an update ‖W‖ + ε, which leaves W as it is.
    """
    scales = []
    for rows, weight in base.rows(name):
        scale = weight.norm(dim=1) + torch.finfo(torch.float32).eps
        if update is not None:
            assert update.magnitude is not None
            changed = torch.addmm(weight, update.up[rows].float(), update.down.float())
            scale *= _gain(changed, update.magnitude[rows].float())
        scales.append(scale)
    return torch.cat(scales)[:, None]


def _gain(changed: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """m/‖W + ΔW‖; 1 for a row of zeros."""
    norm = changed.norm(dim=1)
    return torch.where(norm > 0, magnitude / norm, 1.0)
