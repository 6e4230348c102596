"""flux2-ds: train FLUX.2 (dev, klein) with DeepSpeed from one recipe."""

import logging
import os
import sys
from types import TracebackType

# At every import without CUDA bitsandbytes would warn that an optional kernel is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# And DeepSpeed, before any other output, that it has found no GPU; the recipe says whether one is wanted.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)

# Samples of several lengths, and passes recorded beside others, would leave holes in the card's memory that
# nothing fits into. torch reads this once, early.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _say_interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ctrl-C at any moment, most of all while torch is imported, is no defect to trace."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_interrupted
