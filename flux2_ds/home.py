"""`~/` in a recipe's paths, which a shell expands neither in YAML nor after `=`. Pure, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

PATHS = (
    "run_dir",
    "deepspeed",
    "model.path",
    "data.images",
    "data.shards",
    "data.more_shards",
    "data.cache",
    "preview.references",
    "launch.hostfile",
)
"""Settings that are a path, several, or paths by name."""


def expand_home(settings: Namespace) -> None:
    """Put the user's home for `~/` into the paths of a parsed recipe."""
    for name in PATHS:
        settings[name] = _expanded(settings[name])


def _expanded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _expanded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    return str(Path(value).expanduser()) if str(value).startswith("~/") else value
