"""CUDA graphs of the model's forward and backward passes, one pair for each shape of the inputs.

Launching the thousands of kernels of a pass one by one takes Python longer than a fast GPU needs to run
those of a small model or a small image. A captured pass is launched at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from flux2_ds.errors import UserError

Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Runs some work, or only captures what it launches on the GPU; returns what replays it."""


def use_cuda_graphs(model: nn.Module, capture: Capture | None = None) -> None:
    """Let `model` replay captured passes in training.

    A shape's first pass runs as usual, which compiles and allocates what a graph may not; its second is
    captured. Inputs are given by name; tensors among them need no gradient. The trained parameters must
    stay where they are in memory. Other passes (eval mode, no gradients) run as usual.

    `capture`: by default into CUDA graphs that share their memory.
    """
    model.forward = _GraphedForward(model, capture or _graph_capture())


def _graph_capture() -> Capture:
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads, which read samples into pinned memory, may go on meanwhile.
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a failed capture fails, too
            raise UserError(
                f"a pass cannot be captured as a CUDA graph ({str(cause).splitlines()[0]}). Set "
                "cuda_graphs: false."
            ) from error
        return graph.replay

    return capture


class _GraphedForward:
    """A model's forward function that captures and replays passes by the shapes of their inputs."""

    def __init__(self, model: nn.Module, capture: Capture) -> None:
        self._model, self._forward, self._capture = model, model.forward, capture
        self._trained = _TrainedParameters(model)
        self._seen: set[Any] = set()
        self._passes: dict[Any, _CapturedPass] = {}
        self._inputs: dict[Any, torch.Tensor] = {}
        self.latest: _CapturedPass | None = None

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
            self._passes[shapes] = _CapturedPass(
                self._forward, self._static_inputs(inputs), self._trained, self._capture
            )
        return (_Replay.apply(self, self._passes[shapes], inputs, *self._trained.parameters),)

    def _static_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Copies of the inputs, one for each name, shape and dtype, shared by the passes."""
        found = {}
        for name, value in inputs.items():
            found[name] = value
            if torch.is_tensor(value):
                key = name, value.shape, value.dtype
                found[name] = self._inputs.setdefault(key, value.clone())
        return found


class _TrainedParameters:
    """A model's trained parameters, their addresses, and where passes leave their gradients."""

    def __init__(self, model: nn.Module) -> None:
        slots = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        self._slots = [(module, name) for module, name, _ in slots]
        self.parameters = [parameter for _, _, parameter in slots]

    @cached_property
    def gradients(self) -> list[torch.Tensor]:
        """For all shapes: they hold a pass's gradients only until autograd has copied them."""
        return [torch.empty_like(parameter) for parameter in self.parameters]

    def addresses(self) -> list[int]:
        """Where the parameters are in memory."""
        return [parameter.data_ptr() for parameter in self.parameters]

    @contextmanager
    def aliased(self) -> Iterator[list[nn.Parameter]]:
        """Other parameters in the model that share the memory of its own.

        Autograd accumulates a parameter's gradients on the stream where it first met it, for as long as
        any graph or hook, such as ZeRO's, holds on to that; and nothing captured may wait for another
        stream.
        """
        aliases = [nn.Parameter(parameter.detach()) for parameter in self.parameters]
        self._set(aliases)
        try:
            yield aliases
        finally:
            self._set(self.parameters)

    def _set(self, parameters: list[nn.Parameter]) -> None:
        for (module, name), parameter in zip(self._slots, parameters, strict=True):
            module._parameters[name] = parameter


class _CapturedPass:
    """A forward pass and its backward pass, with the tensors that they read and write."""

    def __init__(
        self,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        trained: _TrainedParameters,
        capture: Capture,
    ) -> None:
        self._inputs = inputs
        self._trained, self._addresses = trained, trained.addresses()
        self._gradients = trained.gradients  # allocated here, outside the graphs' memory
        self._output = torch.empty(0)
        self._aliases: list[nn.Parameter] = []
        self._replay_forward = capture(partial(self._run_forward, forward))
        self._incoming = torch.zeros_like(self._output)
        self._replay_backward = capture(self._run_backward)

    def _run_forward(self, forward: Callable[..., Any]) -> None:
        with self._trained.aliased() as self._aliases, torch.enable_grad():
            self._output = forward(**self._inputs)[0]

    def _run_backward(self) -> None:
        found = torch.autograd.grad(self._output, self._aliases, self._incoming)
        torch._foreach_copy_(self._gradients, found)

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The model's output, valid until the next pass."""
        if self._addresses != self._trained.addresses():
            raise RuntimeError(
                "a trained parameter has moved in memory since its pass was captured"
            )
        for name, value in inputs.items():
            if torch.is_tensor(value):
                self._inputs[name].copy_(value, non_blocking=True)
        self._replay_forward()
        return self._output.detach()

    def backward(self, incoming: torch.Tensor) -> list[torch.Tensor]:
        """The parameters' gradients, of the last forward pass."""
        self._incoming.copy_(incoming)
        self._replay_backward()
        # Autograd may keep what it is given, and the next pass writes to the same place.
        return list(torch._foreach_add(self._gradients, 0.0))


class _Replay(torch.autograd.Function):
    """A captured pass as a node of autograd, so that engines find their gradients as usual."""

    @staticmethod
    def forward(
        ctx: Any,
        owner: _GraphedForward,
        captured: _CapturedPass,
        inputs: dict[str, Any],
        *_: nn.Parameter,
    ) -> torch.Tensor:
        ctx.owner, ctx.captured, owner.latest = owner, captured, captured
        return captured.forward(inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.owner.latest is not ctx.captured:
            raise RuntimeError("another forward pass has overwritten what this backward pass needs")
        ctx.owner.latest = None
        return (None, None, None, *ctx.captured.backward(incoming))
