"""Where the shipped `ds_configs/` and `recipes/` are: beside the package in a checkout, inside it
once installed."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped_directory(name: str) -> Path:
    """The directory of shipped files called `name` ("ds_configs" or "recipes")."""
    installed, checkout = _PACKAGE / name, _PACKAGE.parent / name
    return installed if installed.is_dir() else checkout
