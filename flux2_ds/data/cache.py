"""A bounded folder on a local disk for what was read from a store.

Several processes may share it. Each file is one read, checked again when it is taken from here. When the
folder is over its limit, the files that were used least recently are removed. The folder is one of its
own in the one that the user gives, where other files may be.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from flux2_ds.config.recipe import is_url
from flux2_ds.data.storage import Blob, DamagedError
from flux2_ds.errors import UserError

log = logging.getLogger("flux2_ds")

FOLDER = "flux2-ds-cache"
_SLACK = 0.02
"""A process looks at the folder after every 2 % of its limit that it writes."""


class Cache:
    """Reads blobs; keeps those that come from a URL in `folder`/flux2-ds-cache, at most about `limit`
    bytes of them, until that cannot be written."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder / FOLDER
        self._limit = limit
        self._written = limit  # look before the first write
        self._writable = True
        self._lock = threading.Lock()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache {folder} cannot be made: {error.strerror}.") from error

    def view(self, blob: Blob, check: Callable[[memoryview], None]) -> memoryview:
        """The bytes of `blob`, from the folder if they are there and pass `check`."""
        if not is_url(blob.location):
            return blob.view(check)
        name = f"{blob.location}|{blob.offset}|{blob.size}"
        path = self._folder / hashlib.sha256(name.encode()).hexdigest()[:40]
        with contextlib.suppress(OSError, DamagedError):  # then it is read again from the store
            data = memoryview(path.read_bytes())
            check(data)
            os.utime(path)
            return data
        data = blob.view(check)
        try:
            self._keep(path, data)
        except OSError as error:
            self._give_up(error)
        return data

    def _keep(self, path: Path, data: memoryview) -> None:
        with self._lock:
            if not self._writable:
                return
            self._written += len(data)
            if self._written > _SLACK * self._limit:
                self._make_room()
                self._written = 0
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            partial.write_bytes(data)
            with contextlib.suppress(FileNotFoundError):  # another process has made room
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            if self._writable:
                log.warning(
                    "data.cache %s cannot be written (%s): nothing more is kept there. Give another "
                    "folder or a lower data.cache_gb.", self._folder, error.strerror,
                )  # fmt: skip
            self._writable = False

    def _make_room(self) -> None:
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                facts = path.stat()
                if stat.S_ISREG(facts.st_mode):
                    files.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= (1 - _SLACK) * self._limit:
                break
            path.unlink(missing_ok=True)
            total -= size
