"""Batches that wait for a GPU lie in pinned memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flux2_ds.config.buckets import Bucket
from flux2_ds.data.index import Index
from flux2_ds.data.loader import Loader, MicroBatch, Share
from flux2_ds.data.order import Order
from flux2_ds.data.shards import Record, View, write_shard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NAMES = ("latents", "text", "noise", "deviates")


@pytest.mark.parametrize("micro", [1, 2])
def test_pinned_batches_are_the_same_batches(micro: int, tmp_path: Path) -> None:
    records = [
        Record(f"{n}.jpg", (str(n),), (View(torch.full((32, 4, 4), float(n))),)) for n in range(4)
    ]
    shard = write_shard(
        tmp_path / "x.tar", Bucket(32, 32), records, lambda c: torch.full((6, 2), float(c))
    )
    index = Index("klein", 2, {}, {}, [shard])

    def batches(pinned: bool) -> list[MicroBatch]:
        loader = Loader(tmp_path, index, Order(index, 2, 0, window=2), Share(0, 1, 2, micro), seed=0,
                        caption_dropout=0.0, empty_text=torch.zeros(6, 2), pinned=pinned)  # fmt: skip
        return [batch for step in loader.steps(0, 2) for batch in step]

    for plain, pinned in zip(batches(False), batches(True), strict=True):
        for name in NAMES:
            one, other = getattr(plain, name), getattr(pinned, name)
            assert other.is_pinned() and torch.equal(one, other)
