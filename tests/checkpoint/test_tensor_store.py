"""Sharded tensors: whichever ranks wrote them, any rank reads the elements that it needs."""

from pathlib import Path

import pytest
import torch

from flux2_ds.checkpoint import tensor_store
from flux2_ds.checkpoint.tensor_store import TensorShard, TensorStore

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(35.0).view(5, 7) + 50}


def write(folder: Path, shards: list[TensorShard], rank: int | None = None) -> list[Path]:
    return [tensor_store.write(folder, file) for file in tensor_store.files_of(shards, rank)]


def write_sharded(folder: Path, world_size: int) -> list[Path]:
    """Each rank has its run of the sequence of all elements, as at ZeRO stages 1 and 2."""
    total = sum(value.numel() for value in TENSORS.values())
    part, files = -(-total // world_size), []
    for rank in range(world_size):
        tensor_shards, offset = [], 0
        for name, value in TENSORS.items():
            start = max(0, rank * part - offset)
            stop = min(value.numel(), (rank + 1) * part - offset)
            if start < stop:
                flat = value.flatten()[start:stop]
                tensor_shards.append(TensorShard("weights", name, flat, start, tuple(value.shape)))
            offset += value.numel()
        files += write(folder, tensor_shards, rank)
    return files


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_range_comes_back(tmp_path, world_size):
    found = TensorStore(write_sharded(tmp_path, world_size))
    assert found.shapes == {name: tuple(value.shape) for name, value in TENSORS.items()}
    for name, value in TENSORS.items():
        assert torch.equal(found.tensor(name), value)
        for start in range(value.numel()):
            for stop in range(start, value.numel() + 1):
                assert torch.equal(found.read(name, start, stop), value.flatten()[start:stop])


def test_large_shards_go_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "FILE_BYTES", 30)
    names = "abcde"
    tensor_shards = [
        TensorShard(kind, n, torch.ones(4), 0, (4,)) for kind in ("weights", "ema") for n in names
    ]
    files = [path.name for path in write(tmp_path, tensor_shards, rank=3)]
    kinds = [f"{kind}-0003-000{i}.safetensors" for kind in ("weights", "ema") for i in range(3)]
    assert files == kinds
    found = TensorStore(tmp_path / name for name in files if name.startswith("ema"))
    assert sorted(found.shapes) == list(names)


def test_missing_elements_are_an_error(tmp_path):
    files = write_sharded(tmp_path, 3)
    found = TensorStore(files[:-1])
    with pytest.raises(ValueError, match="b: elements 0 to 35 are not all stored"):
        found.tensor("b")


def test_codes_keep_their_type_and_full_tensors_their_plain_file(tmp_path):
    from safetensors.torch import load_file

    tensor_shards = [TensorShard("state1", "a", torch.tensor([[3, 4]], dtype=torch.uint8))]
    tensor_shards += [TensorShard("weights", "a", torch.tensor([[0.5]], dtype=torch.bfloat16))]
    codes, weights = (load_file(path) for path in write(tmp_path, tensor_shards))
    assert codes["a"].dtype == torch.uint8
    assert (weights["a"].dtype, weights["a"].tolist()) == (torch.float32, [[0.5]])
    assert {path.name for path in tmp_path.iterdir()} == {
        "state1.safetensors",
        "weights.safetensors",
    }
