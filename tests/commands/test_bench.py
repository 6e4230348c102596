"""The operations that `bench` counts are those that torch counts, and a card that is too small; not its timings."""

from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flux2_ds.commands import bench
from flux2_ds.config.bench_options import add_options, bench_bucket
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_spec import TEXT_TOKENS, TOKEN_CHANNELS, Spec
from flux2_ds.config.recipe import Data, Launch, Model, Recipe
from flux2_ds.distributed import Process
from flux2_ds.errors import UserError
from flux2_ds.model import latents
from flux2_ds.model.load import fill_randomly
from flux2_ds.model.transformer import empty_transformer

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_useful_products(tiny_spec: Spec, method: str) -> None:
    bucket = Bucket(64, 96)
    model = empty_transformer(tiny_spec)
    fill_randomly(model, torch.float32, None, CPU)
    model.requires_grad_(method == "full")
    # As with an adapter, gradients flow through every block.
    tokens = torch.randn(1, bucket.tokens, TOKEN_CHANNELS, requires_grad=True)
    text = torch.randn(1, TEXT_TOKENS, tiny_spec.text_width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        prediction = model(
            hidden_states=tokens,
            encoder_hidden_states=text,
            timestep=torch.tensor([0.5]),
            img_ids=latents.image_ids(bucket.height, bucket.width, CPU),
            txt_ids=latents.text_ids(TEXT_TOKENS, CPU),
            guidance=torch.ones(1) if tiny_spec.guidance else None,
        ).sample
        prediction.square().mean().backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    _, attention = tiny_spec.forward_flops(bucket.tokens)
    # Embedders, modulation and output, which are not counted as useful, are 2 % of the tiny model.
    useful = tiny_spec.step_flops(bucket.tokens, method) - 3.5 * attention
    assert useful == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        ({}, [], "1024x1024"),
        ({"resolution": [512, 768], "bucket_step": 96}, [], "768x768"),
        ({"resolution": 160, "bucket_step": 32}, ["--height", "64"], "160x64"),
        ({"resolution": 100, "bucket_step": 48}, [], "96x96"),
    ],
)
def test_the_image_is_the_recipes_largest_unless_told_otherwise(data, options, expected) -> None:
    parser = ArgumentParser()
    add_options(parser)
    recipe = Recipe(run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s", **data))
    assert str(bench_bucket(parser.parse_args(options), recipe)) == expected


def test_a_card_that_is_too_small_is_answered_with_settings(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*call: object) -> bench.Built:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(bench, "build", build)
    monkeypatch.setattr(bench, "init_process_group", lambda accelerator: Process(0, 1, CPU))
    recipe = Recipe(
        run_dir="r",
        model=Model(path=str(tiny_model)),
        data=Data(images="i", shards="s"),
        launch=Launch(accelerator="cpu"),
    )
    parser = ArgumentParser()
    add_options(parser)
    with pytest.raises(UserError, match=r"1024x1024 .* 2\.00 GiB.* base_weights: fp8 or nf4"):
        bench.bench(recipe, parser.parse_args([]))
