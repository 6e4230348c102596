"""How the blocks run: which activations are saved for the backward pass, compilation, attention backend.

A *checkpointed* block saves its inputs alone and computes everything again in the backward pass
(full activation checkpointing); the inputs may wait in host memory. The other blocks, when compiled,
save the outputs of their matrix products and attention and compute again only what lies between them,
which is cheap (selective activation checkpointing). The first blocks are the checkpointed ones, because
the backward pass frees the last blocks' activations first.
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

from flux2_ds.ops import fp8_linear as fp8_linear  # registers the operators named below, as does
from flux2_ds.ops import lora_ops as lora_ops
from flux2_ds.ops.fused_single_block import fuse_single_blocks

Forward = Callable[..., Any]


def _silence(logger: str, message: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: message not in record.getMessage())


# Logged for every model, though tests check the attention backends and no operator in a block works in place.
_silence("diffusers.models.modeling_utils", "Attention backends are an experimental feature")
_silence("torch._higher_order_ops.wrap", "Detected that context_fn is passed")

SAVED_OPERATORS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.flux2_ds.fp8_linear.default,
    torch.ops.flux2_ds.quantized_linear.default,
    torch.ops.flux2_ds.lora_add.default,
    torch.ops.flux2_ds.quantized_lora_linear.default,
}
"""Operators whose outputs selective checkpointing saves."""


def blocks_of(model: Flux2Transformer2DModel) -> list[nn.Module]:
    """All blocks, in the order in which they run."""
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def configure_blocks(
    model: Flux2Transformer2DModel,
    *,
    checkpointed: int,
    compiled: bool,
    attention: str | None,
    offload: bool = False,
    partitioned: bool = False,
) -> None:
    """Set how the blocks run.

    `checkpointed`: how many blocks, the first ones, are checkpointed. `offload`: their token streams wait
    for the backward pass in pinned host memory. `compiled`: compile each block, as one graph without
    breaks. `attention`: name of a diffusers attention backend, or None for torch's own choice.
    `partitioned`: ZeRO-3 gathers a compiled block's parameters when the block is called.
    """
    fuse_single_blocks(model)
    if attention is not None:
        model.set_attention_backend(attention)
    if compiled:
        _set_up_compiler(partitioned)
        if partitioned:
            # ZeRO-3 sees positional arguments only, and this is what makes diffusers pass them so.
            model.enable_gradient_checkpointing(lambda block, *arguments: block(*arguments))
    for number, block in enumerate(blocks_of(model)):
        forward: Forward = block.forward
        if number < checkpointed:
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=True)
        elif compiled:
            contexts = partial(create_selective_checkpoint_contexts, _policy)
            forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
        if compiled:
            forward = torch.compile(forward, fullgraph=True, dynamic=False)
        if number < checkpointed and offload:
            forward = _offload_inputs(forward, block.forward)
        block.forward = forward


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator in SAVED_OPERATORS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _set_up_compiler(partitioned: bool) -> None:
    # One graph for each kind of block and each bucket, whose sizes it knows; all of them count
    # against one limit.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096
    # ZeRO-3's warm-up is forward only, and torch would compile the backward pass at its first use.
    functorch = torch._functorch.config
    if hasattr(functorch, "force_non_lazy_backward_lowering"):  # newer than torch 2.9
        functorch.force_non_lazy_backward_lowering = partitioned


def _offload_inputs(forward: Forward, original: Forward) -> Forward:
    """`forward`, a checkpoint of `original`, its token streams in host memory until the backward pass.

    The copies are queued with the step's other work: the GPU waits for each, and nothing is overwritten
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
            # By position: of keyword arguments a checkpoint keeps the tensors themselves.
            return forward(*arguments.args, **arguments.kwargs)

    return run


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
