"""What forked.py's processes import, once for all of them."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import flux2_ds.commands.bench
import flux2_ds.prepare.__main__
import flux2_ds.train  # noqa: F401
