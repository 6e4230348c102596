"""The adapter's arithmetic against PEFT's own, on plain, bf16 and quantised bases."""

import copy

import pytest
import torch
from factories import ONE_OF_EACH, build_transformer, error, gaussian, predict
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn

from flux2_ds.config.recipe import Lora
from flux2_ds.model import transformer
from flux2_ds.model.lora import LoraLinear, add_lora, exported_magnitude, lora_config
from flux2_ds.ops.quantized_linear import BASE_WEIGHTS, QuantizedLinear, dequantize

IN, OUT, RANK, ALPHA = 64, 48, 5, 8


def base(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A frozen linear whose rows differ in size."""
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight = nn.Parameter(
        (gaussian(OUT, IN) * torch.linspace(0.02, 2, OUT)[:, None]).to(dtype), requires_grad=False
    )
    return linear


def adapted(
    linear: nn.Module, *, ours: bool, dora: bool, dropout: float = 0.0, begun: bool = True
) -> nn.Module:
    """`linear` with an adapter, in the middle of its training if `begun`: B is not zero, m not ‖W‖."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["linear"], use_dora=dora
    )
    if ours:
        config._register_custom_module({nn.Linear: LoraLinear, QuantizedLinear: LoraLinear})
    layer = inject_adapter_in_model(config, nn.ModuleDict({"linear": linear}))["linear"]
    assert isinstance(layer, LoraLinear) == ours
    with torch.no_grad():
        for seed, parameter in enumerate(trained(layer).values(), start=10):
            parameter.data = parameter.data.float()
            if not begun:
                continue
            if parameter.ndim == 1:
                parameter *= 1 + 0.3 * gaussian(OUT, seed=seed)
            else:
                parameter.copy_(0.3 * gaussian(*parameter.shape, seed=seed))
    return layer


def trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def run(layer: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The output and every gradient, for a fixed input and a fixed gradient of the output."""
    x = gaussian(2, 7, IN, seed=1).to(dtype).requires_grad_()
    torch.manual_seed(0)  # of dropout
    y = layer(x)
    y.backward(gaussian(2, 7, OUT, seed=2).to(y.dtype))
    gradients = {name: p.grad for name, p in trained(layer).items()}
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_fp32_adapter_is_that_of_peft(dora: bool, dropout: float) -> None:
    found = run(adapted(base(), ours=True, dora=dora, dropout=dropout))
    expected = run(adapted(base(), ours=False, dora=dora, dropout=dropout))
    assert found.keys() == expected.keys() and len(found) == (5 if dora else 4)
    for name, value in expected.items():
        assert error(found[name], value) < 2e-6, name


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_for_training_only(dora: bool) -> None:
    dropping = adapted(base(), ours=True, dora=dora, dropout=0.4)
    plain = run(adapted(base(), ours=True, dora=dora))
    assert error(run(dropping)["y"], plain["y"]) > 0.1
    dropping.zero_grad()
    found = run(dropping.eval())
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dora", [False, True])
def test_a_bf16_input_is_computed_in_bf16(dora: bool) -> None:
    """The base and the input in bf16, the adapter in fp32, as in training."""
    expected = run(adapted(base(torch.bfloat16).float(), ours=True, dora=dora))
    layer = adapted(base(torch.bfloat16), ours=True, dora=dora)
    assert all(p.dtype == torch.float32 for p in trained(layer).values())
    found = run(layer, torch.bfloat16)
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert error(found[name], value) < 0.01, name
    assert all(found[name].dtype == torch.float32 for name in trained(layer))


def product_layer(linear: nn.Module, config: PeftConfig) -> nn.Module:
    """`linear` with a LoKr or LoHa in the middle of its training."""
    model = nn.ModuleDict({"linear": linear})
    add_lora(model, config, seed=0)
    for seed, parameter in enumerate(trained(model.linear).values(), start=10):
        parameter.data = 0.3 * gaussian(*parameter.shape, seed=seed)
    return model.linear


PRODUCTS = {
    "loha": LoHaConfig(r=3, alpha=8),
    "lokr": LoKrConfig(r=3, alpha=8, init_weights="lycoris"),
    "of a factor": LoKrConfig(r=1, alpha=8, decompose_factor=8, decompose_both=True),
    "full": LoKrConfig(r=40, alpha=8, decompose_factor=4),
}


@pytest.mark.parametrize("mode", [None, "bf16", "nf4", "int8", "fp8"])
@pytest.mark.parametrize("which", PRODUCTS)
def test_lokr_and_loha_are_those_of_peft(which: str, mode: str | None) -> None:
    """With every gradient; over a quantised base PEFT's over the weight as it is stored. Off, they are the base."""
    config = copy.deepcopy(PRODUCTS[which])
    config.target_modules = ["linear"]
    dtype, linear = torch.float32, base()
    if mode == "bf16":
        dtype, linear = torch.bfloat16, base(torch.bfloat16)
    elif mode is not None:
        linear = QuantizedLinear(linear.weight, *BASE_WEIGHTS[mode])
    plain, quantized = base(), isinstance(linear, QuantizedLinear)
    stored = dequantize(linear.quantized()).bfloat16() if quantized else linear.weight.data
    plain.weight.data = stored.float()
    layer = product_layer(linear, copy.deepcopy(config))
    theirs = inject_adapter_in_model(config, nn.ModuleDict({"linear": plain})).linear
    parameters = trained(layer)
    assert {n: p.shape for n, p in parameters.items()} == {
        n: p.shape for n, p in trained(theirs).items()
    }
    for name, parameter in trained(theirs).items():
        parameter.data = parameters[name].detach().clone()
    found, expected = run(layer, dtype), run(theirs)
    tolerance = {None: 2e-6, "nf4": 0.005, "bf16": 0.02, "int8": 0.02, "fp8": 0.06}[mode]
    for name, value in expected.items():
        assert error(found[name], value) < tolerance, name
    layer.enable_adapters(False)
    with torch.no_grad():
        x = gaussian(3, IN, seed=1).to(dtype)
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("which", ["lokr", "loha"])
def test_a_lokr_or_loha_begins_as_nothing_and_the_same_everywhere(which: str) -> None:
    """And its first gradient is not zero."""
    for mode in (None, "nf4_fp8"):
        model = build_transformer(ONE_OF_EACH, torch.bfloat16, mode)
        transformer.keep_timestep_exact(model)
        before, config = predict(model), lora_config(ONE_OF_EACH, Lora(rank=4), which)
        add_lora(model, config, seed=3)
        assert torch.equal(predict(model), before)
        predict(model).float().square().mean().backward()
        named = transformer.trainable(model)
        assert all(p.dtype == torch.float32 for p in named.values())
        assert sum(bool(p.grad.any()) for p in named.values()) >= 14
        other = build_transformer(ONE_OF_EACH)
        add_lora(other, lora_config(ONE_OF_EACH, Lora(rank=4), which), seed=3)
        for name, parameter in transformer.trainable(other).items():
            assert torch.equal(named[name], parameter)


EMPTY_ROW = 7


def dora_base(mode: str | None, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """A base with a row of zeros, and W as it is stored, in float64."""
    linear = base(dtype)
    linear.weight.data[EMPTY_ROW] = 0
    if mode is None:
        return linear, linear.weight.detach().double()
    quantized = QuantizedLinear(linear.weight, *BASE_WEIGHTS[mode])
    return quantized, dequantize(quantized.quantized()).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [None, *BASE_WEIGHTS])
def test_magnitudes_start_at_the_norms_of_w(mode: str | None, dtype: torch.dtype) -> None:
    """To fp32, whatever W is stored in; so the gain is one, to the last bit, and the base unchanged."""
    linear, weight = dora_base(mode, dtype)
    layer = adapted(linear, ours=True, dora=True, begun=False)
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.dtype == torch.float32
    torch.testing.assert_close(magnitude.double(), weight.norm(dim=1), rtol=1e-6, atol=0)
    with torch.no_grad():
        x = gaussian(3, IN, seed=1).to(dtype)
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("mode", [None, *BASE_WEIGHTS])
def test_dora_is_the_formula_in_float64(mode: str | None) -> None:
    """y = g ∘ (x Wᵀ + s·(x Aᵀ)Bᵀ), g = m / ‖W + s·B·A‖, whose norm has no gradient; where W's row is
    zero, g is 1 and m stays 0. Over all bases, with every gradient."""
    linear, weight = dora_base(mode, torch.float32)
    layer = adapted(linear, ours=True, dora=True)
    x = gaussian(2, 7, IN, seed=1).double().requires_grad_()
    lora_a, lora_b, m = (
        p.detach().double().requires_grad_()
        for p in (
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
            layer.lora_magnitude_vector["default"].weight,
        )
    )
    assert m[EMPTY_ROW] == 0 and layer.scaling["default"] == ALPHA / RANK
    changed = weight + ALPHA / RANK * lora_b @ lora_a
    gain = torch.where(weight.any(1), m / changed.detach().norm(dim=1), 1.0)
    y = x @ changed.t() * gain
    y.backward(gaussian(2, 7, OUT, seed=2).double())
    expected = {"y": y, "x": x.grad, "A": lora_a.grad, "B": lora_b.grad, "magnitude": m.grad}
    found = run(layer)
    tolerance = {None: 2e-6, "nf4": 0.005, "int8": 0.02, "nf4_int8": 0.02}.get(mode, 0.06)
    for (name, value), (key, wanted) in zip(found.items(), expected.items(), strict=True):
        assert key in name and value.isfinite().all() and error(value, wanted) < tolerance, name
    (of_magnitudes,) = (value for name, value in found.items() if "magnitude" in name)
    assert of_magnitudes[EMPTY_ROW] == 0


def test_an_exported_magnitude_gives_other_programs_the_gain_that_was_trained() -> None:
    """They compute m / ‖W + ΔW‖ for every row, with alpha / rank multiplied into A."""
    linear, weight = dora_base(None, torch.float32)
    layer = adapted(linear, ours=True, dora=True)
    lora_a = layer.lora_A["default"].weight.detach() * ALPHA / RANK
    lora_b = layer.lora_B["default"].weight.detach()
    m = layer.lora_magnitude_vector["default"].weight.detach()
    exported = exported_magnitude(m, lora_a, lora_b)
    changed = weight + lora_b.double() @ lora_a.double()
    theirs = gaussian(2, 7, IN, seed=1).double() @ (exported / changed.norm(dim=1) * changed.t())
    assert error(run(layer)["y"], theirs) < 2e-6
    live = torch.arange(OUT) != EMPTY_ROW
    assert torch.equal(exported[live], m[live])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_disabled_adapter_is_the_base(dora: bool, quantized: bool) -> None:
    linear = base(torch.bfloat16)
    if quantized:
        linear = QuantizedLinear(linear.weight, *BASE_WEIGHTS["nf4_fp8"])
    layer = adapted(linear, ours=True, dora=dora)
    x = gaussian(3, IN, seed=1).bfloat16()
    with torch.no_grad():
        enabled = layer(x)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.enable_adapters(True)
        assert torch.equal(layer(x), enabled)
        assert error(enabled, layer.base_layer(x)) > 0.05


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("mode", BASE_WEIGHTS)
def test_a_quantised_base(mode: str, dora: bool) -> None:
    """Like PEFT's adapter over the weight as it is stored, but for the product's own error."""
    storage, compute = BASE_WEIGHTS[mode]
    linear = QuantizedLinear(base().weight, storage, compute)
    plain = base()
    plain.weight.data = dequantize(linear.quantized()).bfloat16().float()
    expected = run(adapted(plain, ours=False, dora=dora))
    found = run(adapted(linear, ours=True, dora=dora))
    tolerance = {"bf16": 0.005, "int8": 0.02, "fp8": 0.06}[compute]
    for name, value in expected.items():
        assert error(found[name], value) < tolerance, name


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("mode", [None, "nf4_fp8"])
def test_a_transformer_with_an_adapter(mode: str | None, dora: bool) -> None:
    """`add_lora` finds plain and quantised linears, in fp32, and every adapter gets a gradient."""
    model = build_transformer(ONE_OF_EACH, torch.bfloat16, mode)
    transformer.keep_timestep_exact(model)
    before = predict(model)
    assert before.dtype == torch.bfloat16
    add_lora(
        model,
        lora_config(ONE_OF_EACH, Lora(rank=4, targets="all"), "dora" if dora else "lora"),
        seed=0,
    )
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(layers) == 14
    expected = nn.Linear if mode is None else QuantizedLinear
    assert all(isinstance(layer.base_layer, expected) for layer in layers)
    assert torch.equal(predict(model), before)  # B is zero
    named = transformer.trainable(model)
    assert len(named) == 14 * (3 if dora else 2)
    assert all(p.dtype == torch.float32 for p in named.values())
    for name, parameter in named.items():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * gaussian(*parameter.shape, seed=3))
    predict(model).float().square().mean().backward()
    for name, parameter in named.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
