"""CUDA graphs of the model's forward and backward passes, recorded once for each shape of their inputs.

Queueing the thousands of kernels of a pass one by one takes Python longer than a fast card needs to run
those of a small model or a small picture. A recorded pass is queued at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

Run = Callable[[], None]
Record = Callable[[Run], Run]
"""Runs something, or only records its work on the card; returns what does that work again."""


def replay_passes(model: nn.Module, record: Record | None = None) -> None:
    """Let `model` replay its passes in training.

    A shape that comes for the first time is computed as ever, which compiles and allocates what no graph
    may; when it comes again it is recorded. Inputs are given by name; tensors among them need no gradient.
    The model's trained parameters must stay where they are in memory. What is not training (eval mode,
    no gradients) is computed as ever.

    `record`: how a pass is recorded; into CUDA graphs that share their memory by default.
    """
    model.forward = _Replayed(model, record or _recorder())


def _recorder() -> Record:
    pool = torch.cuda.graph_pool_handle()

    def record(run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        # Other threads, which read samples into page-locked memory, may go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
        return graph.replay

    return record


class _Replayed:
    """A model's forward function."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        self._model, self._forward, self._record = model, model.forward, record
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients: list[torch.Tensor] = []
        self._seen: set[Any] = set()
        self._passes: dict[Any, _Pass] = {}
        self.latest: _Pass | None = None

    def __call__(self, **inputs: Any) -> Any:
        if not (self._model.training and torch.is_grad_enabled()):
            return self._forward(**inputs)
        shapes = tuple(
            (name, (value.shape, value.dtype) if torch.is_tensor(value) else value)
            for name, value in inputs.items()
        )
        if shapes not in self._seen:
            self._seen.add(shapes)
            return self._forward(**inputs)
        if shapes not in self._passes:
            # One set for all shapes: they hold a pass's gradients only until autograd has copied them.
            self._gradients = self._gradients or [torch.empty_like(p) for p in self._parameters]
            self._passes[shapes] = _Pass(
                self._forward, inputs, self._parameters, self._gradients, self._record
            )
        return (_Replay.apply(self, self._passes[shapes], inputs, *self._parameters),)


class _Pass:
    """A forward pass and its backward pass, with the tensors that they read and write."""

    def __init__(
        self,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        parameters: list[nn.Parameter],
        gradients: list[torch.Tensor],
        record: Record,
    ) -> None:
        self._inputs = {
            name: value.clone() if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }
        self._parameters, self._gradients = parameters, gradients
        self._places = [p.data_ptr() for p in parameters]
        self._output = torch.empty(0)
        self._again_forward = record(partial(self._run_forward, forward))
        self._incoming = torch.zeros_like(self._output)
        self._again_backward = record(self._run_backward)

    def _run_forward(self, forward: Callable[..., Any]) -> None:
        with torch.enable_grad():
            self._output = forward(**self._inputs)[0]

    def _run_backward(self) -> None:
        found = torch.autograd.grad(self._output, self._parameters, self._incoming)
        torch._foreach_copy_(self._gradients, found)

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The model's output, valid until the next pass."""
        if self._places != [p.data_ptr() for p in self._parameters]:
            raise RuntimeError(
                "a trained parameter has moved in memory since its pass was recorded"
            )
        for name, value in inputs.items():
            if torch.is_tensor(value):
                self._inputs[name].copy_(value, non_blocking=True)
        self._again_forward()
        return self._output.detach()

    def backward(self, incoming: torch.Tensor) -> list[torch.Tensor]:
        """The parameters' gradients, of the last forward pass."""
        self._incoming.copy_(incoming)
        self._again_backward()
        # Autograd may keep what it is given, and the next pass writes to the same place.
        return list(torch._foreach_add(self._gradients, 0.0))


class _Replay(torch.autograd.Function):
    """A recorded pass among autograd's other functions, so that engines find their gradients as ever."""

    @staticmethod
    def forward(
        ctx: Any, owner: _Replayed, recorded: _Pass, inputs: dict[str, Any], *_: nn.Parameter
    ) -> torch.Tensor:
        ctx.owner, ctx.recorded, owner.latest = owner, recorded, recorded
        return recorded.forward(inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.owner.latest is not ctx.recorded:
            raise RuntimeError("another forward pass has overwritten what this backward pass needs")
        ctx.owner.latest = None
        return (None, None, None, *ctx.recorded.backward(incoming))
