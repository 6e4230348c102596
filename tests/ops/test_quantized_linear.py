"""Quantized linears: what their formats store, and their products, forward and backward."""

import bitsandbytes.functional
import pytest
import torch
from factories import error, gaussian, uneven

from flux2_ds.ops.quantized_linear import (
    BASE_WEIGHTS,
    QuantizedLinear,
    QuantizedWeight,
    dequantize,
    nf4_table,
    operand,
    quantize,
    quantize_rows,
    quantized_linear,
)

CPU = torch.device("cpu")
OPERAND_ERROR = {"bf16": 1e-5, "int8": 0.02, "fp8": 0.05}
"""Compute -> what quantizing a gaussian operand may cost in a product of fp32 tensors."""
every_storage = pytest.mark.parametrize("mode", ["fp8", "int8", "nf4"])
every_mode = pytest.mark.parametrize("mode", BASE_WEIGHTS)


def quantized(weight: torch.Tensor, mode: str) -> QuantizedWeight:
    return quantize(weight, *BASE_WEIGHTS[mode])


def stored(weight: torch.Tensor, mode: str) -> torch.Tensor:
    return dequantize(quantized(weight, mode))


@pytest.mark.parametrize(
    ("mode", "expected", "bits"),
    # int8: steps of a row's largest value, here 3.3 deviations on average, over 127, and an error of
    # step/√12. fp8 and nf4 as measured.
    [("fp8", 0.0264, 8), ("int8", 0.0075, 8), ("nf4", 0.0925, 4.125)],
)
def test_the_error_and_the_size_of_each_format(mode, expected, bits):
    weight = gaussian(256, 512) * 0.02
    assert error(stored(weight, mode), weight) == pytest.approx(expected, rel=0.03)
    w = quantized(weight, mode)
    assert w.values.dtype == torch.uint8 and w.scale.dtype == torch.float32
    by_weight = [part for part in (w.values, w.block_scale) if part is not None]
    assert sum(part.nbytes for part in by_weight) * 8 / weight.numel() == bits
    assert w.scale.shape == (256, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_nf4_is_as_exact_as_bitsandbytes(seed):
    """Against QLoRA's own nf4 with doubly quantized scales, on the same weight; and the same levels."""
    weight = gaussian(256, 512, seed=seed) * 0.02
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    theirs = bitsandbytes.functional.dequantize_4bit(codes, state)
    assert error(stored(weight, "nf4"), weight) == pytest.approx(error(theirs, weight), rel=0.02)
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(nf4_table(CPU), levels)


def test_nf4_codes_by_hand():
    """448 in the row makes its scale 1; the second block's scale is then its largest value, 2."""
    row = torch.zeros(1, 128)
    row[0, :4] = torch.tensor([448.0, -448.0, 0.0, 448 * 0.0796])  # levels 15, 0, 7, 8
    row[0, 64:68] = torch.tensor([2.0, 2 * -0.69, 2 * 0.24, 2 * 0.041])  # levels 15, 1, 10, 8
    w = quantized(row, "nf4")
    assert w.scale.tolist() == [[1.0]]
    assert w.block_scale.view(torch.float8_e4m3fn).float().tolist() == [[448.0, 2.0]]
    assert [hex(byte) for byte in w.values[0, [0, 1, 2, 32, 33, 34]]] == [
        *("0xf0", "0x78", "0x77"),
        *("0xf1", "0xa8", "0x77"),
    ]
    levels = nf4_table(CPU)
    expected = torch.zeros(1, 128)
    expected[0, :4] = 448 * levels[[15, 0, 7, 8]]
    expected[0, 64:68] = 2 * levels[[15, 1, 10, 8]]
    assert torch.equal(dequantize(w), expected)


def test_every_nf4_code_survives():
    weight = 448 * nf4_table(CPU).repeat(3, 8) * torch.tensor([[1.0], [-1.0], [0.5]])
    found = stored(weight, "nf4")
    assert torch.equal(found[[0, 2]], weight[[0, 2]])
    assert (
        found[1].abs().max() == 448
    )  # mirrored levels are not levels: only the extremes are exact


@every_storage
def test_zero_rows_and_zero_blocks_stay_zero(mode):
    weight = gaussian(4, 256)
    weight[1] = 0
    weight[2, 64:128] = 0
    found = stored(weight, mode)
    assert found.isfinite().all()
    assert not found[1].any() and not found[2, 64:128].any()
    assert error(found, weight) < 0.12


@every_storage
def test_every_row_is_as_exact_as_every_other_and_its_largest_value_is_exact(mode):
    weight = uneven(32, 256)
    found = stored(weight, mode)
    place = weight.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(found.gather(1, place), weight.gather(1, place), rtol=1e-6, atol=0)
    errors = [error(a, b) for a, b in zip(found, weight, strict=True)]
    assert max(errors) < 2 * min(errors)  # the largest value of 256 varies that much


def test_nf4_refuses_part_of_a_block():
    with pytest.raises(ValueError, match="a multiple of 64 input features, not 96"):
        quantized(gaussian(2, 96), "nf4")


@pytest.mark.parametrize("mode", ["nf4", "nf4_fp8", "nf4_int8"])
def test_what_a_product_reads_of_nf4(mode):
    """The weight again, without its row scale if 8-bit, and the same when transposed."""
    w = quantized(uneven(24, 128), mode)
    unit, tolerance = {
        "bf16": (1, 0.003),
        "fp8": (w.scale, 0.03),
        "int8": (w.scale * 448 / 127, 0.01),
    }[w.compute]
    assert error(operand(w).float() * unit, dequantize(w)) < tolerance
    turned = operand(w, transposed=True)
    assert turned.is_contiguous() and torch.equal(turned.t().float(), operand(w).float())


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_an_operand_is_quantized_by_rows(kind):
    x, column_scale = uneven(8, 96), torch.logspace(-3, 3, 96)[None]
    for factor in (None, column_scale):
        values, scale = quantize_rows(x.bfloat16(), factor, kind)
        expected = x.bfloat16().float() * (1 if factor is None else factor)
        assert values.element_size() == 1 and scale.shape == (8, 1)
        for row, wanted in zip(values.float() * scale, expected, strict=True):
            assert error(row, wanted) < {"fp8": 0.04, "int8": 0.02}[kind]


def test_int8_rounds_halves_to_even():
    """A step of 1 makes halves exact; ±1 in a block of scale 224 is 63.5 of 127."""
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    values, scale = quantize_rows(row, None, "int8")
    assert scale.tolist() == [[1.0]] and values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    weight = torch.zeros(1, 128)
    weight[0, :2], weight[0, 64:66] = 448.0, torch.tensor([224.0, -224.0])
    assert operand(quantized(weight, "nf4_int8"))[0, 64:66].tolist() == [64, -64]


@every_mode
def test_the_product_and_its_gradient(mode):
    """Against the product with the stored weight, in float64: only the operands' errors remain.

    The rows of W differ in size by 10⁶, so that a gradient without their scales, or with scales in
    another place, would be another one. A gradient of equal parts from every row asks most of that.
    """
    linear = QuantizedLinear(uneven(48, 192), *BASE_WEIGHTS[mode])
    exact = dequantize(linear.quantized()).double()
    if linear.compute == "bf16":
        exact = exact.bfloat16().double()
    x = gaussian(2, 5, 192, seed=1).requires_grad_()
    y = linear(x)
    expected = x.detach().double() @ exact.t()
    assert y.shape == (2, 5, 48) and y.dtype == x.dtype
    # Column by column: each has the size of its row of W.
    for found, wanted in zip(y.detach().unbind(-1), expected.unbind(-1), strict=True):
        assert error(found, wanted) < 2 * OPERAND_ERROR[linear.compute]
    for incoming in (gaussian(2, 5, 48, seed=2), gaussian(2, 5, 48, seed=3) / linear.scale.t()):
        (found,) = torch.autograd.grad(y, x, incoming, retain_graph=True)
        assert error(found, incoming.double() @ exact) < OPERAND_ERROR[linear.compute]


@every_mode
def test_the_weight_is_frozen(mode):
    linear = QuantizedLinear(gaussian(32, 64), *BASE_WEIGHTS[mode])
    x = gaussian(3, 64).requires_grad_()
    linear(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for parameter in linear.parameters():
        assert not parameter.requires_grad and parameter.grad is None
    assert not linear(x.detach()).requires_grad


@every_mode
def test_bf16_and_an_engines_cast(mode):
    """bf16 in, bf16 out. A cast of the module leaves the values, whose dtype is uint8, as they are.

    It rounds the row scales, and with them whole rows, by up to 1/256.
    """
    linear = QuantizedLinear(uneven(48, 128), *BASE_WEIGHTS[mode])
    x = gaussian(6, 128, seed=1).bfloat16()
    before, values, weight = linear(x), linear.values.clone(), dequantize(linear.quantized())
    assert before.dtype == torch.bfloat16
    assert error(before, x.double() @ weight.double().t()) < OPERAND_ERROR[linear.compute] + 0.005
    linear.bfloat16()
    assert linear.values.dtype == torch.uint8 and torch.equal(linear.values, values)
    after = linear(x)
    assert after.dtype == torch.bfloat16
    for found, wanted in zip(after.unbind(-1), before.unbind(-1), strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=1 / 64, atol=0.01 * float(wanted.abs().max())
        )


@every_mode
def test_the_operator_is_sound(mode):
    """Shapes for a compiler, no hidden mutation, a registered gradient."""
    linear = QuantizedLinear(gaussian(32, 64), *BASE_WEIGHTS[mode])
    x = gaussian(20, 64).requires_grad_()
    torch.library.opcheck(quantized_linear, (x, *linear.quantized()))
    if linear.storage != "nf4":
        linear.cache_transposed()
        torch.library.opcheck(quantized_linear, (x, *linear.quantized()))


@every_mode
def test_a_compiled_linear_is_the_same(mode):
    linear = QuantizedLinear(gaussian(32, 64), *BASE_WEIGHTS[mode])
    compiled = torch.compile(linear, backend="aot_eager_decomp_partition", fullgraph=True)
    results = []
    for run in (linear, compiled):
        x = gaussian(2, 5, 64, seed=1).requires_grad_()
        y = run(x)
        y.backward(gaussian(2, 5, 32, seed=2))
        results.append((y, x.grad))
    assert all(map(torch.equal, *results))
