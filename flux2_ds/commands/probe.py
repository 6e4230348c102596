"""What the launcher cannot ask without torch: `python -m flux2_ds.probe --accelerator cuda`.

Prints JSON: lines (status, name, text, remedy) and facts that should be the same on all hosts. With
`--bandwidth`, started like a training, it measures all-reduce and the links from the first host.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import time
from typing import Any

import torch
from torch import distributed

from flux2_ds.distributed import all_gather_object, destroy_process_group, init_process_group
from flux2_ds.engine.engine import build_cpu_adam
from flux2_ds.engine.zero3 import check_zero
from flux2_ds.errors import run_root

_MIB = 1 << 20


def main() -> None:
    """One or the other; see the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--accelerator", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--cpu-adam", action="store_true")
    parser.add_argument("--bandwidth", action="store_true")
    parser.add_argument("--zero", type=json.loads, help="A DeepSpeed config: check that alone.")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.zero is not None:
        check_zero(options.zero)
        return
    if options.bandwidth:
        bandwidth(options.accelerator)
        return
    lines: list[dict[str, str]] = []
    facts: dict[str, str] = {}

    def line(status: str, name: str, text: str, remedy: str = "") -> None:
        lines.append({"status": status, "name": name, "text": text, "remedy": remedy})

    if options.accelerator == "cuda":
        facts["CUDA of torch"] = str(torch.version.cuda)
        if not torch.cuda.is_available():
            line(
                "failure",
                "torch",
                f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use a GPU",
                "a newer driver, or a torch for this driver's CUDA",
            )
        else:
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
            facts["NCCL"] = nccl
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            line("ok", "torch", f"CUDA {torch.version.cuda}, NCCL {nccl}")
            if not bf16:
                line("warning", "bf16", "these GPUs have no bf16", "precision: fp16 or fp32")
    else:
        line("ok", "torch", f"{torch.__version__} on the CPU, gloo")
    if options.cpu_adam:
        started = time.perf_counter()
        try:
            build_cpu_adam()
        except Exception as error:  # whatever compiler and linker do wrong
            reason = str(error).strip().splitlines()[0]
            line("failure", "cpu adam", f"does not build: {reason}", "a C++ compiler and ninja")
        else:
            line("ok", "cpu adam", f"built and loaded in {time.perf_counter() - started:.0f} s")
    print(json.dumps({"lines": lines, "facts": facts}))


def bandwidth(accelerator: Any) -> None:
    """Print what the first process measures, as JSON lines (name, text)."""
    process = init_process_group(accelerator)
    size = 256 * _MIB if accelerator == "cuda" else 16 * _MIB
    data = torch.ones(size // 4, device=process.device)
    hosts = all_gather_object(socket.gethostname())
    if process.world_size > 1:
        seconds = timed(lambda: distributed.all_reduce(data), process.device)
        # What a ring moves over each link: the usual figure to compare with the hardware's.
        rate = 2 * (process.world_size - 1) / process.world_size * size / seconds
        say(
            process.is_rank0,
            "bandwidth",
            f"all-reduce of {size // _MIB} MiB: {gbytes(rate)} bus bandwidth",
        )
    # The first process of every other host, one at a time.
    firsts = {host: hosts.index(host) for host in hosts}
    rates = {}
    for host, rank in firsts.items():
        if rank == 0:
            continue

        def across(rank: int = rank) -> None:
            if process.rank == 0:
                distributed.send(data, rank)
            elif process.rank == rank:
                distributed.recv(data, 0)

        seconds = timed(across, process.device)
        rates[host] = size / seconds
        say(process.is_rank0, "link", f"{hosts[0]} to {host}: {gbytes(rates[host])}")
    if len(rates) > 1:
        slowest = min(rates, key=lambda host: rates[host])
        typical = sorted(rates.values())[len(rates) // 2]
        if rates[slowest] < 0.6 * typical:
            text = f"{slowest} is at {rates[slowest] / typical:.0%} of the typical host"
            say(process.is_rank0, "odd link", text, "warning")
    destroy_process_group()


def timed(work: Any, device: torch.device, repeats: int = 5) -> float:
    """Seconds of one `work`, after a warm-up. Collective."""
    for count in (1, repeats):
        distributed.barrier()
        started = time.perf_counter()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def gbytes(rate: float) -> str:
    """Bytes a second, for people."""
    return f"{rate / 1e9:.2f} GB/s"


def say(first: bool, name: str, text: str, status: str = "ok") -> None:
    """A line of the first process."""
    if first:
        values = {"status": status, "name": name, "text": text, "remedy": ""}
        os.write(sys.stdout.fileno(), f"{json.dumps(values)}\n".encode())


if __name__ == "__main__":
    run_root(main)
