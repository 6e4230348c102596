"""How other programs change a model's weights by an adapter file, written down from reading their loaders.

Each function takes the weights of that program's model and the tensors of a file, and returns the
weights after loading, and the names in the file that it did not use. Dense matrices and no shortcuts:
to compare with, on tiny models.
"""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]

BFL_LINEARS = {
    "double_blocks": {
        "img_attn.qkv": (3, 1),
        "img_attn.proj": (1, 1),
        "img_mlp.0": (6, 1),
        "img_mlp.2": (1, 3),
        "txt_attn.qkv": (3, 1),
        "txt_attn.proj": (1, 1),
        "txt_mlp.0": (6, 1),
        "txt_mlp.2": (1, 3),
    },
    "single_blocks": {"linear1": (9, 1), "linear2": (1, 4)},
}
"""Modules of ComfyUI's, musubi-tuner's and ai-toolkit's FLUX.2 -> rows and columns, in widths of the model."""

_QKV = ("img_attn.qkv", "txt_attn.qkv")
# comfy/utils.py, flux_to_diffusers: diffusers' name -> module, and the third of its rows.
COMFYUI_ALIASES = {
    "transformer_blocks": {
        "attn.to_q": ("img_attn.qkv", 0),
        "attn.to_k": ("img_attn.qkv", 1),
        "attn.to_v": ("img_attn.qkv", 2),
        "attn.add_q_proj": ("txt_attn.qkv", 0),
        "attn.add_k_proj": ("txt_attn.qkv", 1),
        "attn.add_v_proj": ("txt_attn.qkv", 2),
        "attn.to_out.0": ("img_attn.proj", None),
        "attn.to_add_out": ("txt_attn.proj", None),
        "ff.linear_in": ("img_mlp.0", None),
        "ff.linear_out": ("img_mlp.2", None),
        "ff_context.linear_in": ("txt_mlp.0", None),
        "ff_context.linear_out": ("txt_mlp.2", None),
    },
    "single_transformer_blocks": {
        "attn.to_qkv_mlp_proj": ("linear1", None),
        "attn.to_out": ("linear2", None),
    },
}
_KINDS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}


def bfl_shapes(double: int, single: int, width: int) -> dict[str, tuple[int, int]]:
    """Modules of a model of this size."""
    return {
        f"{kind}.{block}.{linear}": (rows * width, columns * width)
        for kind, count in (("double_blocks", double), ("single_blocks", single))
        for block in range(count)
        for linear, (rows, columns) in BFL_LINEARS[kind].items()
    }


def comfyui(weights: Tensors, tensors: Tensors) -> tuple[Tensors, set[str]]:
    """comfy/lora.py `load_lora` and `model_lora_keys_unet`, comfy/weight_adapter/lora.py, lokr.py, loha.py and base.py."""
    targets: dict[str, tuple[str, int | None]] = {}
    for module in weights:
        targets[f"diffusion_model.{module}"] = (module, None)
        targets[f"lora_unet_{module.replace('.', '_')}"] = (module, None)
        kind, block, linear = module.split(".", 2)
        for diffusers_kind, bfl_kind in _KINDS.items():
            for name, (target, third) in COMFYUI_ALIASES[diffusers_kind].items():
                if (bfl_kind, target) == (kind, linear):
                    alias = f"{diffusers_kind}.{block}.{name}"
                    flat = alias.replace(".", "_")
                    for key in (
                        f"transformer.{alias}",
                        alias,
                        f"lycoris_{flat}",
                        f"lora_transformer_{flat}",
                    ):
                        targets[key] = (module, third)
    used, changed = set(), {name: weight.clone() for name, weight in weights.items()}
    for key, (module, third) in targets.items():
        pair = _pair(
            tensors, key, ("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")
        )
        alpha, scale = tensors.get(f"{key}.alpha"), tensors.get(f"{key}.dora_scale")
        used |= {f"{key}.{end}" for end in ("alpha", "dora_scale")} & tensors.keys()
        product = _product(tensors, key, alpha)
        if product is not None:
            weight = changed[module]
            if third is not None:
                size = weight.shape[0] // 3
                weight = weight.narrow(0, third * size, size)
            weight += product[0].reshape(weight.shape)
            used |= product[1]
        if pair is None:
            continue
        used |= set(pair)
        up, down = (tensors[name] for name in pair)
        weight = changed[module]
        if third is not None:
            size = weight.shape[0] // 3
            weight = weight.narrow(0, third * size, size)
        update = up @ down * (1 if alpha is None else alpha.item() / down.shape[0])
        if scale is None:
            weight += update
        elif scale.shape[0] == weight.shape[0]:
            norm = weight.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps
            weight.copy_((weight + update) * (scale / norm))
        else:
            raise AssertionError("magnitudes of columns")
    return changed, tensors.keys() - used


def musubi_tuner(weights: Tensors, tensors: Tensors) -> tuple[Tensors, set[str]]:
    """utils/lora_utils.py `load_safetensors_with_lora_and_fp8`, as flux_2_generate_image.py calls it, with networks/lokr.py
    and loha.py `merge_weights_to_tensor`."""
    used, changed = set(), dict(weights)
    for module, weight in weights.items():
        key = f"lora_unet_{module.replace('.', '_')}"
        product = _product(tensors, key, tensors.get(f"{key}.alpha"))
        if product is not None and f"{key}.lokr_w1_a" not in tensors:
            changed[module] = weight + product[0]
            used |= product[1] | {f"{key}.alpha"}
        pair = _pair(tensors, key, ("lora_up.weight", "lora_down.weight"))
        if pair is None:
            continue
        up, down = (tensors[name] for name in pair)
        alpha = tensors.get(f"{key}.alpha", down.shape[0])
        changed[module] = weight + (up @ down) * (alpha / down.shape[0])
        used |= {*pair, f"{key}.alpha"}
    return changed, tensors.keys() - used


def ai_toolkit(weights: Tensors, tensors: Tensors) -> tuple[Tensors, set[str]]:
    """toolkit/network_mixins.py `load_weights` in PEFT's format, flux2_model.py; a network of a large enough rank."""
    renamed = {name.replace("diffusion_model.", "transformer."): name for name in tensors}
    used, changed = set(), dict(weights)
    for module, weight in weights.items():
        up, down = (
            renamed.get(f"transformer.{module}.{end}.weight") for end in ("lora_B", "lora_A")
        )
        if up is not None and down is not None:
            changed[module] = weight + tensors[up] @ tensors[down]  # whatever the alpha
            used |= {up, down}
    return changed, {name for name in tensors.keys() - used if not name.endswith(".alpha")}


def onetrainer(weights: Tensors, tensors: Tensors) -> tuple[Tensors, set[str]]:
    """util/load_lora_util.py, module/LoRAModule.py, on diffusers' model, q, k and v apart; `lora_decompose` with
    `lora_decompose_output_axis` for a DoRA; of a LoKr or LoHa rank, factor and full matrices are those of the settings,
    and a linear without its alpha is refused."""
    used, changed = set(), dict(weights)
    for module, weight in weights.items():
        key = f"transformer.{module}"
        flat = f"lycoris_{module.replace('.', '_')}"
        product = _product(tensors, flat, tensors.get(f"{flat}.alpha"))
        if product is not None and f"{flat}.alpha" in tensors:
            changed[module] = weight + product[0]
            used |= product[1] | {f"{flat}.alpha"}
        pair = _pair(
            tensors, key, ("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")
        )
        if pair is None:
            continue
        up, down = (tensors[name] for name in pair)
        alpha = tensors.get(f"{key}.alpha", down.shape[0])
        sum_ = weight + up @ down * (alpha / down.shape[0])
        magnitude = f"{key}.lora_magnitude_vector.weight"
        if magnitude in tensors:
            sum_ = tensors[magnitude].reshape(-1, 1) * (sum_ / sum_.norm(dim=1, keepdim=True))
        changed[module] = sum_
        used |= {*pair, f"{key}.alpha", magnitude}
    return changed, tensors.keys() - used


def _product(
    tensors: Tensors, key: str, alpha: torch.Tensor | None
) -> tuple[torch.Tensor, set[str]] | None:
    """LyCORIS' update of a LoKr or LoHa, and the names of its tensors; a full matrix is not scaled."""
    kind = "hada" if f"{key}.hada_w1_a" in tensors else "lokr"
    matrices, used, rank = [], set(), None
    for matrix in (f"{key}.{kind}_w1", f"{key}.{kind}_w2"):
        if matrix in tensors:
            matrices.append(tensors[matrix])
            used.add(matrix)
        elif f"{matrix}_a" in tensors:
            up, down = tensors[f"{matrix}_a"], tensors[f"{matrix}_b"]
            matrices.append(up @ down)
            used |= {f"{matrix}_a", f"{matrix}_b"}
            rank = down.shape[0]
    if len(matrices) < 2:
        return None
    change = matrices[0] * matrices[1] if kind == "hada" else torch.kron(*matrices)
    return change * (1 if alpha is None or rank is None else alpha.item() / rank), used


def _pair(tensors: Tensors, key: str, *ends: tuple[str, str]) -> tuple[str, str] | None:
    for up, down in ends:
        if f"{key}.{up}" in tensors:
            return f"{key}.{up}", f"{key}.{down}"
    return None
