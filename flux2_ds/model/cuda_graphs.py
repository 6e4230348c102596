"""CUDA graphs of the model's forward and backward passes, recorded once for each shape of their inputs.

Queueing the thousands of kernels of a pass one by one takes Python longer than a fast card needs to run
those of a small model or a small picture. A recorded pass is queued at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from flux2_ds.errors import UserError

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
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a failed recording fails, too
            raise UserError(
                f"a pass cannot be recorded as a CUDA graph ({str(cause).splitlines()[0]}). Set "
                "cuda_graphs: false."
            ) from error
        return graph.replay

    return record


class _Replayed:
    """A model's forward function."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        self._model, self._forward, self._record = model, model.forward, record
        self._trained = _Trained(model)
        self._seen: set[Any] = set()
        self._passes: dict[Any, _Pass] = {}
        self._inputs: dict[Any, torch.Tensor] = {}
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
            self._passes[shapes] = _Pass(
                self._forward, self._buffers(inputs), self._trained, self._record
            )
        return (_Replay.apply(self, self._passes[shapes], inputs, *self._trained.parameters),)

    def _buffers(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Copies of the inputs, one for each shape of each, whichever passes read it."""
        found = {}
        for name, value in inputs.items():
            found[name] = value
            if torch.is_tensor(value):
                key = name, value.shape, value.dtype
                found[name] = self._inputs.setdefault(key, value.clone())
        return found


class _Trained:
    """A model's trained parameters, where they are, and where passes leave their gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._slots = [
            (module, name)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        found = (module._parameters[name] for module, name in self._slots)
        self.parameters = [parameter for parameter in found if parameter is not None]

    @cached_property
    def gradients(self) -> list[torch.Tensor]:
        """For all shapes: they hold a pass's gradients only until autograd has copied them."""
        return [torch.empty_like(parameter) for parameter in self.parameters]

    def places(self) -> list[int]:
        """Where the parameters are in memory."""
        return [parameter.data_ptr() for parameter in self.parameters]

    @contextmanager
    def aliased(self) -> Iterator[list[nn.Parameter]]:
        """Other parameters in the model that share these ones' memory.

        Autograd adds up a parameter's gradients on the stream where it first met it, for as long as any
        graph or hook, such as ZeRO's, holds on to that; and nothing recorded may wait for another stream.
        """
        aliases = [nn.Parameter(parameter.detach()) for parameter in self.parameters]
        self._put(aliases)
        try:
            yield aliases
        finally:
            self._put(self.parameters)

    def _put(self, parameters: list[nn.Parameter]) -> None:
        for (module, name), parameter in zip(self._slots, parameters, strict=True):
            module._parameters[name] = parameter


class _Pass:
    """A forward pass and its backward pass, with the tensors that they read and write."""

    def __init__(
        self,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        trained: _Trained,
        record: Record,
    ) -> None:
        self._inputs = inputs
        self._trained, self._places = trained, trained.places()
        self._gradients = trained.gradients  # made here: not in the memory of what is recorded
        self._output = torch.empty(0)
        self._wanted: list[nn.Parameter] = []
        self._again_forward = record(partial(self._run_forward, forward))
        self._incoming = torch.zeros_like(self._output)
        self._again_backward = record(self._run_backward)

    def _run_forward(self, forward: Callable[..., Any]) -> None:
        with self._trained.aliased() as self._wanted, torch.enable_grad():
            self._output = forward(**self._inputs)[0]

    def _run_backward(self) -> None:
        found = torch.autograd.grad(self._output, self._wanted, self._incoming)
        torch._foreach_copy_(self._gradients, found)

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The model's output, valid until the next pass."""
        if self._places != self._trained.places():
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
