"""Write safetensors files that others may read."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to `path`, contiguous, with the permissions that a new file gets here."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    use_default_permissions(path)


def use_default_permissions(path: Path) -> None:
    """Undo the 0600 that safetensors gives its files: shards and exports are shared."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
