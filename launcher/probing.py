"""Questions that need torch or DeepSpeed, put to a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from flux2_ds.errors import EXIT_USER_ERROR, UserError
from flux2_ds.plan import read_deepspeed, shipped_configs
from flux2_ds.recipe import Recipe


def probe(accelerator: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run flux2_ds.probe."""
    return subprocess.run(
        [sys.executable, "-m", "flux2_ds.probe", "--accelerator", accelerator, *arguments],
        env={**os.environ, "DS_ACCELERATOR": accelerator},
        capture_output=True,
        text=True,
        check=False,
    )


def check_zero(recipe: Recipe) -> None:
    """Refuse keys and values that DeepSpeed does not know, in a config of the user's own: some seconds.

    Raises:
        UserError: naming the keys of zero_optimization.
    """
    if isinstance(recipe.deepspeed, str) and recipe.deepspeed in shipped_configs():
        return
    asked = probe("cpu", "--zero", json.dumps(read_deepspeed(recipe.deepspeed)))
    if asked.returncode == EXIT_USER_ERROR:
        raise UserError(asked.stderr.strip().splitlines()[-1].removeprefix("error: "))
