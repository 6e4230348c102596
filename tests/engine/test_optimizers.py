"""8-bit optimizer state that is cut into other blocks than those it was quantised in; what a checkpoint
takes on disk."""

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

from flux2_ds.config.memory import checkpoint_bytes, trained_parameters
from flux2_ds.config.model_spec import RELEASED
from flux2_ds.config.recipe import Data, Model, Optimizer, Recipe
from flux2_ds.engine import optimizers
from flux2_ds.engine.optimizers import join_blocks
from flux2_ds.engine.zero_partitions import ZeroPartition

QMAP = create_dynamic_map(signed=True)


def quantised(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values of very different size, their codes, and each element's scale."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    values *= torch.logspace(-6, 0, count)
    codes, state = quantize_blockwise(values, QMAP, blocksize=256)
    return values, codes, state.absmax.repeat_interleave(256)[:count]


def test_the_same_blocks_are_taken_over_bit_by_bit():
    _, codes, scales = quantised(1000, 0)
    joined, absmax = join_blocks(codes, scales, QMAP)
    assert torch.equal(joined, codes)
    assert torch.equal(absmax, scales[::256])


def test_other_blocks_are_quantised_anew():
    values, codes, scales = quantised(1000, 1)
    joined, absmax = join_blocks(codes[100:], scales[100:], QMAP)
    found = QMAP[joined.int()] * absmax.repeat_interleave(256)[:900]
    before = QMAP[codes.int()] * scales
    assert absmax.numel() == 4
    assert (found - values[100:]).norm() < 2 * (before - values)[100:].norm()


def test_elements_never_updated_are_zero():
    """A new block's codes are 0, which is not the code of 0.0, and its scale is 0."""
    codes, scales = torch.zeros(300, dtype=torch.uint8), torch.zeros(300)
    codes[:10], scales[:10] = 200, 3.0
    joined, absmax = join_blocks(codes, scales, QMAP)
    values = QMAP[joined.int()] * absmax.repeat_interleave(256)[:300]
    assert torch.equal(values[:10], QMAP[200].expand(10) * 3)
    assert not values[10:].any()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "prodigy", "muon"])
def test_checkpoints_take_what_is_planned(name):
    settings = Optimizer(name=name)
    weight = torch.nn.Parameter(torch.ones(96, 96))
    weight.grad = torch.ones_like(weight)
    optimizer = optimizers.build(settings, [weight], fused=False)
    optimizer.step()
    if name in optimizers.ELEMENTWISE:
        whole = ZeroPartition("w", (96, 96), 0, weight.numel(), weight, 0)
        state = optimizer.state[weight]
        kinds = optimizers.ELEMENTWISE[name]
        stored = [optimizers.elements(state, kind, whole) for kind in kinds]
    else:
        stored = [value for _, _, value in optimizers.full_state(optimizer, {"w": weight})]
    taken = sum(tensor.nbytes for tensor in [weight, *stored]) / weight.numel()
    recipe = Recipe(
        run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s"), optimizer=settings
    )
    spec = RELEASED["black-forest-labs/FLUX.2-dev"]
    planned = checkpoint_bytes(spec, recipe) / trained_parameters(spec, recipe)
    assert planned == pytest.approx(taken, abs=0.1)
