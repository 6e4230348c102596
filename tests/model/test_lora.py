"""The adapter's arithmetic against PEFT's own, on plain, bf16 and quantised bases."""

import pytest
import torch
from factories import ONE_OF_EACH, build_transformer, error, gaussian, predict
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flux2_ds.config.recipe import Lora
from flux2_ds.model import transformer
from flux2_ds.model.lora import LoraLinear, add_lora, lora_config
from flux2_ds.ops.quantized_linear import BASE_WEIGHTS, QuantizedLinear

IN, OUT, RANK, ALPHA = 64, 48, 5, 8


def base(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A frozen linear whose rows differ in size."""
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight = nn.Parameter(
        (gaussian(OUT, IN) * torch.linspace(0.02, 2, OUT)[:, None]).to(dtype), requires_grad=False
    )
    return linear


def adapted(linear: nn.Module, *, ours: bool, dora: bool, dropout: float = 0.0) -> nn.Module:
    """`linear` with an adapter in the middle of its training: B is not zero, DoRA's m not ‖W‖."""
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


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Of a bf16 weight PEFT gives ‖W‖ in bf16, whose rounding is up to 1/512.
    [(torch.float32, 1e-5), (torch.bfloat16, 0.004)],
)
def test_the_norms_of_dora(dtype: torch.dtype, tolerance: float) -> None:
    """‖W + s·B·A‖ by rows, without a matrix of the weight's size."""
    layer = adapted(base(dtype), ours=True, dora=True)
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scaling = layer.scaling["default"]
    assert scaling == ALPHA / RANK
    whole = layer.base_layer.weight.float() + scaling * lora_b @ lora_a
    expected = torch.linalg.norm(whole, dim=1)
    found = layer._weight_norm(lora_a, lora_b, scaling, dtype)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    assert not found.requires_grad and found.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_dora_is_the_base_exactly(dtype: torch.dtype) -> None:
    """m is ‖W‖ as the layer itself computes it, so that the gain is one to the last bit."""
    layer = adapted(base(dtype), ours=True, dora=True)
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        layer.lora_magnitude_vector["default"].weight.copy_(layer.base_norm)
        x = gaussian(3, IN, seed=1).to(dtype)
        assert torch.equal(layer(x), layer.base_layer(x))
    expected = torch.linalg.norm(layer.base_layer.weight.float(), dim=1)
    torch.testing.assert_close(layer.base_norm, expected, rtol=0.004, atol=0)


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
    plain.weight.data = linear.weight.float()
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
    add_lora(model, lora_config(ONE_OF_EACH, Lora(rank=4, targets="all"), dora=dora), seed=0)
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
