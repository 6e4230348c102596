"""TensorBoard, which needs no account: the same numbers and previews, in RUN_DIR/tensorboard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

log = logging.getLogger("flux2_ds")


class TensorBoard:
    """The event files of a run; what fails is said once, and training goes on without them.

    A start from step `resumed_at` hides what an earlier one wrote of later steps.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], resumed_at: int) -> None:
        self._folder, self._config, self._resumed_at = run_dir / "tensorboard", config, resumed_at
        self._writer: Any = None
        self._failed = False

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the numbers among the values of `step`."""

        def send(writer: Any) -> None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, step)

        self._send(send)

    def log_previews(self, step: int, images: list[tuple[str, Path]]) -> None:
        """Write images, pairs of prompt and path."""

        def send(writer: Any) -> None:
            for number, (prompt, path) in enumerate(images):
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                writer.add_image(f"samples/{number}: {prompt}", pixels, step, dataformats="HWC")

        self._send(send)

    def finish(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._send(lambda writer: writer.close())

    def _start(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # half a second, for those who want it

        # Of step 0 there are previews, which a start from there makes again.
        first = self._resumed_at + 1 if self._resumed_at else 0
        writer = SummaryWriter(self._folder, purge_step=first)
        text = yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True)
        # Indented, which Markdown shows as it is.
        writer.add_text("recipe", "    " + text.replace("\n", "\n    "), self._resumed_at)
        return writer

    def _send(self, write: Callable[[Any], None]) -> None:
        if self._failed:
            return
        try:
            self._writer = self._writer or self._start()
            write(self._writer)
            self._writer.flush()
        except Exception as error:  # also of the thread that writes, such as a full disk's
            log.warning("TensorBoard failed (%s); the run goes on without it", error)
            self._failed = True
