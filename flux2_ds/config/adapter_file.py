"""What an adapter file holds, from the names and shapes at its start: layout, linears, ranks, kind. No torch.

Four layouts: diffusers' names; LyCORIS', which are the same with underscores; Black Forest Labs'
(`diffusion_model.`), in which q, k and v of a double block are one linear; and kohya's, the same with underscores.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flux2_ds.config.adapter import ADAPTER_FIELDS, adapted_linears, common_factor, kronecker
from flux2_ds.config.model_spec import TARGETS, Spec, linear_shapes, target_modules
from flux2_ds.config.recipe import Lora
from flux2_ds.errors import MALFORMED, UserError, shown

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

NAMES = ("transformer.{name}", "diffusion_model.{bfl}", "lora_unet_{flat}", "lycoris_{dashed}")
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = tuple(
    (*w1, *w2)
    for w2 in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    for w1 in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
)
"""A linear's tensors: of LoRA in two spellings; W1 and W2 of a LoKr are full matrices or products."""
MAGNITUDE = "lora_magnitude_vector.weight"
_MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""
_FLUX_1 = re.compile(r"ff\.net\.|proj_mlp|_mod[._]lin|modulation[._]lin|norm1[._]linear")
_SCALARS = {"F32": "<f", "F16": "<e", "F64": "<d"}


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


def parts_of(module: str) -> list[str]:
    """Diffusers' names of the linears that one of Black Forest Labs' holds, in the order of their rows."""
    kind, block, inner = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module).groups()  # type: ignore[union-attr]
    table = BFL_SINGLE if kind == "single" else BFL_DOUBLE
    prefix = f"{'single_' if kind == 'single' else ''}transformer_blocks.{block}"
    return [f"{prefix}.{linear}" for linear, (name, _) in table.items() if name == inner]


class Factors(NamedTuple):
    """The tensors of a linear in a file; `rows`: of the update, those that are this linear's."""

    name: str
    key: str
    ends: tuple[str, ...]
    rows: slice
    fused: bool

    @property
    def method(self) -> str:
        """Which kind of adapter it is; a DoRA's factors are a LoRA's."""
        return {"lokr": "lokr", "hada": "loha"}.get(self.ends[0][:4], "lora")

    @property
    def matrices(self) -> list[list[str]]:
        """Of LoRA B·A, of the others W1 and W2: the tensors of which each is the product, or that it is."""
        if self.method == "lora":
            return [[f"{self.key}.{end}" for end in reversed(self.ends)]]
        found: dict[str, list[str]] = {}
        for end in self.ends:
            found.setdefault(end[:7], []).append(f"{self.key}.{end}")
        return list(found.values())

    def shapes(self, tensors: dict[str, _Tensor]) -> list[tuple[int, int]] | None:
        """Of its matrices; None if tensors do not fit together."""
        sides = [[tensors[name].shape for name in names] for names in self.matrices]
        for each in sides:
            if any(len(shape) != 2 for shape in each) or (each[1:] and each[0][1] != each[1][0]):
                return None
        return [(each[0][0], each[-1][1]) for each in sides]

    def rank(self, tensors: dict[str, _Tensor]) -> int | None:
        """The last matrix's, where it is a product."""
        first, *second = self.matrices[-1]
        return tensors[first].shape[1] if second else None


def find_factors(
    keys: Collection[str],
    spec: Spec,
    names: tuple[str, ...] = NAMES,
    kinds: tuple[tuple[str, ...], ...] = (AB, DOWN_UP, LOHA, *LOKR),
) -> Iterator[Factors]:
    """The factors of the linears of a model of this size.

    In `names` {bfl} is Black Forest Labs' module, {name} diffusers'; {flat} and {dashed} the same with underscores.
    """
    known = set(keys)
    for name, (rows, _) in linear_shapes(spec).items():
        place = bfl_place(name)
        titles = {"bfl": place.module, "flat": place.module.replace(".", "_"),
                  "name": name, "dashed": name.replace(".", "_")}  # fmt: skip
        for pattern in names:
            key = pattern.format(**titles)
            fused = ("{bfl}" in pattern or "{flat}" in pattern) and place.parts > 1
            part = slice(place.part * rows, (place.part + 1) * rows) if fused else slice(None)
            for ends in kinds:
                if {f"{key}.{end}" for end in ends} <= known:
                    yield Factors(name, key, ends, part, fused)
                    break


class FileSettings(NamedTuple):
    """What a file decides of a run's adapter."""

    lora: Lora
    method: str
    scaled: bool
    """Its factors are multiplied by the scale already, as flux2-ds writes them."""


def settings_of_file(setting: str, path: str, spec: Spec | None) -> FileSettings:
    """The settings with which a run has the same adapter as a file.

    `setting`: that names the file. `spec`: of the model; without it shapes are not compared.
    Refuses a file that is no adapter of this model.
    """
    tensors, metadata = _header(setting, path)
    blocks = [
        1 + max((int(n) for key in tensors for n in re.findall(pattern, key)), default=-1)
        for pattern in (r"(?:(?<!single_)transformer|double)_blocks[._](\d+)",
                        r"single(?:_transformer)?_blocks[._](\d+)")
    ]  # fmt: skip
    model = spec or Spec("klein", "", blocks[0], blocks[1], 1, 1, 1, guidance=False)
    found = list(find_factors(tensors, model))
    used = {name for each in found for names in each.matrices for name in names}
    used |= {f"{each.key}.{end}" for each in found for end in ("alpha", MAGNITUDE)} & tensors.keys()
    wrong = _wrong(tensors, used, blocks, found, model if spec else None)
    if wrong:
        of = f"of {spec}" if spec else "of FLUX.2"
        raise UserError(f"{setting} {path} is no adapter {of}: {wrong}. Name another file.")
    try:
        return _decided(setting, path, found, tensors, metadata, spec, model)
    except (*MALFORMED, re.error) as error:
        raise UserError(
            f"{setting} {path} has metadata or an alpha that cannot be read ({error!r}). Name another file."
        ) from error


def _decided(
    setting: str,
    path: str,
    found: list[Factors],
    tensors: dict[str, _Tensor],
    metadata: dict[str, str],
    spec: Spec | None,
    model: Spec,
) -> FileSettings:
    """What a file's metadata, alphas and shapes decide. `model`: `spec`, or as large as the file shows."""
    dora = any(f"{each.key}.{MAGNITUDE}" in tensors for each in found)
    method = "dora" if dora else found[0].method
    if "flux2_ds.lora" in metadata:
        trained = json.loads(metadata["flux2_ds.lora"])
        lora = _as_trained(setting, path, trained, found, tensors, model)
        return FileSettings(lora, method, scaled=True)
    sizes = {each.name: each.shapes(tensors) for each in found}
    ranks = {each.name: each.rank(tensors) or max(sizes[each.name][-1]) for each in found}  # type: ignore[index]
    rank = Counter(ranks.values()).most_common(1)[0][0]
    peft = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    alphas: dict[str, float] = {}
    for each in found:
        alphas[each.name] = ranks[each.name]
        if each.rank(tensors) is not None:  # LyCORIS does not scale a full matrix
            alphas[each.name] = _alpha(path, tensors.get(f"{each.key}.alpha")) or ranks[each.name]
        if "transformer.lora_alpha" in peft:
            patterns: dict[str, float] = peft.get("transformer.alpha_pattern") or {}
            matching = [a for p, a in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", each.name)]
            alphas[each.name] = (*matching, peft["transformer.lora_alpha"])[0]
    follows = all(alphas[name] == ranks[name] for name in alphas)
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    names: str | list[str] = list(ranks)
    if spec is not None:  # else the model may have more blocks than the file
        names = next((each for each in TARGETS if target_modules(spec, each) == names), names)
    lora = Lora(
        rank=rank,
        alpha=None if follows else alpha,
        rslora=bool(peft.get("transformer.use_rslora")),
        targets=names,
        rank_pattern={re.escape(n): each for n, each in ranks.items() if each != rank},
        alpha_pattern={re.escape(n): a for n, a in alphas.items() if not follows and a != alpha},
    )
    if method == "lokr":
        shapes = (shapes for shapes in sizes.values() if shapes)
        lora = replace(lora, factor=common_factor(f"{setting} {path}", shapes))
    return FileSettings(lora, method, scaled=False)


def _wrong(
    tensors: dict[str, _Tensor],
    used: set[str],
    blocks: list[int],
    found: list[Factors],
    spec: Spec | None,
) -> str | None:
    """Why it is no adapter of this model."""
    if blocks == [19, 38] or any(_FLUX_1.search(name) for name in tensors):
        return "its names are those of FLUX.1"
    if spec is not None and (blocks[0] > spec.double_blocks or blocks[1] > spec.single_blocks):
        return f"it has {blocks[0]} double and {blocks[1]} single blocks, of a larger model"
    unknown = sorted(tensors.keys() - used)
    if any(name.endswith("dora_scale") for name in unknown):
        return "a DoRA of ComfyUI's, which holds magnitudes for its own arithmetic; take the file for diffusers"
    if unknown:
        return f"{len(unknown)} tensors are for no linear, or lack their other factor; the first is {unknown[0]}"
    if not found:
        return "it adapts no linear"
    if len(kinds := {each.method for each in found}) > 1:
        return f"it is {' and '.join(sorted(kinds))} at once"
    with_magnitude = [each.name for each in found if f"{each.key}.{MAGNITUDE}" in tensors]
    if with_magnitude and len(with_magnitude) < len(found):
        return f"it has magnitudes for {len(with_magnitude)} of {len(found)} linears only"
    if len({each.name for each in found}) < len(found):
        return "it has some linear under two names"
    shapes = linear_shapes(spec) if spec else {}
    for each in found:
        rows, columns = shapes.get(each.name, (0, 0))
        expected = (rows * (_FUSED if each.fused else 1), columns)
        matrices = each.shapes(tensors)
        if each.method == "lokr" and each.fused:
            return "it has one LoKr for q, k and v of a double block, which are three linears here"
        if matrices is not None:
            (m, n), (p, q) = matrices[0], matrices[-1]
            whole = (m * p, n * q) if each.method == "lokr" else (m, n)
        if (
            matrices is None
            or (spec and whole != expected)
            or (each.method == "loha" and (m, n) != (p, q))
        ):
            held = " × ".join(str(tensors[name].shape) for names in each.matrices for name in names)
            return f"{each.name} is {held} there, and {list(expected)} in the model"
    return None


def _as_trained(
    setting: str,
    path: str,
    values: dict[str, Any],
    found: list[Factors],
    tensors: dict[str, _Tensor],
    spec: Spec,
) -> Lora:
    """The settings that a file of flux2-ds says it was trained with."""
    settings = Lora(**{name: values[name] for name in ADAPTER_FIELDS if name in values})
    linears, stored = adapted_linears(spec, settings), {each.name: each for each in found}
    for name, linear in linears.items():
        parts = parts_of(bfl_place(name).module)
        rank = linear.rank
        if name in stored and stored[name].fused:
            rank = sum(linears[part].rank for part in parts if part in linears)
        if name not in stored or not _fits(stored[name], rank, tensors, settings):
            raise UserError(
                f"{setting} {path} is damaged: its metadata (flux2_ds.lora) has {name} with rank {linear.rank}, its "
                "tensors do not. Export it again."
            )
    return settings


def _fits(each: Factors, rank: int, tensors: dict[str, _Tensor], settings: Lora) -> bool:
    """Whether a linear's tensors are of that rank, and a LoKr's of the settings' factors."""
    if each.method != "lokr":
        return each.rank(tensors) == rank
    (a, c), (b, d) = each.shapes(tensors) or [(0, 0), (0, 0)]
    parts = kronecker(a * b, c * d, rank, settings)
    expected = None if parts.full[1] else rank
    return parts.shape == ((a, b), (c, d)) and each.rank(tensors) == expected


class _Tensor(NamedTuple):
    dtype: str
    shape: list[int]
    start: int
    """Where its bytes begin in the file."""


def _header(setting: str, path: str) -> tuple[dict[str, _Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata."""
    try:
        with Path(path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER:
                raise ValueError("it is none")
            header = json.loads(file.read(size))
        metadata = header.pop("__metadata__", {})
        tensors = {
            name: _Tensor(value["dtype"], list(value["shape"]), 8 + size + value["data_offsets"][0])
            for name, value in header.items()
        }
    except OSError as error:
        raise UserError(
            f"{setting} {path} cannot be read ({error.strerror}). Correct the path."
        ) from error
    except MALFORMED as error:
        raise UserError(
            f"{setting} {path} is no safetensors file ({error}). Name another."
        ) from error
    return tensors, metadata


def _alpha(path: str, tensor: _Tensor | None) -> float | None:
    """The number that a tensor of one element holds."""
    if tensor is None:
        return None
    with Path(path).open("rb") as file:
        file.seek(tensor.start)
        if tensor.dtype == "BF16":
            return float(struct.unpack("<f", b"\0\0" + file.read(2))[0])
        kind = _SCALARS[tensor.dtype]
        return float(struct.unpack(kind, file.read(struct.calcsize(kind)))[0])


def with_file(asked: Lora, found: Lora, spec: Spec | None) -> Lora:
    """The settings asked for, with what the file of `lora.init_from` decides.
    Refuses a setting that contradicts it.
    """
    decided = {name: getattr(found, name) for name in ADAPTER_FIELDS}
    plain = Lora()
    for name, value in decided.items():
        given = getattr(asked, name)
        if given in (getattr(plain, name), value):
            continue
        if name == "targets":
            if (
                spec is not None
                and adapted_linears(spec, replace(found, targets=given)).keys()
                == adapted_linears(spec, found).keys()
            ):
                continue
            if isinstance(value, list):
                value = f"{len(value)} linears, from {value[0]} to {value[-1]}"
        raise UserError(
            f"lora.{name} is {shown(str(given))}, and lora.init_from {asked.init_from} has {shown(str(value))}, which it "
            f"keeps. Remove lora.{name}."
        )
    return replace(asked, **decided)
