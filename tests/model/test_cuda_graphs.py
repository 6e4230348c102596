"""Replayed passes: what autograd and its users see of them. The capture here runs the pass again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from factories import ONE_OF_EACH, build_adapted, predict
from torch import nn

from flux2_ds.model.activation_checkpointing import configure_blocks
from flux2_ds.model.cuda_graphs import use_cuda_graphs
from flux2_ds.model.transformer import trainable
from flux2_ds.training.progress import compiled_graphs


class Squares(nn.Module):
    """Something with a forward pass that is called as a transformer is."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.trained = nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
        self.used = [self.trained.weight]
        hidden = self.frozen(x) ** 2 * scale
        return (self.trained(hidden if self.training else self.dropout(hidden)),)


class Capture:
    """Counts what is captured and replayed."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


def pair() -> tuple[Squares, Squares, Capture]:
    """The same model twice, the second one replayed."""
    torch.manual_seed(0)
    plain, replayed, capture = Squares(), Squares(), Capture()
    replayed.load_state_dict(plain.state_dict())
    use_cuda_graphs(replayed, capture)
    return plain, replayed, capture


def backward(model: nn.Module, **inputs: Any) -> float:
    loss = model(**inputs)[0].square().mean()
    loss.backward()
    return loss.item()


def test_gradients_of_several_shapes_are_summed_as_ever():
    """Captured gradients lie in one place for all shapes, which autograd must not be given itself."""
    plain, replayed, capture = pair()
    for place, number in enumerate((2, 5, 2, 2, 5, 2, 5, 5)):
        if place == 4:
            plain.zero_grad()
            replayed.zero_grad()
        x = torch.randn(number, 3)
        assert backward(plain, x=x) == backward(replayed, x=x)
        for one, other in zip(plain.parameters(), replayed.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)
    assert (capture.captured, capture.replayed) == (4, 2 * 6)


def test_an_update_is_seen_and_values_that_are_no_tensors_are_shapes_of_their_own():
    plain, replayed, capture = pair()
    for scale in (1.0, 1.0, 1.0, 2.0, 2.0, 2.0):
        x = torch.randn(4, 3)
        assert backward(plain, x=x, scale=scale) == backward(replayed, x=x, scale=scale)
        for model in (plain, replayed):
            with torch.no_grad():
                for parameter in model.trained.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    assert capture.captured == 4


def test_what_is_no_training_is_not_replayed():
    _, replayed, capture = pair()
    x = torch.randn(2, 3)
    for _ in range(3):
        with torch.no_grad():
            replayed(x=x)
        replayed.eval()(x=x)
        replayed.train()
    assert capture.captured == 0
    backward(replayed, x=x)
    backward(replayed, x=x)
    assert capture.captured == 2
    with torch.no_grad():
        assert not replayed(x=x)[0].requires_grad
    assert capture.replayed == 2


def test_a_backward_pass_whose_memory_was_used_again_is_refused():
    _, replayed, _ = pair()
    one, other = torch.randn(2, 3), torch.randn(5, 3)
    for x in (one, other):
        backward(replayed, x=x)
    first = replayed(x=one)[0].sum()
    replayed(x=other)
    with pytest.raises(RuntimeError, match="another forward pass has overwritten"):
        first.backward()
    first = replayed(x=one)[0].sum()
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="another forward pass has overwritten"):
        first.backward()


def test_a_captured_pass_has_parameters_of_its_own():
    """Autograd, or a hook of ZeRO's, may remember for a model's own the stream of their gradients."""
    _, replayed, _ = pair()
    x, own = torch.randn(2, 3), replayed.trained.weight
    backward(replayed, x=x)
    assert replayed.used[0] is own
    backward(replayed, x=x)
    (used,) = replayed.used
    assert used is not own and used.data_ptr() == own.data_ptr() and used.grad is None
    assert replayed.trained.weight is own


def test_a_parameter_that_has_moved_is_refused():
    """A graph would read its old place."""
    _, replayed, _ = pair()
    x = torch.randn(2, 3)
    backward(replayed, x=x)
    backward(replayed, x=x)
    replayed.trained.weight.data = replayed.trained.weight.data.clone()
    with pytest.raises(RuntimeError, match="has moved in memory"):
        replayed(x=x)


@pytest.mark.parametrize("base", [None, "fp8"])
def test_a_captured_pass_compiles_nothing(base, monkeypatch):
    """Nothing can be compiled while a graph is captured."""
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition")
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        model = build_adapted(ONE_OF_EACH, base)
        configure_blocks(model, checkpointed=1, compiled=True, attention=None)
        plain = gradients_of(model)
        capture = Capture()
        use_cuda_graphs(model, capture)
        gradients_of(model)
        known = compiled_graphs()
        replayed = gradients_of(model)
        assert compiled_graphs() == known and capture.captured == 2
    assert replayed.keys() == plain.keys()
    for name, gradient in plain.items():
        assert gradient.any() and torch.equal(replayed[name], gradient), name


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    predict(model).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in trainable(model).items()}
