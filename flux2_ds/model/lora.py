"""The adapter: its configuration, its arithmetic, and its names in a file.

PEFT owns the configuration, the parameters and the file format; the layers here replace the arithmetic.
PEFT multiplies in the adapter's own dtype, which is fp32 here: on a 55,296 wide output that is slower
than the frozen product beside it. And its DoRA materializes B·A and W + B·A in every forward pass, its LoKr
and LoHa ΔW.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners import loha, lokr, lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.nn import functional

from flux2_ds.config.adapter import adapted_linears, common_factor, of_rank
from flux2_ds.config.adapter_file import bfl_place, parts_of
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Lora
from flux2_ds.model.adapter_layouts import (
    Adapter,
    Hadamard,
    Kronecker,
    Update,
    all_tensors,
    change_rank,
    columns_of,
    multiplied,
)
from flux2_ds.ops.lora_ops import lora_add, quantized_lora_linear
from flux2_ds.ops.quantized_linear import QuantizedLinear, dequantize

ADAPTER = "default"


def lora_config(spec: Spec, settings: Lora, method: str = "lora") -> PeftConfig:
    """PEFT's description of the adapter; A is drawn from N(0, 1/r²), B is zero."""
    linears = adapted_linears(spec, settings)
    alpha = settings.rank if settings.alpha is None else settings.alpha
    common: dict[str, Any] = {
        "r": settings.rank,
        # A name is a pattern that matches itself alone.
        "rank_pattern": {n: each.rank for n, each in linears.items() if each.rank != settings.rank},
        "alpha_pattern": {n: each.alpha for n, each in linears.items() if each.alpha != alpha},
        "target_modules": list(linears),
    }
    if method == "loha":
        return LoHaConfig(alpha=alpha, **common)
    if method == "lokr":
        return LoKrConfig(
            alpha=alpha,
            decompose_factor=settings.factor or -1,
            decompose_both=settings.decompose_both,
            init_weights="lycoris",
            **common,
        )
    return LoraConfig(
        lora_alpha=alpha,
        use_rslora=settings.rslora,
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian",
        use_dora=method == "dora",
        **common,
    )


def config_of(adapter: Adapter) -> PeftConfig:
    """PEFT's description of an adapter that is there, with nothing left to scale."""
    ranks = {name: change_rank(change) for name, change in adapter.items()}
    rank = max(ranks.values())
    others = {name: each for name, each in ranks.items() if each != rank}
    common = {
        "r": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(adapter),
    }
    changes = list(adapter.values())
    if isinstance(changes[0], Hadamard):
        return LoHaConfig(alpha=rank, **common)
    if isinstance(changes[0], Kronecker):
        shapes = [(w1.shape, (w2[0].shape[0], w2[-1].shape[1])) for w1, w2 in changes]
        factor = common_factor("the LoKr", shapes)
        return LoKrConfig(alpha=rank, decompose_factor=factor or -1, **common)
    dora = any(update.magnitude is not None for update in changes)
    return LoraConfig(lora_alpha=rank, init_lora_weights="gaussian", use_dora=dora, **common)


def add_lora(model: Flux2Transformer2DModel, config: PeftConfig, seed: int) -> None:
    """Freeze the base and add an adapter in fp32, initialized from `seed` alone.
    Refuses a target that matches no module.
    """
    model.requires_grad_(False)
    targeted = len(config.target_modules or ())  # PEFT shortens the list when it injects
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        if isinstance(config, LoraConfig):
            config._register_custom_module({nn.Linear: LoraLinear, QuantizedLinear: LoraLinear})
            # PEFT does not know QuantizedLinear, which LoraLinear is made for.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            model.add_adapter(config, adapter_name=ADAPTER)
        else:
            _add_product(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    adapted = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    if adapted != targeted:
        raise ValueError(f"{adapted} linears adapted, {targeted} targeted")


def _add_product(model: nn.Module, config: PeftConfig) -> None:
    """Put PEFT's LoKr or LoHa over linears, which PEFT itself does over `nn.Linear` alone."""
    kind = LoKrLinear if isinstance(config, LoKrConfig) else LoHaLinear
    named = [(name, m) for name, m in model.named_modules() if name in config.target_modules]
    for name, linear in named:
        rank = (config.rank_pattern or {}).get(name, config.r)
        alpha = (config.alpha_pattern or {}).get(name, config.alpha)
        # PEFT reads sizes and device alone; the weight may be quantized or partitioned.
        sizes = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        one = torch.zeros(1, device=next(linear.parameters()).device)
        sizes.weight = nn.Parameter(one.expand(sizes.weight.shape), requires_grad=False)
        layer = kind(sizes, ADAPTER, config=config, r=rank, alpha=alpha)
        layer.base_layer = linear
        model.set_submodule(name, layer)


@torch.no_grad()
def set_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Let the model's adapter change its linears as `adapter` does, which has an update for each."""
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    for name, layer in layers.items():
        change, rank = adapter[name], layer.r[ADAPTER]
        if not isinstance(change, Kronecker) and change_rank(change) != rank:
            # Of one module for q, k and v, with their factors one after the other.
            beside = [part for part in parts_of(bfl_place(name).module) if part in layers]
            start = sum(layers[part].r[ADAPTER] for part in beside[: beside.index(name)])
            change = columns_of(change, slice(start, start + rank))
        if isinstance(change, Update):
            layer.lora_A[ADAPTER].weight.copy_(change.down / layer.scaling[ADAPTER])
            layer.lora_B[ADAPTER].weight.copy_(change.up)
            if change.magnitude is not None:
                held = layer.lora_magnitude_vector[ADAPTER].weight
                magnitude = change.magnitude.to(held)
                held.copy_(torch.where(held == 0, 0.0, magnitude))  # 0 for a row of zeros in W
            continue
        ends = [end for end in layer.adapter_layer_names if ADAPTER in getattr(layer, end)]
        if isinstance(change, Kronecker) and len(ends) < len(all_tensors(change)):
            change = change._replace(
                w2=(change.w2[0] @ change.w2[1],)
            )  # of a rank at which ours is full
        for end, tensor in zip(
            ends, all_tensors(multiplied(change, 1 / layer.scaling[ADAPTER])), strict=True
        ):
            getattr(layer, end)[ADAPTER].copy_(tensor)


class LoraLinear(lora.Linear):
    """y = x Wᵀ + s·(x Aᵀ)Bᵀ; with DoRA (arXiv 2402.09353), rows scaled by m / ‖W + s·B·A‖.

    A [r, K], B [N, r] and m [N] are fp32 parameters, cast to x's dtype where they multiply it. m starts
    at the norms of W's rows. A row of zeros has none to scale: it keeps a gain of 1, and m stays 0 there.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        if adapter_name in self.lora_magnitude_vector:
            norm = _row_norms(base_layer)  # PEFT's own are in W's dtype
            self.lora_magnitude_vector[adapter_name].weight.data = norm.clone()
            self.register_buffer("base_norm", norm, persistent=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        if self.disable_adapters or self.merged:
            plain: torch.Tensor = super().forward(x, *args, **kwargs)
            return plain
        (adapter,) = self.active_adapters
        lora_a, lora_b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        scaling, gain = self.scaling[adapter], None
        if adapter in self.lora_magnitude_vector:
            magnitude, nonzero = self.lora_magnitude_vector[adapter].weight, self.base_norm > 0
            norm = self._weight_norm(lora_a, lora_b, scaling, x.dtype)
            gain = torch.where(nonzero, magnitude / torch.where(nonzero, norm, 1.0), 1.0)
        dropped = self.lora_dropout[adapter](x)
        if isinstance(self.base_layer, QuantizedLinear) and dropped is x:
            scale: torch.Tensor = self.base_layer.scale
            if gain is not None and self.base_layer.compute != "bf16":
                # gain ∘ (x Wᵀ + x_a Bᵀ) without a pass over it: an 8-bit product applies the scales of
                # W's rows to its sums. In bf16 W would be rounded with its gain.
                scale, lora_b, gain = scale * gain[:, None], lora_b * gain[:, None], None
            y = _fused_linear(self.base_layer, x, scaling * lora_a, lora_b, scale)
        else:
            x_a = functional.linear(dropped, (scaling * lora_a).to(x.dtype))
            y = _add(self.base_layer(x), x_a, lora_b)
        if gain is None:
            return y
        # Less one, because near one 16 bits are coarse. Like PEFT, DoRA's part of the base product sees the
        # dropped input too.
        inner = y if dropped is x else _add(self.base_layer(dropped), x_a, lora_b)
        return y + (gain - 1).to(x.dtype) * inner

    @torch.no_grad()
    def _weight_norm(
        self, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """‖W + s·B·A‖ by rows, [N] fp32, constant for the gradient as in the paper's section 4.3.

        ‖w + s·bA‖² = ‖w‖² + 2s·b·(A w) + s²·b(A Aᵀ)bᵀ needs no N × K intermediate.
        """
        projected = self.base_layer(lora_a.to(dtype)).float().t()
        cross = (projected * lora_b).sum(-1)
        square = ((lora_b @ (lora_a @ lora_a.t())) * lora_b).sum(-1)
        return (self.base_norm.float() ** 2 + 2 * scaling * cross + scaling**2 * square).sqrt()


class LoKrLinear(lokr.Linear):
    """y = x Wᵀ + s·x (W1 ⊗ W2)ᵀ, by (W1 ⊗ W2) vec(X) = vec(W1 X W2ᵀ) for x as X [c, d].

    W1 [a, c] and W2 [b, d], or W2's factors of rank r, are fp32 parameters, cast to x's dtype. No N × K intermediate.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        base: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return base
        (adapter,) = self.active_adapters
        if adapter in self.lokr_w1:
            w1 = self.lokr_w1[adapter]
        else:
            w1 = self.lokr_w1_a[adapter] @ self.lokr_w1_b[adapter]
        if adapter in self.lokr_w2:
            w2 = [self.lokr_w2[adapter]]
        else:
            w2 = [self.lokr_w2_b[adapter], self.lokr_w2_a[adapter]]
        product = x.unflatten(-1, (w1.shape[1], -1))
        for factor in w2:
            product = functional.linear(product, factor.to(x.dtype))
        change = (self.scaling[adapter] * w1).to(x.dtype) @ product
        return base + change.flatten(-2)


class LoHaLinear(loha.Linear):
    """y = x Wᵀ + s·x (U₁D₁ ∘ U₂D₂)ᵀ, as a LoRA of rank r²: its A and B are the row-wise and the column-wise
    Khatri-Rao products of D₁ and D₂ [r, K] and of U₁ and U₂ [N, r]. No N × K intermediate.
    """

    def reset_adapter_parameters(self, adapter_name: str) -> None:
        """As LyCORIS and other trainers draw them: with PEFT's start the first updates are some hundred times
        smaller at the same learning rate."""
        nn.init.normal_(self.hada_w1_a[adapter_name], std=0.1)
        nn.init.normal_(self.hada_w1_b[adapter_name])
        nn.init.zeros_(self.hada_w2_a[adapter_name])
        nn.init.normal_(self.hada_w2_b[adapter_name])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        if self.disable_adapters:
            plain: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        (adapter,) = self.active_adapters
        d1, d2 = self.hada_w1_b[adapter], self.hada_w2_b[adapter]
        u1, u2 = self.hada_w1_a[adapter], self.hada_w2_a[adapter]
        lora_a = (self.scaling[adapter] * d1[:, None] * d2).flatten(0, 1)
        lora_b = (u1[:, :, None] * u2[:, None]).flatten(1)
        if isinstance(self.base_layer, QuantizedLinear):
            return _fused_linear(self.base_layer, x, lora_a, lora_b, self.base_layer.scale)
        return _add(self.base_layer(x), functional.linear(x, lora_a.to(x.dtype)), lora_b)


def _fused_linear(
    base: Any, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    weight = base.quantized(scale)
    rows, _ = quantized_lora_linear(
        x.flatten(0, -2), lora_a.to(x.dtype), lora_b.to(x.dtype), *weight
    )
    return rows.view(*x.shape[:-1], base.out_features)


def _row_norms(base: nn.Module) -> torch.Tensor:
    """‖W‖ by rows, [N] fp32, of the weight as it is stored."""
    if fetch := getattr(base, "fetch", None):  # of a streamed block
        fetch()
    with gather_params_ctx(base.parameters()), torch.no_grad():
        weight = dequantize(base.quantized()) if isinstance(base, QuantizedLinear) else base.weight
        return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def _add(base: torch.Tensor, x_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    """base + x_a Bᵀ for any number of leading dimensions."""
    rows = lora_add(base.flatten(0, -2), x_a.flatten(0, -2), lora_b.to(base.dtype))
    return rows.view_as(base)


def exported_magnitude(
    magnitude: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> torch.Tensor:
    """A DoRA's magnitudes [N] for programs that compute m / ‖W + B·A‖ for every row.

    Where W's row is zero m is 0 and the gain in training was 1; ‖B·A‖ gives that gain.
    """
    update = ((lora_b @ (lora_a @ lora_a.t())) * lora_b).sum(-1).clamp(min=0).sqrt()
    return torch.where(magnitude == 0, update, magnitude)


def exported_settings(settings: Lora) -> Lora:
    """The settings that an adapter file is used with; its A has been multiplied by the scale."""
    # Programs that do not read the file's metadata take alpha to be the rank. And diffusers leaves an
    # adapter that it loads in training mode, where dropout is at work.
    return replace(of_rank(settings, lambda rank: rank), dropout=0.0)
