"""The worker module is imported by its tests, too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
