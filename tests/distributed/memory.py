"""A worker of test_engine.py: builds a large model in parts and writes down its peak memory.

RANK=0 WORLD_SIZE=2 ... python memory.py DIRECTORY RESULTS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import distributed

from flux2_ds import engine as engines
from flux2_ds.model import transformer, weights
from flux2_ds.plan import read_deepspeed


def resident(line: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) * 1024


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    process = engines.start_process("cpu")
    config = read_deepspeed("zero3") | {"train_batch_size": process.world}
    distributed.all_reduce(torch.zeros(1))  # gloo's own buffers are not the model's
    Path("/proc/self/clear_refs").write_text("5")  # the highest is counted from here
    before = resident("VmRSS")
    with engines.divided(config, torch.bfloat16):
        model = transformer.build_transformer(directory)
    weights.read_parts(model, directory / "transformer", process.rank)
    used = resident("VmHWM") - before

    files = weights.tensor_files(directory / "transformer")
    wrong, own = [], 0
    for name, parameter in model.named_parameters():
        with safe_open(files[name], framework="pt") as file:
            whole = file.get_tensor(name).flatten()
        part = parameter.ds_tensor
        expected = whole[process.rank * part.numel() :][: part.numel()]
        own += part.numel() * part.element_size()
        if not torch.equal(part[: expected.numel()], expected):
            wrong.append(name)
    results: list[object] = [None] * process.world
    distributed.all_gather_object(results, {"used": used, "own": own, "wrong": wrong})
    if process.first:
        Path(sys.argv[2]).write_text(json.dumps(results))
    engines.stop_process()


if __name__ == "__main__":
    main()
