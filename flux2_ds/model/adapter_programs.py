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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from flux2_ds.config.adapter import adapted_linears, merges
from flux2_ds.config.adapter_file import AB, DOWN_UP, MAGNITUDE, NAMES, find_pairs, settings_of_file
from flux2_ds.config.model_spec import Spec, linear_shapes
from flux2_ds.config.recipe import Lora
from flux2_ds.errors import UserError
from flux2_ds.model import transformer
from flux2_ds.model.adapter_layouts import (
    Adapter,
    Layout,
    Update,
)
from flux2_ds.model.merge import BaseWeights, Merges, changed_rows
from flux2_ds.model.safetensors_file import stored_digest


@dataclass(frozen=True)
class Program:
    """How a program finds the update of a linear; see `find_pairs`."""

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
        (DOWN_UP, AB),
        alpha=True,
        dora="dora_scale",
    ),
    Program("musubi-tuner", ("lora_unet_{flat}",), (DOWN_UP,), alpha=True),
    Program("ai-toolkit", ("diffusion_model.{bfl}", "transformer.{bfl}"), (AB,), alpha=False),
    Program(
        "OneTrainer",
        ("transformer.{name}",),
        (AB, DOWN_UP),
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
    for pair in find_pairs(tensors, spec, program.names, program.factors):
        down, up = tensors[pair.down].float(), tensors[pair.up].float()
        alpha, dora = f"{pair.key}.alpha", f"{pair.key}.{program.dora}"
        used |= {pair.down, pair.up, alpha}
        if program.alpha and alpha in tensors:
            down = down * (tensors[alpha].item() / down.shape[0])
        magnitude = None
        if program.dora and dora in tensors:
            used.add(dora)
            vector = tensors[dora].float().flatten()[pair.rows]
            if program.dora == "dora_scale":
                reading.dora_scales[pair.name] = vector
            else:
                magnitude = vector
        reading.adapter[pair.name] = Update(down, up[pair.rows], magnitude)
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


def _check_digest(path: Path) -> None:
    """Refuse a file of flux2-ds whose tensors are not those that were written."""
    with safe_open(path, framework="pt") as file:
        told = file.metadata() or {}
    digest = told.get("modelspec.hash_sha256")
    if "flux2_ds.checked_for" in told and digest != f"0x{stored_digest(path)}":
        raise ValueError("it does not have its sha256")


def read_adapter(path: Path, spec: Spec) -> Adapter:
    """An adapter file, as diffusers reads it; refused if it is damaged or not one of this model."""
    shapes = linear_shapes(spec)
    try:
        _check_digest(path)  # diffusers reads pickles, too
        reading = read_by_diffusers(path, spec)
    except Exception as error:  # whatever diffusers does with a file that is none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be used as an adapter of {spec} ({reason}). Export it again, or name another file."
        ) from error
    wrong = [f"it has nothing for {name}" for name in reading.ignored]
    for name, (down, up, magnitude) in reading.adapter.items():
        rows, columns = shapes.get(name, (0, 0))
        if (up.shape[0], down.shape[1]) != (rows, columns) or up.shape[1] != down.shape[0]:
            wrong.append(f"{name} has another shape")
        if not all(x.isfinite().all() for x in (down, up, magnitude) if x is not None):
            wrong.append(f"{name} is not finite")
    if wrong or not reading.adapter:
        reason = wrong[0] if wrong else "it adapts no linear"
        raise UserError(
            f"{path} cannot be used as an adapter of {spec} ({reason}). Export it again, or name another file."
        )
    return reading.adapter


_OURS = Program("flux2-ds", NAMES, (AB, DOWN_UP), alpha=False, dora=MAGNITUDE)


def read_file(setting: str, path: str, spec: Spec) -> Adapter:
    """An adapter file that `setting` names, every tensor of which is used.

    Raises:
        UserError: as `settings_of_file`; a number that is not finite.
    """
    settings, _, scaled = settings_of_file(setting, path, spec)
    try:
        _check_digest(Path(path))
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{setting} {path} is damaged ({error}). Name another file.") from error
    reading = read_as(_OURS, load_file(path), spec).adapter
    adapter = {}
    for name, linear in adapted_linears(spec, settings).items():
        update = reading[name]
        if not all(x.isfinite().all() for x in update if x is not None):
            raise UserError(f"{setting} {path}: {name} is not finite. Name another file.")
        adapter[name] = update if scaled else update._replace(down=update.down * linear.scale)
    return adapter


def read_merges(settings: Lora, spec: Spec) -> Merges:
    """The adapters of `lora.merge_first`."""
    return [
        (read_file("lora.merge_first", path, spec), strength) for path, strength in merges(settings)
    ]


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
