"""PEFT's LoRA layer, computed in the dtype of its input.

PEFT owns the adapter's configuration, its parameters and its file format; this replaces the
arithmetic. PEFT multiplies in the adapter's own dtype, which is fp32 here: on a 55,296 wide output
that is slower than the frozen product beside it. And its DoRA materialises B·A and W + B·A in every
forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch.nn import functional

from flux2_ds.ops.lora_ops import adapted_product, add_low_rank
from flux2_ds.ops.quantized_linear import QuantizedLinear


class LoraLinear(lora.Linear):
    """y = x Wᵀ + s·(x Aᵀ)Bᵀ; with DoRA (arXiv 2402.09353), rows scaled by m / ‖W + s·B·A‖.

    A [r, K], B [N, r] and m [N] are fp32 parameters, cast to x's dtype where they multiply it.
    """

    def __init__(self, base_layer: torch.nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        # Whether the base is quantised and here; ZeRO-3 gathers it when the base layer is called. Asked once:
        # a compiler that sees DeepSpeed's number of a parameter makes a graph for each (torch 2.11).
        self._whole = isinstance(base_layer, QuantizedLinear) and not hasattr(
            base_layer.values, "ds_id"
        )
        if adapter_name in self.lora_magnitude_vector:
            # B is zero now, so PEFT has just computed the norms of W's rows.
            norm = self.lora_magnitude_vector[adapter_name].weight.detach().float().clone()
            self.register_buffer("base_norm", norm, persistent=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        if self.disable_adapters or self.merged:
            plain: torch.Tensor = super().forward(x, *args, **kwargs)
            return plain
        (adapter,) = self.active_adapters
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        scaling, gain = self.scaling[adapter], None
        if adapter in self.lora_magnitude_vector:
            magnitude = self.lora_magnitude_vector[adapter].weight
            gain = magnitude / self._weight_norm(down, up, scaling, x.dtype)
        dropped = self.lora_dropout[adapter](x)
        if self._whole and dropped is x:
            scale = self.base_layer.scale
            if gain is not None and self.base_layer.compute != "bf16":
                # gain ∘ (x Wᵀ + narrow Bᵀ) without a pass over it: an 8-bit product applies the scales of W's rows
                # to its sums. In bf16 W would be rounded with its gain.
                scale, up, gain = scale * gain[:, None], up * gain[:, None], None
            y = self._adapted(x, scaling * down, up, scale)
        else:
            narrow = functional.linear(dropped, (scaling * down).to(x.dtype))
            y = _add(self.base_layer(x), narrow, up)
        if gain is None:
            return y
        # Less one, because near one 16 bits are coarse. Like PEFT, DoRA's part of the base product sees the
        # dropped input too.
        inner = y if dropped is x else _add(self.base_layer(dropped), narrow, up)
        return y + (gain - 1).to(x.dtype) * inner

    def _adapted(
        self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        base = self.base_layer
        rows, _ = adapted_product(
            x.flatten(0, -2),
            down.to(x.dtype),
            up.to(x.dtype),
            base.values,
            base.block_scale,
            scale,
            base.storage,
            base.compute,
            base.transposed,
        )
        return rows.view(*x.shape[:-1], base.out_features)

    @torch.no_grad()
    def _weight_norm(
        self, down: torch.Tensor, up: torch.Tensor, scaling: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """‖W + s·B·A‖ by rows, [N] fp32, constant for the gradient as in the paper's section 4.3.

        ‖w + s·bA‖² = ‖w‖² + 2s·b·(A w) + s²·b(A Aᵀ)bᵀ needs no N × K intermediate.
        """
        projected = self.base_layer(down.to(dtype)).float().t()
        cross = (projected * up).sum(-1)
        square = ((up @ (down @ down.t())) * up).sum(-1)
        return (self.base_norm**2 + 2 * scaling * cross + scaling**2 * square).sqrt()


def _add(base: torch.Tensor, narrow: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """base + narrow · upᵀ, in one pass over the output."""
    rows = add_low_rank(base.flatten(0, -2), narrow.flatten(0, -2), up.to(base.dtype))
    return rows.view_as(base)
