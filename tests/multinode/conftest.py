"""The tiny model and its shards, made once, and what an uninterrupted run on one machine gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from machines import SSHD, CannotStartError, Cluster
from slurm_machine import PROGRAMS, Slurm

ROOT = Path(__file__).parents[2]
STEPS = 24
SEED = 3
RECIPE = f"""\
run_dir: run
seed: {SEED}
steps: {STEPS}
precision: fp32
activation_checkpointing: none
model: {{path: model}}
data:
  images: {ROOT}/examples/photos
  shards: shards
  resolution: 160
  bucket_step: 32
  samples_per_shard: 4
batch: {{global_size: 4, micro_size: 2}}
optimizer: {{learning_rate: 3.0e-3}}
checkpoint: {{every: 4}}
log: {{every: 1, wandb: disabled}}
launch: {{accelerator: cpu, processes: 2}}
"""


def require(*programs: str, packages: str) -> None:
    """Skip, with the reason, where the test cannot run."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: {packages})")
    tried = subprocess.run(["ip", "netns", "add", "f2dsprobe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "f2dsprobe"], capture_output=True)
    if tried.returncode:
        pytest.skip(f"no network namespaces here: {tried.stderr.strip()}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require("ip", "ssh", "ssh-keygen", SSHD, packages="iproute2 openssh-server")
    with ExitStack() as stack:
        try:
            two = stack.enter_context(Cluster(tmp_path_factory.mktemp("ssh")))
        except (CannotStartError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no two machines here: {error}")
        yield two


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    require("ip", *PROGRAMS, packages="iproute2 slurm-wlm munge")
    with ExitStack() as stack:
        try:
            one = stack.enter_context(Slurm(tmp_path_factory.mktemp("slurm")))
        except (CannotStartError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no Slurm here: {error}")
        yield one


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe, tiny model and shards, on the file system that all machines see."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(RECIPE)
    tiny = ["tiny", "--variant", "klein", "--out", "model"]
    for argv in (tiny, ["prepare", "--config", "tiny.yaml"]):
        subprocess.run([program(), *argv], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def reference(work: Path) -> list[float]:
    """The losses of an uninterrupted run on this machine."""
    argv = [program(), "train", "--config", "tiny.yaml", "--run_dir", "reference"]
    subprocess.run(argv, cwd=work, check=True)
    return read_losses(work / "reference")


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    """Reads the loss of every step of a run."""
    return read_losses


def read_losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["train/loss"] for record in records]


def program() -> str:
    return str(Path(sys.executable).with_name("flux2-ds"))
