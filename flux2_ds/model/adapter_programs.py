"""What other programs make of an adapter file.

diffusers reads a file itself here. The other programs are described by data from their loaders: which
names they look for, for each linear of their model. Read in ComfyUI (comfy/lora.py, comfy/utils.py,
comfy/weight_adapter), musubi-tuner (utils/lora_utils.py, networks/lora_flux_2.py), ai-toolkit
(toolkit/network_mixins.py, diffusion_models/flux2) and OneTrainer (util/load_lora_util.py), 2026.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import nn

from flux2_ds.config.model_spec import Spec, linear_shapes
from flux2_ds.model import transformer
from flux2_ds.model.adapter_layouts import (
    Adapter,
    Layout,
    Update,
    bfl_place,
)
from flux2_ds.model.merge import BaseWeights, changed_rows

_AB, _DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


@dataclass(frozen=True)
class Program:
    """How a program finds the update of a linear.

    In a name {bfl} is Black Forest Labs' module, {flat} the same with underscores, {name} diffusers'.
    """

    title: str
    names: tuple[str, ...]
    factors: tuple[tuple[str, str], ...]
    alpha: bool
    """Multiplies by alpha / rank, where a file has an alpha; otherwise the file's alpha is passed over."""
    dora: str | None = None
    """The tensor of a DoRA that it reads."""


PROGRAMS = (
    Program(
        "ComfyUI",
        ("diffusion_model.{bfl}", "lora_unet_{flat}", "transformer.{name}", "{name}"),
        (_DOWN_UP, _AB),
        alpha=True,
        dora="dora_scale",
    ),
    Program("musubi-tuner", ("lora_unet_{flat}",), (_DOWN_UP,), alpha=True),
    Program("ai-toolkit", ("diffusion_model.{bfl}", "transformer.{bfl}"), (_AB,), alpha=False),
    Program(
        "OneTrainer",
        ("transformer.{name}",),
        (_AB, _DOWN_UP),
        alpha=True,
        dora="lora_magnitude_vector.weight",
    ),
)


CHECKED: dict[tuple[Layout, bool], tuple[str, ...]] = {
    ("diffusers", False): ("diffusers", "ComfyUI", "OneTrainer"),
    ("bfl", False): ("ComfyUI", "diffusers", "ai-toolkit"),
    ("kohya", False): ("musubi-tuner", "ComfyUI", "diffusers"),
    ("diffusers", True): ("diffusers", "OneTrainer"),
    ("bfl", True): ("ComfyUI",),
}
"""Layout, and whether it is a DoRA -> the programs that load all of the file."""


@dataclass
class Reading:
    """An adapter as a program has it after loading."""

    adapter: Adapter = field(default_factory=dict)
    dora_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    """ComfyUI's [N] of each linear."""
    ignored: list[str] = field(default_factory=list)
    """Names in the file that it does not look for."""


def read_as(program: Program, tensors: dict[str, torch.Tensor], spec: Spec) -> Reading:
    """What a program described by data loads."""
    reading, used = Reading(), set()
    for name, (rows, _) in linear_shapes(spec).items():
        place = bfl_place(name)
        titles = {"bfl": place.module, "flat": place.module.replace(".", "_"), "name": name}
        for pattern in program.names:
            key = pattern.format(**titles)
            found = [
                f for f in program.factors if {f"{key}.{f[0]}", f"{key}.{f[1]}"} <= tensors.keys()
            ]
            if not found:
                continue
            down, up = (tensors[f"{key}.{factor}"].float() for factor in found[0])
            used |= {f"{key}.{factor}" for factor in found[0]} | {f"{key}.alpha"}
            if program.alpha and f"{key}.alpha" in tensors:
                down = down * (tensors[f"{key}.alpha"].item() / down.shape[0])
            # A name with Black Forest Labs' module has q, k and v one below the other.
            fused = "{name}" not in pattern
            part = slice(place.part * rows, (place.part + 1) * rows) if fused else slice(None)
            magnitude = None
            if program.dora and f"{key}.{program.dora}" in tensors:
                used.add(f"{key}.{program.dora}")
                vector = tensors[f"{key}.{program.dora}"].float().flatten()[part]
                if program.dora == "dora_scale":
                    reading.dora_scales[name] = vector
                else:
                    magnitude = vector
            reading.adapter[name] = Update(down, up[part], magnitude)
    reading.ignored = sorted(tensors.keys() - used)
    return reading


def read_by_diffusers(path: Path, spec: Spec) -> Reading:
    """What diffusers' own loader makes of a file, in a model of this size without its weights."""
    tensors, metadata = getattr(diffusers, spec.pipeline).lora_state_dict(
        str(path), return_lora_metadata=True
    )
    model = _hollow_transformer(spec)
    load: Any = model.load_lora_adapter
    load(tensors, metadata=metadata, adapter_name="file", low_cpu_mem_usage=True)
    reading = Reading()
    for name, module in model.named_modules():
        layer: Any = module  # PEFT's
        if "file" not in getattr(layer, "lora_A", ()):
            continue
        down, up = layer.lora_A["file"].weight, layer.lora_B["file"].weight
        magnitude = None
        if "file" in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector["file"].weight.detach()
        if any(tensor.is_meta for tensor in (down, up, magnitude) if tensor is not None):
            reading.ignored.append(name)  # made for a module, but not filled
            continue
        reading.adapter[name] = Update(
            down.detach() * layer.scaling["file"], up.detach(), magnitude
        )
    return reading


def _hollow_transformer(spec: Spec) -> nn.Module:
    """A transformer whose linears have one element each, seen as [N, K]."""
    # PEFT puts what it loads where the base's weight is, and drops it if that is the meta device.
    with torch.device("meta"):
        model = transformer.new_transformer(spec)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = torch.zeros(1).expand(module.weight.shape)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def read_with(title: str, path: Path, spec: Spec) -> Reading:
    """What the program `title` makes of a file."""
    if title == "diffusers":
        return read_by_diffusers(path, spec)
    (program,) = (program for program in PROGRAMS if program.title == title)
    return read_as(program, load_file(path), spec)


def largest_error(reading: Reading, adapter: Adapter, base: BaseWeights | None = None) -> float:
    """Of all linears that training changed: ‖ΔW found - ΔW‖ / ‖ΔW‖; infinite if something is not loaded.

    `base`: of a DoRA read by ComfyUI, which multiplies the base's own rows.
    """
    if reading.ignored or adapter.keys() - reading.adapter.keys():
        return math.inf
    errors = []
    for name, found in reading.adapter.items():
        # Where q is adapted and k is not, their one module of Black Forest Labs' changes k by zero.
        update = adapter.get(name, Update(found.down[:0], found.up[:, :0]))
        if name in reading.dora_scales and base is not None:
            errors.append(_weight_error(base, name, found, reading.dora_scales[name], update))
        elif update.magnitude is None or found.magnitude is not None:
            errors.append(_update_error(found, update))
        else:
            errors.append(math.inf)
    return max(errors)


def _update_error(found: Update, update: Update) -> float:
    """Without a matrix of the weight's size: ‖[B₁ -B₂][A₁; A₂]‖ by the triangles of two QRs."""
    ups = torch.cat([found.up.double(), -update.up.double()], dim=1)
    downs = torch.cat([found.down.double(), update.down.double()])
    error = _relative(
        _product_norm(ups, downs), _product_norm(update.up.double(), update.down.double())
    )
    if update.magnitude is not None and found.magnitude is not None:
        distance = (found.magnitude.double() - update.magnitude.double()).norm().item()
        error = max(error, _relative(distance, update.magnitude.double().norm().item()))
    return error


def _product_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    (_, left), (_, right) = torch.linalg.qr(up, "r"), torch.linalg.qr(down.t(), "r")
    return torch.linalg.norm(left @ right.t()).item()


def _weight_error(
    base: BaseWeights, name: str, found: Update, scale: torch.Tensor, update: Update
) -> float:
    """Of a DoRA with ComfyUI's arithmetic: (W + ΔW)·dora_scale/(‖W‖ + ε).

    Relative to a hundredth of W, if the update is smaller: it is a difference of weights in fp32.
    """
    distance = size = whole = 0.0
    for rows, weight in base.rows(name):
        gain = scale[rows] / (weight.norm(dim=1) + torch.finfo(torch.float32).eps)
        there = changed_rows(weight, found._replace(magnitude=None), rows) * gain[:, None]
        here = changed_rows(weight, update, rows)
        distance += (there - here).double().square().sum().item()
        size += (here - weight).double().square().sum().item()
        whole += weight.double().square().sum().item()
    return _relative(math.sqrt(distance), max(math.sqrt(size), math.sqrt(whole) / 100))


def _relative(distance: float, size: float) -> float:
    return distance / size if size else (math.inf if distance else 0.0)
