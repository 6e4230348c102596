"""Trained fp8 linears: their three products against fp32's and torch's own fp8 product, and as an operator."""

import pytest
import torch
from factories import error, gaussian, uneven
from torch import nn

from flux2_ds.ops.fp8_linear import Fp8Linear, fp8_linear
from flux2_ds.ops.quantized_linear import MAX, quantize_columns, quantize_rows, turn_rows

SIZES = {"tokens": 40, "outputs": 48, "features": 64}
HALF_STEP = 2.0**-4
"""e4m3 has three bits behind the first: a value moves by this share of itself at most."""


def passed(linear, x, grad):
    """(y, ∂x, ∂W)."""
    x = x.clone().requires_grad_()
    y = linear(x)
    return y.detach(), *torch.autograd.grad(y, (x, linear.weight), grad)


def linears(weight):
    """An nn.Linear, and the same one with fp8 products."""
    plain, ours = (nn.Linear(*reversed(weight.shape), bias=False) for _ in range(2))
    ours.__class__ = Fp8Linear
    plain.weight.data, ours.weight.data = weight.clone(), weight.clone()
    return plain, ours


def test_columns_are_the_rows_of_the_transpose():
    """With a scale for each row of x, which may be of any size."""
    x, row_scale = uneven(40, 24).t(), torch.logspace(-3, 3, 24)[:, None]
    values, scales = quantize_columns(x / row_scale, row_scale)
    assert values.is_contiguous() and values.shape == (40, 24) and scales.shape == (40, 1)
    for found, wanted in zip(values.float() * scales, x.t(), strict=True):
        assert error(found, wanted) < 0.04


def test_turned_rows_are_the_rows():
    x = uneven(24, 40)
    values, scales = quantize_rows(x, None, "fp8")
    turned = turn_rows(x, scales)
    assert turned.is_contiguous() and torch.equal(turned.float(), values.t().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uneven_in", ["tokens", "outputs", "features"])
def test_the_three_products(uneven_in, dtype):
    """Against fp32's, where tokens or outputs have sizes that differ by 10⁶: a scale in a wrong place would show.
    Features, which share a scale, differ by a hundred: what e4m3 holds with all its bits.

    Of the two products that have that dimension every element is within the bound of the format,
    |Σ ab| ≤ Σ|a||b|·(2·2⁻⁴ + 2⁻⁸), and bf16's.
    """
    sizes = {name: torch.ones(size) for name, size in SIZES.items()}
    most = 1 if uneven_in == "features" else 3
    sizes[uneven_in] = torch.logspace(-most, most, SIZES[uneven_in])
    tokens, outputs, features = sizes.values()
    x = (gaussian(40, 64) * tokens[:, None] * features).to(dtype).view(2, 20, 64)
    weight = (gaussian(48, 64, seed=1) * outputs[:, None] * features).to(dtype)
    grad = (gaussian(40, 48, seed=2) * tokens[:, None] * outputs).to(dtype).view(2, 20, 48)
    found = passed(linears(weight)[1], x, grad)
    exact = passed(linears(weight.float())[0], x.float(), grad.float())
    sums = passed(linears(weight.abs().float())[0], x.abs().float(), grad.abs().float())
    judged = {"tokens": (0, 1), "outputs": (0, 2), "features": (1, 2)}[uneven_in]
    for number in judged:
        assert found[number].dtype == dtype and found[number].shape == exact[number].shape
        off = (found[number].float() - exact[number]).abs()
        assert (off <= sums[number] * (2 * HALF_STEP + HALF_STEP**2 + 2.0**-8)).all(), number
        dimension = 0 if uneven_in == "tokens" or (uneven_in, number) == ("outputs", 2) else 1
        rows = (t[number].flatten(0, -2).transpose(0, dimension) for t in (found, exact))
        for row, wanted in zip(*rows, strict=True):
            assert error(row, wanted) < 0.06, number


def test_what_fp8_costs_on_average():
    """Of gaussian operands each loses 2.6 %, and their errors are independent."""
    plain, ours = linears(gaussian(128, 192, seed=1))
    x, grad = gaussian(256, 192), gaussian(256, 128, seed=2)
    for found, wanted in zip(passed(ours, x, grad), passed(plain, x, grad), strict=True):
        assert error(found, wanted) == pytest.approx(2**0.5 * 0.0264, rel=0.05)


def test_the_products_are_torchs_own():
    """torch multiplies fp8 by rows on the CPU, too: the same operands, and its rounding to bf16."""
    x, weight, grad = (gaussian(*shape, seed=n).bfloat16() for n, shape in
                       enumerate(((48, 64), (80, 64), (48, 80))))  # fmt: skip
    _, ours = linears(weight)

    def scaled_mm(a, b):
        (a, a_scale), (b, b_scale) = a, b
        return torch._scaled_mm(
            a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=torch.bfloat16
        )

    def rows(t):
        return quantize_rows(t, None, "fp8")

    def turned(t):
        return rows(t)[0].t().contiguous(), torch.ones(t.shape[1], 1)

    expected = (
        scaled_mm(rows(x), rows(weight)),
        scaled_mm(rows(grad.float() * rows(weight)[1].t()), turned(weight)),
        scaled_mm(rows((grad.float() * rows(x)[1]).t()), turned(x)),
    )
    for found, wanted in zip(passed(ours, x, grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2.0**-7, atol=1e-3)


def test_zeros_and_values_that_are_not_finite():
    """A token of zeros gives zeros; NaN and infinity reach what they enter, so that no update is made of them."""
    _, ours = linears(gaussian(32, 32))
    x, grad = gaussian(16, 32), gaussian(16, 32, seed=1)
    x[3] = 0
    assert not passed(ours, x, grad)[0][3].any()
    for bad in (torch.nan, torch.inf):
        x[5, 7] = bad
        y, _, grad_weight = passed(ours, x, grad)
        assert not y[5].isfinite().any() and y[:5].isfinite().all()
        assert not grad_weight.isfinite().any()


def test_the_largest_values_are_exact():
    """One value in each row and column: nothing is rounded but by bf16."""
    plain, ours = linears(torch.diag(MAX["fp8"] * torch.arange(1.0, 33)))
    x, grad = torch.diag(torch.arange(1.0, 33)), torch.diag(torch.arange(2.0, 34))
    for found, wanted in zip(passed(ours, x, grad), passed(plain, x, grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_the_operator_is_sound_and_compiles():
    """Shapes for a compiler, no hidden mutation, a registered gradient; one graph with the same values."""
    x, weight = gaussian(20, 64).requires_grad_(), gaussian(32, 64, seed=1).requires_grad_()
    torch.library.opcheck(fp8_linear, (x, weight))
    _, ours = linears(weight.detach())
    compiled = torch.compile(ours, backend="aot_eager_decomp_partition", fullgraph=True)
    x, grad = gaussian(2, 5, 64, seed=1), gaussian(2, 5, 32, seed=2)
    eager = passed(ours, x, grad)
    x = x.requires_grad_()
    y = compiled(x)
    results = (y, *torch.autograd.grad(y, (x, ours.weight), grad))
    assert all(map(torch.equal, eager, results))
