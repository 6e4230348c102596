"""One thread, Ctrl-C, and what many tests share: tiny models and checkpoints without processes."""

import gc
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from flux2_ds.config.model_spec import Spec, read_spec

# pytest reads this file before it collects any folder, and so before any test module imports torch,
# which looks at the variable once. Sums over another number of threads differ in their last bits, and
# tests compare files byte by byte.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell starts what runs in its background with SIGINT ignored, which the launcher would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what is imported is never garbage; looking at it each time took 5 % of the tests' time


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """The log level and variables that a command sets in this process end with the test."""
    logger = logging.getLogger("flux2_ds")
    level = logger.level
    with patch.dict(os.environ):
        yield
    logger.setLevel(level)


@pytest.fixture(scope="session", params=["klein", "dev"])
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory of each variant."""
    from flux2_ds.commands.tiny import make_tiny  # here: most unit tests need no torch

    directory = tmp_path_factory.mktemp("tiny") / request.param
    make_tiny(directory, request.param)
    return directory


@pytest.fixture(scope="session")
def tiny_spec(tiny_model: Path) -> Spec:
    return read_spec(tiny_model)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    from torch import distributed

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


@pytest.fixture
def write_checkpoint(process_group: None) -> Callable[..., Path]:
    return save_alone


@pytest.fixture(name="save_alone")
def _save_alone() -> Callable[..., Path]:
    return save_alone


def save_alone(
    root: Path,
    step: int,
    tensor_shards: Iterable[Any],
    state: dict[str, Any] | None = None,
    *,
    sharded: bool = False,
    buffers: Any = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Path:
    """Save (kind, name, tensor) triples or `TensorShard`s as the only rank of its process group.

    `buffers`: save in the background; `meanwhile` is done before it is waited for.
    """
    import torch

    from flux2_ds.checkpoint import background, manager
    from flux2_ds.checkpoint.tensor_store import TensorShard
    from flux2_ds.distributed import Process

    def given() -> Iterator[TensorShard]:
        for shard in tensor_shards:
            yield shard if isinstance(shard, TensorShard) else TensorShard(*shard)

    what = root, step, given, state or {}, Process(0, 1, torch.device("cpu"))
    if buffers is None:
        return manager.save(*what, sharded=sharded)
    failures: list[str | None] = []
    saving = background.BackgroundSave(
        *what, buffers, lambda path, failure: failures.append(failure), sharded=sharded
    )
    meanwhile()
    saving.wait(lambda: None)
    assert failures == [None]
    return saving.path
