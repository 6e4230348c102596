"""A worker of test_engine.py: builds a large model in parts and writes down its peak memory."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import torch
from torch import distributed

from flux2_ds.config.plan import read_deepspeed
from flux2_ds.distributed import Process, destroy_process_group, init_process_group
from flux2_ds.engine.zero3 import make_partitioner
from flux2_ds.model import load as weights
from flux2_ds.model import transformer


def resident(line: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) * 1024


def load(directory: Path, base_weights: str | None, process: Process) -> dict[str, object]:
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
    weights.read_partitioned(model, files, dtype, cpu, partition, process.rank, base_weights)
    used = resident("VmHWM") - before

    weights.read_weights(whole, files, dtype, cpu, base_weights)
    expected = dict(whole.named_parameters())
    wrong, own = [], 0
    for name, parameter in model.named_parameters():
        part = parameter.ds_tensor
        run = expected[name].flatten()[process.rank * part.numel() :][: part.numel()]
        own += part.numel() * part.element_size()
        if part.dtype != run.dtype or not torch.equal(part[: run.numel()], run):
            wrong.append(name)
    return {"used": used, "own": own, "wrong": wrong}


def main(_orders: object, directory: Path, written: Path) -> None:
    """What every rank found goes to `written`."""
    torch.set_num_threads(1)
    process = init_process_group("cpu")
    distributed.all_reduce(torch.zeros(1))  # gloo's own buffers are not the model's
    found = {str(base): load(directory, base, process) for base in (None, "nf4")}
    results: list[object] = [None] * process.world_size
    distributed.all_gather_object(results, found)
    if process.is_rank0:
        written.write_text(json.dumps(results))
    gc.collect()  # gloo's threads end with the last reference to the process group
    destroy_process_group()
