"""What forked.py's processes import, once for all of them."""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"

# ruff: noqa: F401
import deepspeed.launcher.launch
import deepspeed.launcher.runner
import matplotlib.backends.backend_agg
import matplotlib.figure

import flux2_ds.commands.bench
import flux2_ds.prepare.__main__
import flux2_ds.train
import launcher.cli
import launcher.reaper

gc.freeze()  # what is imported is never garbage: a collection looks at a tenth of it
