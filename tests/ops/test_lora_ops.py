"""A LoRA update beside a frozen linear, forward and backward."""

import pytest
import torch
from factories import error, gaussian

from flux2_ds.ops.lora_ops import lora_add, lora_grads, quantized_lora_linear
from flux2_ds.ops.quantized_linear import (
    BASE_WEIGHTS,
    QuantizedLinear,
    quantize,
    quantized_linear,
)


def factors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, A and B."""
    shapes = (20, 64), (3, 64), (32, 3)
    return [gaussian(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_and_its_gradients(dtype):
    x, lora_a, lora_b = factors(dtype)
    inputs = [gaussian(20, 32, seed=4).to(dtype).requires_grad_(), x.detach() @ lora_a.t(), lora_b]
    inputs[1] = inputs[1].detach().requires_grad_()
    torch.library.opcheck(lora_add, tuple(inputs))
    base, x_a, b = (tensor.detach().double().requires_grad_() for tensor in inputs)
    expected, found = base + x_a @ b.t(), lora_add(*inputs)
    tolerance = 1e-6 if dtype == torch.float32 else 0.005
    assert found.dtype == dtype and error(found, expected) < tolerance
    grad = gaussian(20, 32, seed=3).to(dtype)
    torch.library.opcheck(lora_grads, (grad, *(t.detach() for t in inputs[1:])))
    wanted = torch.autograd.grad(expected, (base, x_a, b), grad.double())
    for ours, theirs in zip(torch.autograd.grad(found, inputs, grad), wanted, strict=True):
        assert ours.dtype == dtype and error(ours, theirs) < tolerance


@pytest.mark.parametrize("mode", BASE_WEIGHTS)
def test_the_fused_linear_is_the_product_and_the_update(mode):
    weight = quantize(gaussian(32, 64), *BASE_WEIGHTS[mode])
    inputs = x, lora_a, lora_b = factors()
    torch.library.opcheck(quantized_lora_linear, (*inputs, *weight))
    together, x_a = quantized_lora_linear(*inputs, *weight)
    assert torch.equal(x_a, x @ lora_a.t())
    apart = lora_add(quantized_linear(x, *weight), x @ lora_a.t(), lora_b)
    assert torch.equal(together, apart)
    grad = gaussian(20, 32, seed=3)
    wanted = torch.autograd.grad(apart, inputs, grad)
    for ours, theirs in zip(torch.autograd.grad(together, inputs, grad), wanted, strict=True):
        assert error(ours, theirs) < 1e-6


@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_a_transposed_copy_is_read_and_changes_no_bit(mode):
    """Of y, of x's gradient and of an adapter's; a copy of another weight is seen in the gradient."""
    linear, grad = QuantizedLinear(gaussian(32, 64), *BASE_WEIGHTS[mode]), gaussian(20, 32, seed=3)
    inputs, found = factors(), []
    for attempt in range(3):
        if attempt:
            linear.cache_transposed()
        if attempt == 2:
            linear.transposed.zero_()
        adapted, _ = quantized_lora_linear(*inputs, *linear.quantized())
        y = linear(inputs[0])
        gradients = torch.autograd.grad(y, inputs[0], grad)
        found.append((y, adapted, *gradients, *torch.autograd.grad(adapted, inputs, grad)))
    assert all(map(torch.equal, *found[:2]))
    assert not found[2][2].any() and not torch.equal(found[2][3], found[0][3])
    assert "transposed" not in linear.state_dict()


@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_the_operator_is_sound_with_a_transposed_copy_and_trained_scales(mode):
    linear = QuantizedLinear(gaussian(32, 64), *BASE_WEIGHTS[mode])
    linear.cache_transposed()
    for scale in (linear.scale, linear.scale.detach().clone().requires_grad_()):
        torch.library.opcheck(quantized_lora_linear, (*factors(), *linear.quantized(scale)))
