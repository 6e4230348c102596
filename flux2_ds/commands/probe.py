"""Answer what `flux2-ds doctor` cannot ask without torch.

    python -m flux2_ds.commands.probe --accelerator cuda [--cpu-adam | --bandwidth | --zero CONFIG]

Prints JSON: findings (status, name, text, remedy) and facts that should be the same on all hosts. With
`--bandwidth`, started like a training, it prints a finding a line: all-reduce, and the links from host memory
to the cards and from the first host to the others.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from flux2_ds.config.autofit import LINKS
from flux2_ds.distributed import all_gather_object, destroy_process_group, init_process_group
from flux2_ds.engine.engine import cpu_adam
from flux2_ds.engine.zero3 import check_zero
from flux2_ds.errors import run_root

_MIB = 1 << 20
Finding = dict[str, str]


def main() -> None:
    """Entry point of `flux2_ds.commands.probe`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--accelerator", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--cpu-adam", action="store_true")
    parser.add_argument("--bandwidth", action="store_true")
    parser.add_argument("--zero", type=json.loads, help="A DeepSpeed config: check that alone.")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.zero is not None:
        check_zero(options.zero)
    elif options.bandwidth:
        measure_bandwidth(options.accelerator)
    else:
        lines, facts = examine_torch(options.accelerator)
        if options.cpu_adam:
            lines.append(examine_cpu_adam())
        print(json.dumps({"lines": lines, "facts": facts}))


def finding(status: str, name: str, text: str, remedy: str = "") -> Finding:
    """What was looked at, how it is, and what to do about it."""
    return {"status": status, "name": name, "text": text, "remedy": remedy}


def examine_torch(accelerator: str) -> tuple[list[Finding], dict[str, str]]:
    """Whether torch can use the accelerator, and with what."""
    if accelerator == "cpu":
        return [finding("ok", "torch", f"{torch.__version__} on the CPU, gloo")], {}
    cuda = str(torch.version.cuda)
    if not torch.cuda.is_available():
        built = "for the CPU alone" if torch.version.cuda is None else f"for CUDA {cuda}"
        text = f"torch {torch.__version__} is built {built} and cannot use a GPU"
        remedy = "a newer driver, or a torch for this driver's CUDA"
        return [finding("failure", "torch", text, remedy)], {"CUDA of torch": cuda}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    architectures = torch.cuda.get_arch_list()
    cards = {torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())}
    text = (
        f"CUDA {cuda}, NCCL {nccl}, built for {', '.join(architectures)}; the cards need "
        + " and ".join(f"sm_{major}{minor}" for major, minor in sorted(cards))
    )
    lines = [finding("ok", "torch", text)]
    if not all(runs_on(card, architectures) for card in cards):
        lines = [finding("failure", "torch", text, "a torch that is built for these cards")]
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        lines += [finding("warning", "bf16", "these GPUs have no bf16", "precision: fp16 or fp32")]
    return lines, {"CUDA of torch": cuda, "NCCL": nccl}


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a card runs code built for `architectures`: that of an earlier minor version (sm_80 on an 8.6), or
    what the driver compiles (compute_80 on anything later)."""
    major = capability[0]
    for name in architectures:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")  # sm_90a has what later cards lack
        built = int(digits[:-1]), int(digits[-1])
        if built == capability or (
            built <= capability and name[-1].isdigit() and (kind == "compute" or built[0] == major)
        ):
            return True
    return False


def examine_cpu_adam() -> Finding:
    """Whether DeepSpeed's CPU Adam builds here."""
    started = time.perf_counter()
    try:
        cpu_adam([torch.nn.Parameter(torch.zeros(1))])
    except Exception as error:  # whatever compiler and linker do wrong
        reason = str(error).strip().splitlines()[0]
        text = f"does not build: {reason}"
        return finding("failure", "cpu adam", text, "a C++ compiler and ninja")
    seconds = time.perf_counter() - started
    return finding("ok", "cpu adam", f"built and loaded in {seconds:.0f} s")


def measure_bandwidth(accelerator: Any) -> None:
    """Print rank 0's findings. Collective."""
    process = init_process_group(accelerator)
    size = 256 * _MIB if accelerator == "cuda" else 16 * _MIB
    data = torch.ones(size // 4, device=process.device)
    hosts = all_gather_object(socket.gethostname())

    def report(name: str, text: str, status: str = "ok") -> None:
        if process.is_rank0:  # one write, so that other ranks' output does not run into the line
            line = json.dumps(finding(status, name, text))
            os.write(sys.stdout.fileno(), f"{line}\n".encode())

    if process.world_size > 1:
        seconds = timed(lambda: distributed.all_reduce(data), process.device)
        # What a ring moves over each link: the usual figure to compare with the hardware's.
        rate = 2 * (process.world_size - 1) / process.world_size * size / seconds
        text = f"all-reduce of {size // _MIB} MiB: {rate / 1e9:.2f} GB/s bus bandwidth"
        report("bandwidth", text)
    if accelerator == "cuda":
        pinned = torch.ones(size // 4, pin_memory=True)
        rate = size / timed(lambda: data.copy_(pinned, non_blocking=True), process.device)
        text = f"host memory to each card, all at once: {rate / 1e9:.1f} GB/s, launch.link: {link_of(rate)}"
        report("card link", text)
    rates = {}
    # The first rank of every other host, one at a time.
    for host, rank in {host: hosts.index(host) for host in hosts if host != hosts[0]}.items():

        def across(rank: int = rank) -> None:
            if process.rank == 0:
                distributed.send(data, rank)
            elif process.rank == rank:
                distributed.recv(data, 0)

        rates[host] = size / timed(across, process.device)
        report("link", f"{hosts[0]} to {host}: {rates[host] / 1e9:.2f} GB/s")
    if len(rates) > 1:
        slowest = min(rates, key=lambda host: rates[host])
        share = rates[slowest] / statistics.median_high(rates.values())
        if share < 0.6:
            report("odd link", f"{slowest} is at {share:.0%} of the typical host", "warning")
    destroy_process_group()


def link_of(rate: float) -> str:
    """The `launch.link` of PCIe that comes closest to so many bytes a second."""
    links = [name for name in LINKS if name.startswith("pcie")]
    return min(links, key=lambda name: abs(math.log(rate / LINKS[name])))


def timed(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of one `work`, after a warm-up. Collective."""
    for count in (1, repeats):
        distributed.barrier()
        started = time.perf_counter()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


if __name__ == "__main__":
    run_root(main)
