"""The Triton kernels against the torch expressions of the CPU, and the products on a card."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from factories import error, gaussian, uneven
from torch import nn

from flux2_ds.ops.fp8_linear import Fp8Linear
from flux2_ds.ops.lora_ops import lora_add, quantized_lora_linear
from flux2_ds.ops.quantized_linear import (
    BASE_WEIGHTS,
    MAX,
    QuantizedLinear,
    QuantizedWeight,
    dequantize,
    nf4_table,
    operand,
    quantize,
    quantize_columns,
    quantize_rows,
    turn_rows,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

if torch.cuda.is_available():
    from flux2_ds.ops import quant_kernels as kernels

OPERAND_ERROR = {"bf16": 0.005, "int8": 0.025, "fp8": 0.06}
"""Compute -> the error of a product of bf16 tensors: its operands' and its own rounding to bf16."""


def on_gpu(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(*(part.cuda() if torch.is_tensor(part) else part for part in weight))


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit: both round each product and each sum once, to the nearest, ties to even."""
    assert found.device.type == "cuda" and found.is_contiguous()
    assert found.dtype == expected.dtype and found.shape == expected.shape
    a, b = found.cpu().float(), expected.float()
    wrong = a != b
    assert not wrong.any(), f"{int(wrong.sum())} differ: {a[wrong][:4]}, expected {b[wrong][:4]}"


def skip_without_fp8(compute: str) -> None:
    if compute == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products need compute capability 8.9")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    # One value, odd sizes, the widest row that stays in registers, one that does not, the widest.
    "shape",
    [(1, 1), (3, 100), (300, 320), (9, 2 * 8192), (7, 2 * 8192 + 37), (5, 55296)],
)
def test_rows_are_quantized_as_on_the_cpu(shape, dtype, kind):
    skip_without_fp8(kind)
    x = uneven(*shape).to(dtype)
    x[0] = 0
    for column_scale in (None, torch.logspace(-3, 3, shape[1])[None]):
        expected, expected_scale = quantize_rows(x, column_scale, kind)
        given = None if column_scale is None else column_scale.cuda()
        found, scale = quantize_rows(x.cuda(), given, kind)
        assert_equal(found, expected)
        assert scale.shape == (shape[0], 1) and scale.dtype == torch.float32
        assert_equal(scale, expected_scale)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_rows_of_a_view_are_quantized(kind):
    """Neither the input nor the column scales (a transpose) need be contiguous."""
    skip_without_fp8(kind)
    x, column_scale = gaussian(96, 40).bfloat16(), torch.logspace(-1, 1, 40)[:, None].expand(-1, 2)
    expected, _ = quantize_rows(x[:, 8:], column_scale[8:, :1].t(), kind)
    found, _ = quantize_rows(x.cuda()[:, 8:], column_scale.cuda()[8:, :1].t(), kind)
    assert_equal(found, expected)


def test_int8_rounds_halves_to_even():
    """As torch.round does: a step of 1 makes halves exact."""
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    found, _ = quantize_rows(row.cuda(), None, "int8")
    assert found.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_row_that_is_not_finite_spoils_its_products_and_no_other(kind):
    skip_without_fp8(kind)
    rows = gaussian(4, 300)
    rows[1, 7], rows[2, 299] = math.nan, math.inf
    values, scales = quantize_rows(rows.cuda(), None, kind)
    products = values.float() @ gaussian(300, 8, seed=1).cuda() * scales
    assert products.isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    # One value, tokens that are no multiple of 16, sizes that fill no tile of 128, a real gradient's.
    "shape",
    [(1, 1), (5, 100), (300, 130), (128, 128), (4608, 27648)],
)
def test_columns_are_quantized_as_on_the_cpu(shape, dtype):
    skip_without_fp8("fp8")
    x = (gaussian(*shape) * torch.logspace(-4, 2, shape[1])).to(dtype)
    x[:, 0] = 0
    row_scale = torch.logspace(-2, 2, shape[0])[:, None]
    expected, expected_scale = quantize_columns(x, row_scale)
    found, scale = quantize_columns(x.cuda(), row_scale.cuda())
    tokens = shape[0]
    assert found.shape == (shape[1], -(-tokens // 16) * 16)
    assert not found[:, tokens:].float().any()
    assert_equal(found[:, :tokens].contiguous(), expected)
    assert_equal(scale, expected_scale)
    view = x.cuda().t()  # which is not contiguous
    turned, _ = quantize_columns(view, torch.ones(shape[1], 1).cuda())
    expected, _ = quantize_columns(x.t(), torch.ones(shape[1], 1))
    assert_equal(turned[:, : shape[1]].contiguous(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (5, 100), (300, 130), (4608, 12288)])
def test_rows_are_turned_as_on_the_cpu(shape, dtype):
    skip_without_fp8("fp8")
    x = uneven(*shape).to(dtype)
    _, scale = quantize_rows(x, None, "fp8")
    found, tokens = turn_rows(x.cuda(), scale.cuda()), shape[0]
    assert found.shape == (shape[1], -(-tokens // 16) * 16)
    assert not found[:, tokens:].float().any()
    assert_equal(found[:, :tokens].contiguous(), turn_rows(x, scale))


@pytest.mark.parametrize("tokens", [1, 20, 512, 4613])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_three_products_of_a_trained_linear(tokens, compiled):
    """As on the CPU, where sums are in fp32: the same codes, other sums. Values of one size, so that a scale
    in a wrong place is caught by the CPU's tests alone."""
    skip_without_fp8("fp8")
    plain = nn.Linear(320, 144, bias=False).bfloat16()
    plain.__class__ = Fp8Linear
    results = []
    for layer in (plain, copy.deepcopy(plain).cuda()):
        on_card = layer.weight.is_cuda
        run = torch.compile(layer, fullgraph=True) if compiled and on_card else layer
        x = gaussian(1, tokens, 320, seed=1).bfloat16().to(layer.weight.device).requires_grad_()
        y = run(x)
        y.backward(gaussian(1, tokens, 144, seed=2).bfloat16().to(y.device))
        assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16
        results.append((y, x.grad, layer.weight.grad))
    for name, expected, found in zip(("y", "∂x", "∂W"), *results, strict=True):
        assert error(found, expected) < 0.006, name


def test_what_is_not_finite_reaches_the_weights_gradient():
    skip_without_fp8("fp8")
    x, grad = gaussian(32, 64), gaussian(32, 48, seed=1)
    x[5, 7], x[9, 11] = math.nan, math.inf
    layer = nn.Linear(64, 48, bias=False).bfloat16().cuda()
    layer.__class__ = Fp8Linear
    layer(x.bfloat16().cuda()).backward(grad.bfloat16().cuda())
    assert not layer.weight.grad.isfinite().any()


@pytest.mark.parametrize("mode", ["nf4", "nf4_fp8", "nf4_int8"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (37, 128), (300, 320), (129, 64 * 33)])
def test_nf4_is_expanded_as_on_the_cpu(shape, transposed, mode):
    """Rows that do not fill the kernel's 128, one block of columns and many."""
    skip_without_fp8(BASE_WEIGHTS[mode][1])
    weight = uneven(*shape)
    if shape[0] > 1:
        weight[1] = 0
        weight[0, :64] = 0
    stored = quantize(weight, *BASE_WEIGHTS[mode])
    expected = operand(stored, transposed=transposed)
    assert_equal(operand(on_gpu(stored), transposed=transposed), expected)


@pytest.mark.parametrize("mode", ["fp8", "int8", "nf4"])
def test_a_weight_is_quantized_as_on_the_cpu(mode):
    skip_without_fp8(mode)
    weight = uneven(129, 320)
    on_card = quantize(weight.cuda(), *BASE_WEIGHTS[mode])
    assert all(part.is_cuda for part in on_card if torch.is_tensor(part))
    expected, found = dequantize(quantize(weight, *BASE_WEIGHTS[mode])), dequantize(on_card)
    assert error(found, expected) < 0.003  # a rounded tie here and there
    assert error(found, weight) == pytest.approx(error(expected, weight), rel=0.01)


@pytest.mark.parametrize("shape", [(1, 1), (37, 5), (128, 128), (129, 300)])
def test_a_transpose(shape):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    found = kernels.transpose(x.cuda())
    assert found.is_contiguous() and torch.equal(found.cpu(), x.t())


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 2048), (17, 2 * 2048 + 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_scaled_product(shape, dtype):
    """Sums as large as those of 8-bit products of 24,576 columns: 127² · 24,576 < 2³¹."""
    product = torch.randint(-(2**28), 2**28, shape, dtype=torch.int32)
    rows, columns = gaussian(shape[0], 1).abs(), gaussian(shape[1], 1, seed=1).abs().t()
    found = kernels.scale_product(product.cuda(), rows.cuda(), columns.cuda(), dtype)
    assert found.dtype == dtype
    expected = product.double() * rows * columns
    assert error(found, expected) < (0.003 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("rank", [1, 5, 16, 24, 100])
@pytest.mark.parametrize("shape", [(1, 8), (37, 200), (300, 129)])
def test_a_lora_update_is_added(shape, rank):
    base, x_a = gaussian(*shape).bfloat16(), gaussian(shape[0], rank, seed=1).bfloat16()
    lora_b = gaussian(shape[1], rank, seed=2).bfloat16()
    expected = [t.double().requires_grad_() for t in (base, x_a, lora_b)]
    inputs = [t.cuda().requires_grad_() for t in (base, x_a, lora_b)]
    wanted = expected[0] + expected[1] @ expected[2].t()
    found = lora_add(*inputs)
    assert found.dtype == torch.bfloat16 and found.shape == shape
    assert error(found, wanted) < 0.003
    # Rounded once, after the sum: no value is further off than half a bf16 step.
    torch.testing.assert_close(found.cpu().double(), wanted.detach(), rtol=0.004, atol=1e-4)
    grad = gaussian(*shape, seed=3).bfloat16()
    theirs = torch.autograd.grad(wanted, expected, grad.double())
    for ours, value in zip(torch.autograd.grad(found, inputs, grad.cuda()), theirs, strict=True):
        assert ours.dtype == torch.bfloat16 and error(ours, value) < 0.005


def test_a_lora_update_of_views_is_added():
    """As the adapter makes them: B may be a transpose, the base a slice."""
    base, x_a = gaussian(40, 90).bfloat16().cuda()[:, 10:], gaussian(40, 6).bfloat16().cuda()
    lora_b = gaussian(6, 80).bfloat16().cuda().t()
    expected = base.double() + x_a.double() @ lora_b.double().t()
    assert error(lora_add(base, x_a, lora_b), expected) < 0.003


@pytest.mark.parametrize("rank", [1, 16, 24, 32])
@pytest.mark.parametrize(
    # Less than a tile, several stripes and groups of rows that fill none, one of a real block.
    "shape",
    [(3, 8), (1000, 1250), (4608, 27648)],
)
def test_the_gradients_of_a_lora_update(shape, rank):
    grad, x_a = gaussian(*shape).bfloat16(), gaussian(shape[0], rank, seed=1).bfloat16()
    lora_b = gaussian(shape[1], rank, seed=2).bfloat16()
    inputs = [t.cuda() for t in (grad, x_a, lora_b)]
    found = kernels.lora_grads(*inputs)
    exact = [t.double() for t in inputs]
    expected = exact[0] @ exact[2], exact[0].t() @ exact[1]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == theirs.shape
        assert error(ours, theirs) < 0.003
    # A resumed run repeats what it resumes.
    for again in (kernels.lora_grads(*inputs) for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_the_gradients_of_views():
    """A gradient may come transposed or expanded."""
    grad, x_a, lora_b = (gaussian(*s).bfloat16().cuda() for s in ((90, 40), (6, 40), (90, 6)))
    for given in (grad.t(), grad[0, :40, None].expand(-1, 90)):
        found = kernels.lora_grads(given, x_a.t(), lora_b)
        assert error(found[0], given.double() @ lora_b.double()) < 0.005
        assert error(found[1], given.double().t() @ x_a.t().double()) < 0.005


@pytest.mark.parametrize("mode", BASE_WEIGHTS)
@pytest.mark.parametrize(
    # Tokens, as few as a rank or as the rows of one prompt, and sizes that fill no tile.
    "rows",
    [1, 4, 17, 300],
)
def test_the_product_and_its_gradient(rows, mode):
    """Against the stored weight in float64; rows of W that differ in size by 10⁶ show a lost scale."""
    storage, compute = BASE_WEIGHTS[mode]
    skip_without_fp8(compute)
    linear = QuantizedLinear(uneven(144, 320).cuda(), storage, compute)
    assert all(p.is_cuda for p in linear.parameters())
    exact = dequantize(copy.deepcopy(linear).cpu().quantized()).double()
    x = gaussian(rows, 320, seed=1).bfloat16().cuda().requires_grad_()
    y = linear(x)
    assert y.dtype == torch.bfloat16 and y.shape == (rows, 144)
    expected = x.detach().cpu().double() @ exact.t()
    assert error(y, expected) < OPERAND_ERROR[compute]
    assert error(y / linear.scale.t(), expected / linear.scale.t().cpu()) < OPERAND_ERROR[compute]
    even = gaussian(rows, 144, seed=3).cuda() / linear.scale.t()
    for incoming in (gaussian(rows, 144, seed=2).cuda(), even):
        incoming = incoming.bfloat16()
        (found,) = torch.autograd.grad(y, x, incoming, retain_graph=True)
        assert found.dtype == torch.bfloat16
        assert error(found, incoming.cpu().double() @ exact) < OPERAND_ERROR[compute]


@pytest.mark.parametrize("mode", BASE_WEIGHTS)
@pytest.mark.parametrize("rank", [16, 24])
def test_a_product_with_its_adapter(mode, rank):
    """Against the same on the CPU."""
    storage, compute = BASE_WEIGHTS[mode]
    skip_without_fp8(compute)
    weight = quantize(gaussian(160, 320) * 0.02, storage, compute)
    inputs = [
        gaussian(33, 320, seed=1),
        gaussian(rank, 320, seed=2) / 20,
        gaussian(160, rank, seed=3) / 20,
    ]
    grad, results = gaussian(33, 160, seed=4).bfloat16(), []
    for device in ("cpu", "cuda"):
        given = [tensor.bfloat16().to(device).requires_grad_() for tensor in inputs]
        stored = weight if device == "cpu" else on_gpu(weight)
        y, _ = quantized_lora_linear(*given, *stored)
        results.append((y, *torch.autograd.grad(y, given, grad.to(device))))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16 and error(found, expected) < 0.01


@pytest.mark.parametrize("mode", BASE_WEIGHTS)
def test_the_card_computes_what_the_cpu_computes(mode):
    """The same codes, the same operands: only sums in another order, and their rounding, remain."""
    storage, compute = BASE_WEIGHTS[mode]
    skip_without_fp8(compute)
    linear = QuantizedLinear(gaussian(160, 320) * 0.02, storage, compute)
    on_card = copy.deepcopy(linear).cuda()
    x = gaussian(2, 33, 320, seed=1).bfloat16()
    grad = gaussian(2, 33, 160, seed=2).bfloat16()
    results = []
    for layer, given, incoming in ((linear, x, grad), (on_card, x.cuda(), grad.cuda())):
        given = given.clone().requires_grad_()
        y = layer(given)
        y.backward(incoming)
        results.append((y, given.grad))
    for expected, found in zip(*results, strict=True):
        assert error(found, expected) < 0.006


@pytest.mark.parametrize("mode", BASE_WEIGHTS)
def test_a_compiled_linear(mode):
    storage, compute = BASE_WEIGHTS[mode]
    skip_without_fp8(compute)
    linear = nn.Sequential(nn.SiLU(), QuantizedLinear(gaussian(96, 128).cuda(), storage, compute))
    compiled = torch.compile(linear, fullgraph=True, dynamic=False)
    results = []
    for layer in (linear, compiled):
        x = gaussian(33, 128, seed=1).bfloat16().cuda().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    for expected, found in zip(*results, strict=True):
        assert error(found, expected) < OPERAND_ERROR[compute]


def test_the_units_of_an_int8_nf4_operand():
    """±448 of a block becomes ±127."""
    levels = nf4_table(torch.device("cpu"))
    stored = quantize(MAX["fp8"] * levels.repeat(4)[None].repeat(2, 1), "nf4", "int8")
    found = operand(on_gpu(stored))
    assert found[0, :16].tolist() == (MAX["int8"] * levels).round().tolist()


@pytest.mark.parametrize("transposed", [False, True])
def test_an_nf4_value_halfway_between_two_integers(transposed):
    """±1 in a block of scale 224 is 63.5 of 127: even numbers, as on the CPU."""
    weight = torch.zeros(1, 128)
    weight[0, :2], weight[0, 64:66] = 448.0, torch.tensor([224.0, -224.0])
    stored = on_gpu(quantize(weight, "nf4", "int8"))
    found = operand(stored, transposed=transposed).flatten()
    assert found[64:66].tolist() == [64, -64]
