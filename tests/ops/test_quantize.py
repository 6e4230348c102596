"""Quantised linears: what their formats store, and their products, forward and backward."""

import copy
from pathlib import Path

import bitsandbytes.functional
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file
from torch import nn

from flux2_ds.config.model_spec import Spec
from flux2_ds.errors import UserError
from flux2_ds.model.load import place_weight, read_weights
from flux2_ds.model.transformer import new_transformer
from flux2_ds.ops import quantized_linear as quantize_module
from flux2_ds.ops.lora_ops import adapted_product, add_low_rank, low_rank_gradients
from flux2_ds.ops.quantized_linear import (
    BASE_WEIGHTS,
    QuantizedLinear,
    dequantize,
    expand_nf4,
    frozen_product,
    nf4_table,
    quantize,
    quantize_rows,
)

MODES = list(BASE_WEIGHTS)
OPERAND_ERROR = {"bf16": 1e-5, "int8": 0.02, "fp8": 0.05}
"""Compute -> what quantising a gaussian operand may cost in a product of fp32 tensors."""


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(rows: int, columns: int) -> torch.Tensor:
    """A gaussian weight whose rows differ in size by up to 10⁶."""
    return gaussian(rows, columns) * torch.logspace(-4, 2, rows)[:, None]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = found.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()


def stored(weight: torch.Tensor, storage: str) -> torch.Tensor:
    return dequantize(*quantize(weight, storage), storage)


@pytest.mark.parametrize(
    ("storage", "expected", "bits"),
    # int8: steps of a row's largest value, here 3.3 deviations on average, over 127, and an error of
    # step/√12. fp8 and nf4 as measured.
    [("fp8", 0.0264, 8), ("int8", 0.0075, 8), ("nf4", 0.0925, 4.125)],
)
def test_the_error_and_the_size_of_each_format(storage, expected, bits):
    weight = gaussian(256, 512) * 0.02
    assert error(stored(weight, storage), weight) == pytest.approx(expected, rel=0.03)
    values, block_scale, scale = quantize(weight, storage)
    assert values.dtype == torch.uint8 and scale.dtype == torch.float32
    by_weight = [values] if block_scale is None else [values, block_scale]
    assert sum(part.nbytes for part in by_weight) * 8 / weight.numel() == bits
    assert scale.shape == (256, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_nf4_is_as_exact_as_bitsandbytes(seed):
    """Against QLoRA's own nf4 with doubly quantised scales, on the same weight."""
    weight = gaussian(256, 512, seed=seed) * 0.02
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    theirs = bitsandbytes.functional.dequantize_4bit(codes, state)
    assert error(stored(weight, "nf4"), weight) == pytest.approx(error(theirs, weight), rel=0.02)


def test_the_nf4_levels_are_those_of_bitsandbytes():
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(nf4_table(torch.device("cpu")), levels)


def test_nf4_codes_by_hand():
    """448 in the row makes its scale 1; the second block's scale is then its largest value, 2."""
    row = torch.zeros(1, 128)
    row[0, :4] = torch.tensor([448.0, -448.0, 0.0, 448 * 0.0796])  # levels 15, 0, 7, 8
    row[0, 64:68] = torch.tensor([2.0, 2 * -0.69, 2 * 0.24, 2 * 0.041])  # levels 15, 1, 10, 8
    values, block_scale, scale = quantize(row, "nf4")
    assert scale.tolist() == [[1.0]]
    assert block_scale.view(torch.float8_e4m3fn).float().tolist() == [[448.0, 2.0]]
    assert [hex(byte) for byte in values[0, [0, 1, 2, 32, 33, 34]]] == [
        *("0xf0", "0x78", "0x77"),
        *("0xf1", "0xa8", "0x77"),
    ]
    levels = nf4_table(row.device)
    expected = torch.zeros(1, 128)
    expected[0, :4] = 448 * levels[[15, 0, 7, 8]]
    expected[0, 64:68] = 2 * levels[[15, 1, 10, 8]]
    assert torch.equal(dequantize(values, block_scale, scale, "nf4"), expected)


def test_every_nf4_code_survives():
    levels = nf4_table(torch.device("cpu"))
    weight = 448 * levels.repeat(3, 8) * torch.tensor([[1.0], [-1.0], [0.5]])
    expected = weight.clone()
    expected[1] = 0  # mirrored levels are not levels: only this row's extremes are checked
    found = stored(weight, "nf4")
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[1].abs().max() == 448


@pytest.mark.parametrize("storage", ["fp8", "int8", "nf4"])
def test_zero_rows_and_zero_blocks_stay_zero(storage):
    weight = gaussian(4, 256)
    weight[1] = 0
    weight[2, 64:128] = 0
    found = stored(weight, storage)
    assert found.isfinite().all()
    assert not found[1].any() and not found[2, 64:128].any()
    assert error(found, weight) < 0.12


@pytest.mark.parametrize("storage", ["fp8", "int8", "nf4"])
def test_the_largest_value_of_a_row_is_exact(storage):
    weight = uneven(16, 128)
    place = weight.abs().argmax(1, keepdim=True)
    found, expected = stored(weight, storage).gather(1, place), weight.gather(1, place)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("storage", ["fp8", "int8", "nf4"])
def test_every_row_is_as_exact_as_every_other(storage):
    weight = uneven(32, 256)
    found = stored(weight, storage)
    errors = [error(a, b) for a, b in zip(found, weight, strict=True)]
    assert max(errors) < 2 * min(errors)  # the largest value of 256 varies that much


def test_nf4_refuses_part_of_a_block():
    with pytest.raises(ValueError, match="a multiple of 64 input features, not 96"):
        quantize(gaussian(2, 96), "nf4")


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8"])
def test_what_a_product_reads_of_nf4(kind):
    """The weight again, without its row scale if 8-bit, and the same when transposed."""
    values, block_scale, scale = quantize(uneven(24, 128), "nf4")
    weight = dequantize(values, block_scale, scale, "nf4")
    operand = expand_nf4(values, block_scale, scale, kind)
    found = operand.float() * {"bf16": 1, "fp8": scale, "int8": scale * 448 / 127}[kind]
    assert error(found, weight) < {"bf16": 0.003, "fp8": 0.03, "int8": 0.01}[kind]
    turned = expand_nf4(values, block_scale, scale, kind, transposed=True)
    assert turned.is_contiguous() and torch.equal(turned.t().float(), operand.float())


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_an_operand_is_quantised_by_rows(kind):
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
    assert expand_nf4(*quantize(weight, "nf4"), "int8")[0, 64:66].tolist() == [64, -64]


@pytest.mark.parametrize("mode", MODES)
def test_the_product_and_its_gradient(mode):
    """Against the product with the stored weight, in float64: only the operands' errors remain.

    The rows of W differ in size by 10⁶, so that a gradient without their scales, or with scales in
    another place, would be another one. A gradient of equal parts from every row asks most of that.
    """
    storage, compute = BASE_WEIGHTS[mode]
    weight = uneven(48, 192)
    linear = QuantizedLinear(weight, storage, compute)
    exact = dequantize(linear.values, linear.block_scale, linear.scale, storage).double()
    if compute == "bf16":
        exact = exact.bfloat16().double()
    x = gaussian(2, 5, 192, seed=1).requires_grad_()
    y = linear(x)
    expected = x.detach().double() @ exact.t()
    assert y.shape == (2, 5, 48) and y.dtype == x.dtype
    # Column by column: each has the size of its row of W.
    for found, wanted in zip(y.detach().unbind(-1), expected.unbind(-1), strict=True):
        assert error(found, wanted) < 2 * OPERAND_ERROR[compute]
    for incoming in (gaussian(2, 5, 48, seed=2), gaussian(2, 5, 48, seed=3) / linear.scale.t()):
        (found,) = torch.autograd.grad(y, x, incoming, retain_graph=True)
        assert error(found, incoming.double() @ exact) < OPERAND_ERROR[compute]


@pytest.mark.parametrize("mode", MODES)
def test_the_weight_is_frozen(mode):
    linear = QuantizedLinear(gaussian(32, 64), *BASE_WEIGHTS[mode])
    x = gaussian(3, 64).requires_grad_()
    linear(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for parameter in linear.parameters():
        assert not parameter.requires_grad and parameter.grad is None
    assert not linear(x.detach()).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_bf16_and_an_engines_cast(mode):
    """bf16 in, bf16 out. A cast of the module leaves the values, whose dtype is uint8, as they are.

    It rounds the row scales, and with them whole rows, by up to 1/256.
    """
    linear = QuantizedLinear(uneven(48, 128), *BASE_WEIGHTS[mode])
    x = gaussian(6, 128, seed=1).bfloat16()
    before, values, weight = linear(x), linear.values.clone(), linear.weight
    assert before.dtype == weight.dtype == torch.bfloat16
    assert error(before, x.double() @ weight.double().t()) < OPERAND_ERROR[linear.compute] + 0.005
    linear.bfloat16()
    assert linear.values.dtype == torch.uint8 and torch.equal(linear.values, values)
    after = linear(x)
    assert after.dtype == torch.bfloat16
    for found, wanted in zip(after.unbind(-1), before.unbind(-1), strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=1 / 64, atol=0.01 * float(wanted.abs().max())
        )


@pytest.mark.parametrize("mode", MODES)
def test_the_products_are_sound_operators(mode):
    """Shapes for a compiler, no hidden mutation, a registered gradient."""
    storage, compute = BASE_WEIGHTS[mode]
    x = gaussian(20, 64).requires_grad_()
    weight = quantize(gaussian(32, 64), storage)
    torch.library.opcheck(frozen_product, (x, *weight, storage, compute))
    if storage != "nf4":
        turned = weight[0].t().contiguous()
        torch.library.opcheck(frozen_product, (x, *weight, storage, compute, turned))
        down, up = gaussian(3, 64).requires_grad_(), gaussian(32, 3).requires_grad_()
        torch.library.opcheck(adapted_product, (x, down, up, *weight, storage, compute, turned))
        weight[2].requires_grad_()
        torch.library.opcheck(adapted_product, (x, down, up, *weight, storage, compute, turned))


@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_weights_held_transposed_change_no_bit(mode, monkeypatch):
    """Of y, of x's gradient and of an adapter's; and the backward pass turns nothing around."""
    linear, grad = QuantizedLinear(gaussian(32, 64), *BASE_WEIGHTS[mode]), gaussian(20, 32, seed=3)
    inputs = [
        gaussian(*s, seed=i).requires_grad_() for i, s in enumerate([(20, 64), (3, 64), (32, 3)])
    ]
    found, turned = [], []
    for held in (False, True):
        if held:
            linear.hold_transposed()
            monkeypatch.setattr(quantize_module, "_transpose", turned.append)
        base = linear.values, None, linear.scale, linear.storage, linear.compute, linear.transposed
        adapted, _ = adapted_product(*inputs, *base)
        x, y = inputs[0], linear(inputs[0])
        found.append(
            (
                y,
                adapted,
                *torch.autograd.grad(y, x, grad),
                *torch.autograd.grad(adapted, inputs, grad),
            )
        )
    assert all(map(torch.equal, *found)) and not turned
    assert "transposed" not in linear.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_a_low_rank_product(dtype):
    shapes = (6, 10), (6, 3), (10, 3)
    inputs = [gaussian(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate(shapes)]
    torch.library.opcheck(add_low_rank, tuple(inputs))
    base, narrow, up = (tensor.detach().double().requires_grad_() for tensor in inputs)
    expected, found = base + narrow @ up.t(), add_low_rank(*inputs)
    tolerance = 1e-6 if dtype == torch.float32 else 0.005
    assert found.dtype == dtype and error(found, expected) < tolerance
    grad = gaussian(6, 10, seed=3).to(dtype)
    torch.library.opcheck(low_rank_gradients, (grad, *(t.detach() for t in inputs[1:])))
    wanted = torch.autograd.grad(expected, (base, narrow, up), grad.double())
    for ours, theirs in zip(torch.autograd.grad(found, inputs, grad), wanted, strict=True):
        assert ours.dtype == dtype and error(ours, theirs) < tolerance


@pytest.mark.parametrize("mode", MODES)
def test_a_product_with_its_adapter_is_both(mode):
    storage, compute = BASE_WEIGHTS[mode]
    weight = quantize(gaussian(32, 64), storage)
    inputs = [
        gaussian(*s, seed=i).requires_grad_() for i, s in enumerate([(20, 64), (3, 64), (32, 3)])
    ]
    torch.library.opcheck(adapted_product, (*inputs, *weight, storage, compute))
    x, down, up = inputs
    together, _ = adapted_product(*inputs, *weight, storage, compute)
    apart = add_low_rank(frozen_product(x, *weight, storage, compute), x @ down.t(), up)
    assert torch.equal(together, apart)
    grad = gaussian(20, 32, seed=3)
    wanted = torch.autograd.grad(apart, inputs, grad)
    for ours, theirs in zip(torch.autograd.grad(together, inputs, grad), wanted, strict=True):
        assert error(ours, theirs) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_linear_is_the_same(mode):
    linear = QuantizedLinear(gaussian(32, 64), *BASE_WEIGHTS[mode])
    x = gaussian(2, 5, 64, seed=1).requires_grad_()
    compiled = torch.compile(linear, backend="aot_eager_decomp_partition", fullgraph=True)
    grad = gaussian(2, 5, 32, seed=2)
    for run in (linear, compiled):
        x.grad = None
        y = run(x)
        y.backward(grad)
        if run is linear:
            expected = y.detach(), x.grad
    assert torch.equal(y, expected[0]) and torch.equal(x.grad, expected[1])


def small_model() -> Flux2Transformer2DModel:
    """One block of each kind, 64 wide, so that nf4 can hold its linears."""
    torch.manual_seed(0)
    spec = Spec("klein", "Flux2KleinPipeline", 1, 1, 2, 32, 64, guidance=False)
    return new_transformer(spec).requires_grad_(False)


def output(model: Flux2Transformer2DModel) -> torch.Tensor:
    dtype = model.x_embedder.weight.dtype
    with torch.no_grad():
        return model(
            hidden_states=gaussian(1, 6, 128, seed=1).to(dtype),
            encoder_hidden_states=gaussian(1, 4, 64, seed=2).to(dtype),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(6, 4),
            txt_ids=torch.zeros(4, 4),
        ).sample


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_model_read_from_its_files(mode: str | None, tmp_path: Path) -> None:
    """Every linear of the blocks is quantised, nothing else, and the model computes with them."""
    original = small_model()
    save_file(original.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    with torch.device("meta"):
        model = small_model()
    read_weights(model, tmp_path, torch.float32, torch.device("cpu"), mode)
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    linears = {
        name
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name
    }
    assert found.keys() == (linears if mode else set())
    plain = copy.deepcopy(original)
    for name, module in found.items():
        assert (module.storage, module.compute) == BASE_WEIGHTS[mode]
        plain.get_submodule(name).weight.data = module.weight.float()
    parameters = dict(model.named_parameters())
    for name, weight in original.named_parameters():
        if name.rpartition(".")[0] not in found:
            assert torch.equal(parameters[name], weight), name
    compute = "bf16" if mode is None else BASE_WEIGHTS[mode][1]
    difference = error(output(model), output(plain))
    assert difference < {"bf16": 0.002, "int8": 0.02, "fp8": 0.05}[compute]


def test_a_models_dtype_is_not_that_of_its_files(tmp_path: Path) -> None:
    save_file(small_model().state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    with torch.device("meta"):
        model = small_model()
    read_weights(model, tmp_path, torch.bfloat16, torch.device("cpu"), "nf4")
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {
        "weight": torch.bfloat16,
        "values": torch.uint8,
        "block_scale": torch.uint8,
        "scale": torch.float32,
    }
    assert output(model).dtype == torch.bfloat16


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    state = small_model().state_dict()
    name = "single_transformer_blocks.0.attn.to_out.weight"
    state[name] = state[name][:, :64].contiguous()
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with torch.device("meta"):
        model = small_model()
    with pytest.raises(UserError, match=rf"{name} has the shape \(64, 64\), config.json asks for"):
        read_weights(model, tmp_path, torch.float32, torch.device("cpu"), "fp8")


def test_where_a_weight_is_placed() -> None:
    """Matrices of blocks are quantised; vectors, and matrices elsewhere, are not."""
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "embedder": nn.Linear(64, 8, bias=False),
                "transformer_blocks": nn.ModuleList([nn.ModuleDict()]),
            }
        )
        model["transformer_blocks"][0]["linear"] = nn.Linear(64, 8, bias=False)
        model["transformer_blocks"][0]["norm"] = nn.RMSNorm(64)
    for name, parameter in dict(model.named_parameters()).items():
        place_weight(model, name, gaussian(*parameter.shape), "int8")
    block = model["transformer_blocks"][0]
    assert isinstance(block["linear"], QuantizedLinear)
    assert isinstance(block["norm"], nn.RMSNorm)
    assert torch.equal(block["norm"].weight, gaussian(64))
    assert torch.equal(model["embedder"].weight, gaussian(8, 64))
