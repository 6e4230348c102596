"""Three steps of two ranks, and the same from their shards by a script that knows the docs alone."""

from __future__ import annotations

import shutil
import socket
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import gaussian
from forked import Ranks
from recompute import global_batches, recompute
from safetensors.torch import save

from flux2_ds import train
from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_files import fingerprint
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import (
    Batch,
    Checkpoint,
    Data,
    Launch,
    Log,
    Model,
    Objective,
    Optimizer,
    Preservation,
    Recipe,
    recipe_values,
)
from flux2_ds.data.dataset import build_order, read_data
from flux2_ds.data.index import CONDITIONING_NAME, Index, write_index
from flux2_ds.data.shards import Record, View, full_part, write_prompts, write_shard
from flux2_ds.errors import run_root
from flux2_ds.run.metrics import METRICS_NAME, read_metrics

STEPS = 3
SHARDS = [(Bucket(32, 48), 5, "a"), (Bucket(32, 48), 4, "b"), (Bucket(48, 32), 3, "b"),
          (Bucket(32, 32), 6, "a")]  # fmt: skip
pytestmark = pytest.mark.dist


def write_data(folder: Path, spec: Spec, model: Path) -> None:
    """Shards whose samples have one or two texts and views; the bucket 32x48 does not fill a batch."""

    def text_of(caption: str) -> torch.Tensor:
        text = gaussian(512, spec.text_width, seed=sum(caption.encode())).bfloat16()
        text[:400] = text[400]
        return text

    def records(bucket: Bucket, samples: int, several: int) -> list[Record]:
        size = (32, bucket.height // 8, bucket.width // 8)
        return [
            Record(f"{n}.jpg", tuple(f"{n // 2}{k}" for k in range(1 + (n + several) % 2)),
                   tuple(View(gaussian(*size, seed=10 * n + k)) for k in range(1 + several)))
            for n in range(samples)
        ]  # fmt: skip

    shards = []
    for number, (bucket, samples, source) in enumerate(SHARDS):
        path = folder / f"{number}.tar"
        several = number % 2
        shards.append(write_shard(path, bucket, records(bucket, samples, several), text_of, source))
    shards[0] = replace(shards[0], dropped=[1], samples=4)
    shards[3] = replace(shards[3], repeats=2)
    conditioning = save({
        "latent_mean": gaussian(128), "latent_std": gaussian(128, seed=1).abs() + 0.5,
        "empty_text": text_of("empty"),
    })  # fmt: skip
    (folder / CONDITIONING_NAME).write_bytes(conditioning)
    index = Index(spec.variant, spec.text_width, fingerprint(model), {}, shards, full_part(conditioning))  # fmt: skip
    write_index(folder, index)


def run_train(_orders: object, config: Path) -> None:
    sys.argv = ["train", "--config", str(config)]
    run_root(train.main)


@pytest.mark.parametrize("tiny_model", ["dev"], indirect=True)
def test_docs_alone_give_the_losses_of_a_run(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path
) -> None:
    write_data(tmp_path, tiny_spec, tiny_model)
    recipe = Recipe(
        run_dir=str(tmp_path / "run"),
        method="full",
        steps=STEPS,
        seed=12,
        precision="fp32",
        model=Model(path=str(tiny_model)),
        data=Data(images="unused", shards=str(tmp_path), shuffle_window=1, weights={"a": 1.5}),
        batch=Batch(global_size=4, micro_size=1),
        objective=Objective(caption_dropout=0.3, stratified=True),
        optimizer=Optimizer(
            learning_rate=5e-3, schedule="cosine", warmup_steps=1, max_grad_norm=0.1
        ),
        log=Log(every=1),
        launch=Launch(accelerator="cpu"),
    )
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe_values(recipe)))
    ranks = Ranks(run_train, [(config,)] * 2)
    assert ranks.wait() == [0, 0], ranks.said()
    records = read_metrics(tmp_path / "run" / METRICS_NAME)
    recorded = [(r["train/loss"], r["train/gradient_norm"]) for r in records]
    last = records[-1]
    seconds, gib = last["perf/rank_seconds"], last["memory/rank_gib"]
    waiting = last["perf/data_wait_seconds"] + last["perf/forward_seconds"]
    own = [waiting, last["memory/host_gib"]]
    assert [seconds[0], gib[0]] == pytest.approx(own, abs=1e-4)
    for of_ranks, which in ((seconds, "perf/slowest_rank"), (gib, "memory/fullest_rank")):
        most = of_ranks.index(max(of_ranks))
        assert len(of_ranks) == 2 and last[which] == f"rank {most} on {socket.gethostname()}"
    assert last["memory/fullest_gib"] == max(gib)
    expected = recompute(tmp_path / "run", STEPS)
    assert recorded == [pytest.approx(step, rel=1e-5) for step in expected]
    index = read_data(recipe)[0]
    order = build_order(recipe, index)
    served = [order.batch(step) for step in range(60)]
    assert {bucket for bucket, _ in served[:STEPS]} == set(index.bucket_counts())
    shards, values = map(asdict, index.shards), recipe_values(recipe)
    assert [[(s.shard, s.row) for s in samples] for _, samples in served] == list(
        islice(global_batches(list(shards), values), 60)
    )
    assert "flux2_ds" not in (Path(__file__).parent.parent / "recompute.py").read_text()


@pytest.mark.parametrize("tiny_model", ["klein"], indirect=True)
def test_a_run_that_preserves_goes_on_to_the_last_bit(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path
) -> None:
    """Four steps, of which the last two are made again: every loss and its parts, and all that is saved."""
    write_data(tmp_path, tiny_spec, tiny_model)
    prompts = {
        name: gaussian(512, tiny_spec.text_width, seed=n).bfloat16() for n, name in enumerate("xy")
    }
    write_prompts(tmp_path, prompts)

    recipe = Recipe(
        run_dir=str(tmp_path / "run"),
        steps=4,
        precision="fp32",
        model=Model(path=str(tiny_model)),
        data=Data(images="unused", shards=str(tmp_path)),
        batch=Batch(global_size=4, micro_size=2),
        preservation=Preservation(
            sources=["b"], target="base", prompts=["x", "y"], share=0.5, every=2, weight=0.5
        ),
        checkpoint=Checkpoint(every=2),
        optimizer=Optimizer(learning_rate=1e-2),
        log=Log(every=1, wandb="disabled"),
        launch=Launch(accelerator="cpu"),
    )
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe_values(recipe)))

    def go() -> tuple[list[dict[str, Any]], dict[str, dict[str, torch.Tensor]]]:
        ranks = Ranks(run_train, [(config,)])
        assert ranks.wait() == [0], ranks.said()
        found, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
        assert found is not None and found.step == 4
        saved = {kind: found.tensors(kind) for kind in found.kinds()}
        shutil.rmtree(found.path)
        records = read_metrics(tmp_path / "run" / METRICS_NAME)
        return [{k: v for k, v in r.items() if k.startswith("train/")} for r in records], saved

    (whole, saved), (halves, again) = go(), go()
    assert halves == whole and len({r["train/loss"] for r in whole}) == 4
    assert ["train/loss_preservation" in record for record in whole] == [False, True, False, True]
    assert any("train/loss_regularization" in record for record in whole)
    for kind, tensors in saved.items():
        for name, value in tensors.items():
            assert torch.equal(value, again[kind][name]), (kind, name)
