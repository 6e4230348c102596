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
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from flux2_ds.config.adapter import adapted_linears, merges
from flux2_ds.config.adapter_file import (
    AB,
    DOWN_UP,
    LOHA,
    LOKR,
    MAGNITUDE,
    NAMES,
    find_factors,
    settings_of_file,
)
from flux2_ds.config.model_spec import Spec, linear_shapes
from flux2_ds.config.recipe import Lora
from flux2_ds.errors import UserError
from flux2_ds.model import transformer
from flux2_ds.model.adapter_layouts import (
    Adapter,
    Change,
    Kronecker,
    Layout,
    Update,
    all_tensors,
    change_of,
    change_rows,
    change_shape,
    multiplied,
)
from flux2_ds.model.merge import ELEMENTS, BaseWeights, Merges, changed_rows
from flux2_ds.model.safetensors_file import check_file


@dataclass(frozen=True)
class Program:
    """How a program finds the update of a linear; see `find_factors`."""

    title: str
    names: tuple[str, ...]
    kinds: tuple[tuple[str, ...], ...]
    alpha: bool
    """Multiplies by alpha / rank, where a file has an alpha; otherwise the file's alpha is passed over."""
    dora: str | None = None
    """The tensor of a DoRA that it reads."""


PROGRAMS = (
    Program(
        "ComfyUI",
        (
            "diffusion_model.{bfl}",
            "lora_unet_{flat}",
            "transformer.{name}",
            "{name}",
            "lycoris_{dashed}",
        ),
        (DOWN_UP, AB, LOHA, *LOKR),
        alpha=True,
        dora="dora_scale",
    ),
    Program(
        "musubi-tuner",
        ("lora_unet_{flat}",),
        (DOWN_UP, LOHA, ("lokr_w1", "lokr_w2"), ("lokr_w1", "lokr_w2_a", "lokr_w2_b")),
        alpha=True,
    ),
    Program("ai-toolkit", ("diffusion_model.{bfl}", "transformer.{bfl}"), (AB,), alpha=False),
    Program(
        "OneTrainer",
        ("transformer.{name}", "lycoris_{dashed}"),
        (AB, DOWN_UP, LOHA, *LOKR),
        alpha=True,
        dora="lora_magnitude_vector.weight",
    ),
)


CHECKED: dict[tuple[Layout, str], tuple[str, ...]] = {
    ("diffusers", "lora"): ("diffusers", "ComfyUI", "OneTrainer"),
    ("bfl", "lora"): ("ComfyUI", "diffusers", "ai-toolkit"),
    ("kohya", "lora"): ("musubi-tuner", "ComfyUI", "diffusers"),
    ("diffusers", "dora"): ("diffusers", "OneTrainer"),
    ("bfl", "dora"): ("ComfyUI",),
    ("lycoris", "lokr"): ("ComfyUI", "diffusers", "OneTrainer"),
    ("kohya", "lokr"): ("musubi-tuner", "ComfyUI"),
    ("lycoris", "loha"): ("ComfyUI", "OneTrainer"),
    ("kohya", "loha"): ("musubi-tuner", "ComfyUI"),
}
"""Layout and method -> the programs that load all of the file."""


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
    for each in find_factors(tensors, spec, program.names, program.kinds):
        alpha, dora = f"{each.key}.alpha", f"{each.key}.{program.dora}"
        used |= {alpha}.union(*each.matrices)
        magnitude = None
        if program.dora and dora in tensors:
            used.add(dora)
            vector = tensors[dora].float().flatten()[each.rows]
            if program.dora == "dora_scale":
                reading.dora_scales[each.name] = vector
            else:
                magnitude = vector
        change = change_of(each, tensors, magnitude)
        product = each.matrices[-1]
        if program.alpha and alpha in tensors and len(product) > 1:  # a full matrix is not scaled
            change = multiplied(change, tensors[alpha].item() / tensors[product[1]].shape[0])
        reading.adapter[each.name] = change
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
        if not isinstance(layer, BaseTunerLayer):
            continue
        held = {
            end: getattr(parameters["file"], "weight", parameters["file"]).detach()
            for end in layer.adapter_layer_names
            if "file" in (parameters := getattr(layer, end))
        }
        if any(tensor.is_meta for tensor in held.values()):
            reading.ignored.append(name)  # made for a module, but not filled
        elif "lora_A" in held:
            reading.adapter[name] = Update(
                held["lora_A"] * layer.scaling["file"],
                held["lora_B"],
                held.get("lora_magnitude_vector"),
            )
        else:
            w1 = held.get("lokr_w1")
            w1 = held["lokr_w1_a"] @ held["lokr_w1_b"] if w1 is None else w1
            w2 = tuple(tensor for end, tensor in held.items() if end.startswith("lokr_w2"))
            reading.adapter[name] = Kronecker(w1 * layer.scaling["file"], w2)
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


def read_adapter(path: Path, spec: Spec) -> Adapter:
    """An adapter file, as diffusers reads it; refused if it is damaged or not one of this model."""
    shapes = linear_shapes(spec)
    try:
        check_file(path)  # diffusers reads pickles, too
        with safe_open(path, framework="pt") as file:
            if any(".hada_" in name for name in file.keys()):  # noqa: SIM118
                return read_file("--adapter", str(path), spec)  # diffusers reads no LoHa
        reading = read_by_diffusers(path, spec)
    except UserError:
        raise
    except Exception as error:  # whatever diffusers does with a file that is none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be used as an adapter of {spec} ({reason}). Export it again, or name another file."
        ) from error
    wrong = [f"it has nothing for {name}" for name in reading.ignored]
    for name, change in reading.adapter.items():
        if change_shape(change) != shapes.get(name):
            wrong.append(f"{name} has another shape")
        if not all(tensor.isfinite().all() for tensor in all_tensors(change)):
            wrong.append(f"{name} is not finite")
    if wrong or not reading.adapter:
        reason = wrong[0] if wrong else "it adapts no linear"
        raise UserError(
            f"{path} cannot be used as an adapter of {spec} ({reason}). Export it again, or name another file."
        )
    return reading.adapter


_OURS = Program("flux2-ds", NAMES, (AB, DOWN_UP, LOHA, *LOKR), alpha=False, dora=MAGNITUDE)


def read_file(setting: str, path: str, spec: Spec) -> Adapter:
    """An adapter file that `setting` names, every tensor of which is used. Refuses numbers that are not finite."""
    settings, _, scaled = settings_of_file(setting, path, spec)
    try:
        check_file(Path(path))
    except (ValueError, OSError) as error:
        raise UserError(f"{setting} {path} is damaged ({error}). Name another file.") from error
    reading = read_as(_OURS, load_file(path), spec).adapter
    adapter = {}
    for name, linear in adapted_linears(spec, settings).items():
        if not all(tensor.isfinite().all() for tensor in all_tensors(reading[name])):
            raise UserError(f"{setting} {path}: {name} is not finite. Name another file.")
        adapter[name] = reading[name] if scaled else multiplied(reading[name], linear.scale)
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
        update = adapter.get(name)
        if not isinstance(found, Update):
            errors.append(_rows_error(found, update))
            continue
        update = update or Update(found.down[:0], found.up[:, :0])
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


def _rows_error(found: Change, change: Change | None) -> float:
    """Of a LoKr or LoHa, some rows of the weight's size at a time."""
    count, width = change_shape(found)
    step = max(1, ELEMENTS // width)
    distance = size = 0.0
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        there = change_rows(found, rows).double()
        here = torch.zeros_like(there) if change is None else change_rows(change, rows).double()
        distance += (there - here).square().sum().item()
        size += here.square().sum().item()
    return _relative(math.sqrt(distance), math.sqrt(size))


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
