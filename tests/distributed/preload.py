"""What every worker imports, once: pool.py's workers are forked from a process that has done so."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import measure_loading  # noqa: F401
import trajectory  # noqa: F401

import flux2_ds.commands.bench  # noqa: F401
