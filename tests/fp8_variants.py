"""How far gradients of a full fine-tune are from bf16's with fp8 in some of the blocks or products.

    python tests/fp8_variants.py --config examples/demo/panda.yaml --launch.processes 1 --method full \
        --precision bf16 --deepspeed zero1

prints the table of docs/numerics.md, for one global batch after the last step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flux2_ds.commands.quality import Experiment, compared
from flux2_ds.config.parse import parse_recipe, recipe_parser
from flux2_ds.distributed import init_process_group
from flux2_ds.model.activation_checkpointing import blocks_of
from flux2_ds.ops import fp8_linear


class Partly(torch.autograd.Function):
    """x Wᵀ of which some products are in fp8."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, forward: bool, backward: bool
    ) -> torch.Tensor:
        y, *scales = fp8_linear.fp8_linear(x, weight)
        ctx.save_for_backward(x, weight, *scales)
        ctx.fp8 = backward
        return y if forward else x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, *scales = ctx.saved_tensors
        if ctx.fp8:
            grads = fp8_linear.fp8_linear_grad(grad.contiguous(), x, weight, *scales)
        else:
            grads = grad @ weight, grad.t() @ x
        return *grads, None, None


def main() -> None:
    recipe, _ = parse_recipe(recipe_parser("fp8_variants", ""))
    recipe = replace(recipe, compile=False)
    experiment = Experiment(recipe, init_process_group(recipe.launch.accelerator), 1)

    def gradients(mode: str, first: int = 0, last: int = 0, *products: bool) -> Any:
        model = experiment.build(mode)[0]
        blocks = blocks_of(model)
        for block in blocks[first : len(blocks) - last] if products else ():
            for module in block.modules():
                if type(module) is nn.Linear:
                    module.forward = (
                        lambda x, w=module.weight: Partly.apply(  # type: ignore[method-assign]
                            x.flatten(0, -2), w, *products
                        ).view(*x.shape[:-1], w.shape[0])
                    )
        return list(experiment.gradients(model))

    plain = gradients("bf16")
    print("| in fp8 | least | median |\n|---|---|---|")
    for name, found in (
        ("nothing, and fp32 in place of bf16", gradients("fp32")),
        ("**all blocks but the first and the last**", gradients("bf16", 1, 1, True, True)),
        ("all but the first", gradients("bf16", 1, 0, True, True)),
        ("all but the last", gradients("bf16", 0, 1, True, True)),
        ("all blocks", gradients("bf16", 0, 0, True, True)),
        ("all blocks, forward only", gradients("bf16", 0, 0, True, False)),
        ("all blocks, gradients only", gradients("bf16", 0, 0, False, True)),
    ):
        near = compared(found, plain)
        print(f"| {name} | {near.cosine_worst:.4f} | {near.cosine_median:.4f} |")


if __name__ == "__main__":
    main()
