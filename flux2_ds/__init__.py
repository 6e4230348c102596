"""flux2-ds: train FLUX.2 (dev, klein) with DeepSpeed from one recipe."""

import logging

# At every import without CUDA bitsandbytes would warn that an optional kernel is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
