"""The `deepspeed` command that this package installs: DeepSpeed's own, which also takes `-m`.

DeepSpeed's launcher calls `-m` `--module`. Everything else is handed to it unchanged; `ds` is DeepSpeed's
own command still.
"""

from __future__ import annotations

import sys
from importlib import import_module


def main() -> None:
    """Entry point of `deepspeed`."""
    # Not a statement: the launcher that this file is beside imports no DeepSpeed.
    runner = import_module("deepspeed.launcher.runner")
    arguments = sys.argv[1:]
    if "-m" in arguments:
        place = arguments.index("-m")
        arguments[place] = "--module"
        rest = runner.parse_args(arguments).user_args
        if place < len(arguments) - len(rest):  # else it is an option of the user's script
            sys.argv[1:] = arguments
    runner.main()
