"""The worker module is imported by its tests, too."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def workers() -> Iterator[None]:
    """Ends the worker processes after the last test."""
    import pool

    yield
    pool.end_all()
