"""One thread, and Ctrl-C, for all tests and for the processes that they start."""

import os
import signal

# pytest reads this file before it collects any folder, and so before any test module imports torch,
# which looks at the variable once. Sums over another number of threads differ in their last bits, and
# tests compare files byte by byte.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell starts what runs in its background with SIGINT ignored, which the launcher would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
