"""A whole transformer in one file of Black Forest Labs' names, one tensor in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch

from flux2_ds.config.adapter_file import bfl_place, parts_of
from flux2_ds.model.safetensors_file import Shapes, write_safetensors

_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_NORMS = {
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "attn.norm_added_q": "norm.query_norm",
    "attn.norm_added_k": "norm.key_norm",
}
_FP8 = torch.float8_e4m3fn
Weight = Callable[[str], torch.Tensor]


def write_bfl_transformer(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    weight: Weight,
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    """Write all weights; `shapes` and `weight` are by diffusers' names.

    In fp8 the blocks' linears have a scale each, as ComfyUI reads them; the rest stays in bf16.
    """
    sources: dict[str, list[str]] = {}
    for name in shapes:
        target = bfl_name(name)
        linears = parts_of(target.removesuffix(".weight")) if _is_linear(name) else []
        sources[target] = [f"{linear}.weight" for linear in linears] or [name]
    quantized = {bfl_name(name) for name in shapes if dtype == _FP8 and _is_linear(name)}
    written: Shapes = {}
    for target, names in sources.items():
        rows = sum(shapes[name][0] for name in names)
        plain = torch.bfloat16 if dtype == _FP8 else dtype
        written[target] = (_FP8 if target in quantized else plain, (rows, *shapes[names[0]][1:]))
    scales: dict[str, torch.Tensor] = {}

    def tensor(target: str) -> torch.Tensor:
        if target.endswith(".weight_scale"):
            name = target.removesuffix("_scale")
            if name not in scales:
                scales[name] = joined(name).abs().max().float() / torch.finfo(_FP8).max
            return scales[name]
        if target in quantized:
            return (joined(target) / tensor(f"{target}_scale").clamp_min(1e-12)).to(_FP8)
        return joined(target).to(written[target][0])

    def joined(target: str) -> torch.Tensor:
        value = torch.cat([weight(name) for name in sources[target]])
        if "adaLN_modulation" in target:  # shift and scale; diffusers has scale and shift
            value = torch.cat(value.chunk(2)[::-1])
        return value

    if quantized:
        layers = {
            name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in sorted(quantized)
        }
        quantization = {"format_version": "1.0", "layers": layers}
        metadata = {**metadata, "_quantization_metadata": json.dumps(quantization)}
        written |= {f"{name}_scale": (torch.float32, ()) for name in quantized}
    write_safetensors(path, written, tensor, metadata)


def bfl_name(name: str) -> str:
    """Black Forest Labs' name of one of diffusers' weights."""
    module = name.removesuffix(".weight")
    if _is_linear(name):
        return f"{bfl_place(module).module}.weight"
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module)
    if block is None:
        return f"{_OUTSIDE[module]}.weight"
    single, number, norm = block.groups()
    stream = "" if single else ("txt_attn." if "added" in norm else "img_attn.")
    kind = "single" if single else "double"
    return f"{kind}_blocks.{number}.{stream}{_NORMS[norm]}.scale"


def _is_linear(name: str) -> bool:
    return "transformer_blocks." in name and ".norm" not in name
