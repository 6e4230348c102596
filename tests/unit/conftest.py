"""Tiny model directories, made once for all tests that need one."""

from pathlib import Path

import pytest

from flux2_ds.spec import Spec, read_spec


@pytest.fixture(scope="session", params=["klein", "dev"])
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory of each variant."""
    from flux2_ds.model.tiny import make_tiny  # here: most unit tests need no torch

    directory = tmp_path_factory.mktemp("tiny") / request.param
    make_tiny(directory, request.param)
    return directory


@pytest.fixture(scope="session")
def tiny_spec(tiny_model: Path) -> Spec:
    return read_spec(tiny_model)
