"""The adapter: its configuration, its arithmetic, and its names in a file.

PEFT owns the configuration, the parameters and the file format; `LoraLinear` replaces the arithmetic.
PEFT multiplies in the adapter's own dtype, which is fp32 here: on a 55,296 wide output that is slower
than the frozen product beside it. And its DoRA materializes B·A and W + B·A in every forward pass.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig
from peft.tuners import lora
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.nn import functional

from flux2_ds.config.adapter import adapted_linears, of_rank
from flux2_ds.config.adapter_file import bfl_place, parts_of
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Lora
from flux2_ds.model.adapter_layouts import Adapter
from flux2_ds.ops.lora_ops import lora_add, quantized_lora_linear
from flux2_ds.ops.quantized_linear import QuantizedLinear, dequantize

ADAPTER = "default"


def lora_config(spec: Spec, settings: Lora, *, dora: bool) -> LoraConfig:
    """PEFT's description of the adapter; A is drawn from N(0, 1/r²), B is zero."""
    linears = adapted_linears(spec, settings)
    alpha = settings.rank if settings.alpha is None else settings.alpha
    return LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,
        # A name is a pattern that matches itself alone.
        rank_pattern={n: each.rank for n, each in linears.items() if each.rank != settings.rank},
        alpha_pattern={n: each.alpha for n, each in linears.items() if each.alpha != alpha},
        use_rslora=settings.rslora,
        lora_dropout=settings.dropout,
        target_modules=list(linears),
        init_lora_weights="gaussian",
        use_dora=dora,
    )


def add_lora(model: Flux2Transformer2DModel, config: LoraConfig, seed: int) -> None:
    """Freeze the base and add an adapter in fp32, initialized from `seed` alone.

    Raises:
        ValueError: a target name matched no module, so that fewer linears were adapted.
    """
    model.requires_grad_(False)
    targeted = len(config.target_modules)  # PEFT shortens the list when it injects
    config._register_custom_module({nn.Linear: LoraLinear, QuantizedLinear: LoraLinear})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # PEFT does not know QuantizedLinear, which LoraLinear is made for.
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        model.add_adapter(config, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    adapted = sum(isinstance(module, LoraLinear) for module in model.modules())
    if adapted != targeted:
        raise ValueError(f"{adapted} linears adapted, {targeted} targeted")


@torch.no_grad()
def set_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Let the model's adapter change its linears as `adapter` does, which has an update for each."""
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }
    for name, layer in layers.items():
        down, up, magnitude = adapter[name]
        rank = layer.r[ADAPTER]
        if down.shape[0] != rank:
            # Of one module for q, k and v, with their factors one after the other.
            beside = [part for part in parts_of(bfl_place(name).module) if part in layers]
            start = sum(layers[part].r[ADAPTER] for part in beside[: beside.index(name)])
            down, up = down[start : start + rank], up[:, start : start + rank]
        layer.lora_A[ADAPTER].weight.copy_(down / layer.scaling[ADAPTER])
        layer.lora_B[ADAPTER].weight.copy_(up)
        if magnitude is not None:
            held = layer.lora_magnitude_vector[ADAPTER].weight
            held.copy_(torch.where(held == 0, 0.0, magnitude.to(held)))  # 0 for a row of zeros in W


class LoraLinear(lora.Linear):
    """y = x Wᵀ + s·(x Aᵀ)Bᵀ; with DoRA (arXiv 2402.09353), rows scaled by m / ‖W + s·B·A‖.

    A [r, K], B [N, r] and m [N] are fp32 parameters, cast to x's dtype where they multiply it. m starts
    at the norms of W's rows. A row of zeros has none to scale: it keeps a gain of 1, and m stays 0 there.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        # Not over a base that ZeRO-3 partitions, which it gathers when the base layer is called. Asked once:
        # a compiler that sees DeepSpeed's number of a parameter makes a graph for each (torch 2.11).
        self._fused = isinstance(base_layer, QuantizedLinear) and not hasattr(
            base_layer.values, "ds_id"
        )
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
        if self._fused and dropped is x:
            scale = self.base_layer.scale
            if gain is not None and self.base_layer.compute != "bf16":
                # gain ∘ (x Wᵀ + x_a Bᵀ) without a pass over it: an 8-bit product applies the scales of
                # W's rows to its sums. In bf16 W would be rounded with its gain.
                scale, lora_b, gain = scale * gain[:, None], lora_b * gain[:, None], None
            y = self._fused_linear(x, scaling * lora_a, lora_b, scale)
        else:
            x_a = functional.linear(dropped, (scaling * lora_a).to(x.dtype))
            y = _add(self.base_layer(x), x_a, lora_b)
        if gain is None:
            return y
        # Less one, because near one 16 bits are coarse. Like PEFT, DoRA's part of the base product sees the
        # dropped input too.
        inner = y if dropped is x else _add(self.base_layer(dropped), x_a, lora_b)
        return y + (gain - 1).to(x.dtype) * inner

    def _fused_linear(
        self, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        weight = self.base_layer.quantized(scale)
        rows, _ = quantized_lora_linear(
            x.flatten(0, -2), lora_a.to(x.dtype), lora_b.to(x.dtype), *weight
        )
        return rows.view(*x.shape[:-1], self.base_layer.out_features)

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
