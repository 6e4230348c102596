"""The linears that an adapter can target, by their names in diffusers' transformer. Pure, no torch."""

from __future__ import annotations

from flux2_ds.spec import Spec

_DOUBLE_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
_DOUBLE_FEED_FORWARD = (
    "ff.linear_in",
    "ff.linear_out",
    "ff_context.linear_in",
    "ff_context.linear_out",
)
_SINGLE = ("attn.to_qkv_mlp_proj", "attn.to_out")
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "all": (_DOUBLE_ATTENTION + _DOUBLE_FEED_FORWARD, _SINGLE),
    "attention": (_DOUBLE_ATTENTION, _SINGLE),
    "diffusers": (_DOUBLE_ATTENTION[:4], _SINGLE),
}
"""Target set -> linears of a double block, linears of a single block. `diffusers` is what its
FLUX.2 training example adapts."""


def target_modules(spec: Spec, targets: str) -> list[str]:
    """Full names of the linears that a target set adapts."""
    double, single = TARGETS[targets]
    return [f"transformer_blocks.{i}.{n}" for i in range(spec.double_blocks) for n in double] + [
        f"single_transformer_blocks.{i}.{n}" for i in range(spec.single_blocks) for n in single
    ]
