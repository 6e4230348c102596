"""The blocks' linears, by their names in diffusers' transformer, and the sets that an adapter can target. Pure, no torch."""

from __future__ import annotations

from flux2_ds.spec import Spec

_ATTENTION = {
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "attn.to_out.0": (1, 1),
}
_TEXT_ATTENTION = {
    "attn.add_q_proj": (1, 1),
    "attn.add_k_proj": (1, 1),
    "attn.add_v_proj": (1, 1),
    "attn.to_add_out": (1, 1),
}
_FEED_FORWARD = {
    "ff.linear_in": (1, 6),
    "ff.linear_out": (3, 1),
    "ff_context.linear_in": (1, 6),
    "ff_context.linear_out": (3, 1),
}
DOUBLE_LINEARS = {**_ATTENTION, **_TEXT_ATTENTION, **_FEED_FORWARD}
SINGLE_LINEARS = {"attn.to_qkv_mlp_proj": (1, 9), "attn.to_out": (4, 1)}
"""Linear of a block -> its input and output features, in widths of the model."""
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "all": (tuple(DOUBLE_LINEARS), tuple(SINGLE_LINEARS)),
    "attention": ((*_ATTENTION, *_TEXT_ATTENTION), tuple(SINGLE_LINEARS)),
    "diffusers": (tuple(_ATTENTION), tuple(SINGLE_LINEARS)),
}
"""Target set -> linears of a double block, linears of a single block. `diffusers` is what its
FLUX.2 training example adapts."""


def target_modules(spec: Spec, targets: str) -> list[str]:
    """Full names of the linears that a target set adapts."""
    double, single = TARGETS[targets]
    return [f"transformer_blocks.{i}.{n}" for i in range(spec.double_blocks) for n in double] + [
        f"single_transformer_blocks.{i}.{n}" for i in range(spec.single_blocks) for n in single
    ]
