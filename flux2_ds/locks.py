"""Files that one process at a time holds. Pure, no torch."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import IO

from flux2_ds.errors import UserError

log = logging.getLogger("flux2_ds")


def hold(path: Path, taken: str, unsure: str) -> IO[str]:
    """Hold `path` for as long as the returned file is open.

    Where its file system has no locks, a warning ends with `unsure`.

    Raises:
        UserError: another process holds it; the text is `taken`. Or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror}). Correct its owner, or name another directory."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(taken) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s); %s", path, error, unsure)
    return file
