"""How the transformer's blocks run: attention backend, compilation, and which activations are kept.

Every block either *recomputes*: only its inputs outlive its forward pass; or *keeps*: the results of
its matrix products and attention stay, and the backward pass computes again only what lies between
them, which is cheap. The blocks that keep are the last ones, because the backward pass frees those
first. The inputs of those that recompute may wait in host memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from flux2_ds.ops import lora_ops as lora_ops  # registers the operators named below
from flux2_ds.ops.fused_single_block import fuse_single_blocks

# registers the operators named below


Forward = Callable[..., Any]


def _silence(logger: str, said: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: said not in record.getMessage())


# Said for every model. Which backends work here the tests tell, and nothing in a block works in place.
_silence("diffusers.models.modeling_utils", "Attention backends are an experimental feature")
_silence("torch._higher_order_ops.wrap", "Detected that context_fn is passed")

_aten = torch.ops.aten
_COSTLY = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.flux2_ds.frozen_product.default,
    torch.ops.flux2_ds.add_low_rank.default,
    torch.ops.flux2_ds.adapted_product.default,
}
"""What a block that keeps its activations does not compute twice."""


def blocks_of(model: Flux2Transformer2DModel) -> list[nn.Module]:
    """All blocks, in the order in which they run."""
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def arrange_blocks(
    model: Flux2Transformer2DModel,
    *,
    kept: int,
    compiled: bool,
    attention: str | None,
    offload: bool = False,
    partitioned: bool = False,
) -> None:
    """Set how the blocks run.

    `kept`: how many blocks keep their activations. `offload`: the token streams that the others take in
    wait for the backward pass in page-locked host memory. `compiled`: compile each block, as
    one graph without breaks. `attention`: name of a diffusers attention backend, or None for torch's
    own choice. `partitioned`: ZeRO-3 gathers a compiled block's parameters when the block is called.
    """
    fuse_single_blocks(model)
    if attention is not None:
        model.set_attention_backend(attention)
    if compiled:
        _set_up_compiler(partitioned)
        if partitioned:
            # ZeRO-3 sees arguments by position only, and this is what makes diffusers pass them so.
            model.enable_gradient_checkpointing(lambda block, *arguments: block(*arguments))
    blocks = blocks_of(model)
    for number, block in enumerate(blocks):
        forward = block.forward
        recomputes = number < len(blocks) - kept
        if recomputes:
            forward = _recomputing(forward)
        elif compiled:
            forward = _keeping(forward)
        if compiled:
            forward = torch.compile(forward, fullgraph=True, dynamic=False)
        if recomputes and offload:
            forward = _offloading(forward, block.forward)
        block.forward = forward


def _set_up_compiler(partitioned: bool) -> None:
    # One graph for each kind of block and each bucket, whose sizes it knows; all of them count
    # against one limit.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096
    # ZeRO-3's warm-up is forward only, and torch would compile the backward pass at its first use.
    differentiation = torch._functorch.config
    if hasattr(differentiation, "force_non_lazy_backward_lowering"):  # newer than torch 2.9
        differentiation.force_non_lazy_backward_lowering = partitioned


def _recomputing(forward: Forward) -> Forward:
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=True)


def _keeping(forward: Forward) -> Forward:
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def _offloading(forward: Forward, original: Forward) -> Forward:
    """`forward`, which recomputes `original`, with its token streams kept in host memory meanwhile.

    The copies are queued with the step's other work: the card waits for each, and nothing is overwritten
    while it is read.
    """
    parameters = signature(original)

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = parameters.bind(*args, **kwargs)
        streams = {
            stream.untyped_storage().data_ptr()
            for name in ("hidden_states", "encoder_hidden_states")
            if (stream := arguments.arguments[name]) is not None
        }

        def pack(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
            device = tensor.device
            if tensor.untyped_storage().data_ptr() in streams:
                tensor = _to_host(tensor)
            return device, tensor

        def unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
            device, tensor = packed
            return tensor.to(device, non_blocking=True)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            # By position: of named arguments a checkpoint keeps the tensors themselves.
            return forward(*arguments.args, **arguments.kwargs)

    return run


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator in _COSTLY:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
