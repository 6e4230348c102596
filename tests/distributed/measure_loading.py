"""A worker of test_engine.py: builds a large model in parts and writes down its peak memory.

`python tests/distributed/measure_loading.py N FOLDER` measures N processes of FLUX.2-dev's widths, with a double and
a single block, at ZeRO-3 in bf16; FOLDER has 5 GB free.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from forked import Ranks
from torch import distributed

from flux2_ds.config.model_spec import RELEASED
from flux2_ds.config.plan import read_deepspeed
from flux2_ds.distributed import Process, destroy_process_group, init_process_group
from flux2_ds.engine.zero3 import make_partitioner
from flux2_ds.model import load as weights
from flux2_ds.model import transformer
from flux2_ds.model.activation_checkpointing import blocks_of
from flux2_ds.training.build import load_as


def resident(line: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) * 1024


def load(directory: Path, process: Process) -> dict[str, object]:
    """Bytes by which this process rose while it loaded, bytes of its own part, and wrong parameters."""
    config = read_deepspeed("zero3") | {"train_batch_size": process.world_size}
    files, cpu, dtype = directory / "transformer", torch.device("cpu"), torch.bfloat16
    gc.collect()  # what DeepSpeed adds to parameters refers to them
    Path("/proc/self/clear_refs").write_text("5")  # the highest is counted from here
    before = resident("VmRSS")
    with torch.device("meta"):
        model = transformer.build_transformer(directory)
        whole = transformer.build_transformer(directory)
    partition = make_partitioner(config)
    weights.read_partitioned(model, files, dtype, cpu, partition, process.rank)
    used = resident("VmHWM") - before

    weights.read_weights(whole, files, dtype, cpu)
    expected = dict(whole.named_parameters())
    wrong, own = [], 0
    for name, parameter in model.named_parameters():
        part = parameter.ds_tensor
        run = expected[name].flatten()[process.rank * part.numel() :][: part.numel()]
        own += part.numel() * part.element_size()
        if part.dtype != run.dtype or not torch.equal(part[: run.numel()], run):
            wrong.append(name)
    return {"used": used, "own": own, "wrong": wrong}


def load_streamed(directory: Path, group: int | None, process: Process) -> dict[str, object]:
    """Bytes by which this process rose, bytes that it read, and how many of these every rank reads."""
    read = {}

    def noting(name: str, weight: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        read[name] = weight.nbytes
        return weight.to(dtype)

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = load_as({}, directory, torch.bfloat16, None, process, noting, range(6), group)
    used = resident("VmHWM") - before
    shared = sum(size for name, size in read.items() if "transformer_blocks." not in name)
    assert len(blocks_of(model)) == 6
    return {"used": used, "own": sum(read.values()), "shared": shared, "wrong": []}


def main(_orders: object, directory: Path, written: Path) -> None:
    """What every rank found goes to `written`."""
    torch.set_num_threads(1)
    process = init_process_group("cpu")
    distributed.all_reduce(torch.zeros(1))  # gloo's own buffers are not the model's
    found = {"partitioned": load(directory, process)}
    found |= {"host": load_streamed(directory, None, process)}
    found |= {"sharded": load_streamed(directory, process.world_size, process)}
    results: list[object] = [None] * process.world_size
    distributed.all_gather_object(results, found)
    if process.is_rank0:
        written.write_text(json.dumps(results))
    gc.collect()  # gloo's threads end with the last reference to the process group
    destroy_process_group()


def measure_dev(_orders: object, directory: Path) -> None:
    """Say by how many bytes this process rose while it loaded, as `train` does."""
    torch.set_num_threads(1)
    process = init_process_group("cpu")
    distributed.all_reduce(torch.zeros(1))
    Path("/proc/self/clear_refs").write_text("5")
    before, began = resident("VmRSS"), time.perf_counter()
    config = read_deepspeed("zero3") | {"train_batch_size": process.world_size}
    model = load_as(config, directory, torch.bfloat16, None, process)
    used, seconds = resident("VmHWM") - before, time.perf_counter() - began
    own = sum(p.ds_tensor.nbytes for p in model.parameters())
    risen: list[float] = [0.0] * process.world_size
    distributed.all_gather_object(risen, used / 1e9)
    if process.is_rank0:
        size = sum(file.stat().st_size for file in directory.glob("*/*.safetensors")) / 1e9
        (directory / "said").write_text(
            f"file {size:.2f} GB; a partition {own / 1e9:.2f} GB; risen by {sum(risen):.2f} GB = "
            f"{' + '.join(f'{each:.2f}' for each in risen)}; {seconds:.0f} s\n"
        )
    destroy_process_group()


if __name__ == "__main__":
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    spec = replace(RELEASED["black-forest-labs/FLUX.2-dev"], double_blocks=1, single_blocks=1)
    if not folder.exists():
        model = transformer.empty_transformer(spec).bfloat16().to_empty(device="cpu")
        model.save_pretrained(folder / "transformer")
        del model
    ranks = Ranks(measure_dev, [(folder,)] * count)
    assert set(ranks.wait()) == {0}, ranks.said()
    print((folder / "said").read_text())
