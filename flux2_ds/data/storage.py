"""Read files, or parts of them, on a local disk or under a URL. No torch.

URLs are read through fsspec: http(s)://, s3://, gs://, hf:// and whatever else is installed. A read that
fails is tried again with growing pauses, because stores and networks come back; what will not come
back (no such file, no permission) is an error at once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np

from flux2_ds.config.recipe import is_url
from flux2_ds.errors import OutageError, UserError, without_secrets

log = logging.getLogger("flux2_ds")

PAUSES_S = (1, 2, 4, 8, 16, 30, 60)
"""Waits between the tries of a read: a store may be away for two minutes."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_HTTP = ("http://", "https://")
_NOT_THE_STORE = (UserError, TypeError, AttributeError, NameError)

Value = TypeVar("Value")


class DamagedError(Exception):
    """The bytes are not those that were written."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A file, or `size` bytes of it from `offset` on."""

    location: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes; see `view`."""
        return bytes(self.view())

    def view(self, check: Callable[[memoryview], None] = lambda _: None) -> memoryview:
        """The bytes, after `check`, which raises `DamagedError` if they are wrong."""

        def checked() -> memoryview:
            data = memoryview(self._fetch()) if is_url(self.location) else self._load()
            if self.size is not None and len(data) != self.size:
                raise DamagedError(f"{len(data)} instead of {self.size} bytes at {self.offset}")
            check(data)
            return data

        if is_url(self.location):
            return tried_again(self.location, checked)
        try:
            return checked()
        except OSError as error:
            kind = UserError if isinstance(error, _FINAL) else OutageError
            raise kind(f"{self.location} cannot be read: {error.strerror}.") from error
        except DamagedError as error:
            raise UserError(
                f"{self.location} is incomplete or damaged ({error}). Copy it again, or prepare it "
                "again."
            ) from error

    def _load(self) -> memoryview:
        with Path(self.location).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size if self.size is None else self.size
            buffer = np.empty(size, np.uint8).data  # memory that nobody fills with zeros first
            return buffer[: os.preadv(stream.fileno(), [buffer], self.offset)]

    def _fetch(self) -> bytes:
        system, path = file_system(self.location)
        part: dict[str, Any] = {"start": self.offset or None}
        if self.size is not None:
            part["end"] = self.offset + self.size
            if self.location.startswith(_HTTP):
                part["raise_for_status"] = self._check_part
        data: bytes = system.cat_file(path, **part)
        if self.size is not None and len(data) > self.size:
            raise self._no_ranges()  # other stores give no answer to look at before the bytes
        return data

    async def _check_part(self, response: Any) -> None:
        """Look at the answer to a request for a part before its body is read; aiohttp calls this."""
        if response.status == 200 and (self.offset or response.content_length != self.size):
            response.close()
            raise self._no_ranges()

    def _no_ranges(self) -> UserError:
        return UserError(
            f"{self.location}: asked for {self.size} bytes, its server sends the whole file: it does "
            "not serve parts of files (HTTP range requests). Use one that does, such as nginx."
        )


def file_system(location: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Trying again and again is left to us."""
    options: dict[str, Any] = {}
    if location.startswith("s3://"):
        options = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    elif location.startswith(_HTTP):
        from aiohttp import ClientTimeout  # here: the launcher need not wait for it

        options = {"client_kwargs": {"timeout": ClientTimeout(sock_connect=15, sock_read=60)}}
    try:
        system, path = fsspec.url_to_fs(location, **options)
    except ImportError as error:
        raise UserError(f"{location} needs another package: {error}.") from error
    except ValueError as error:
        raise UserError(f"{location} cannot be opened: {error}.") from error
    return system, path


def join(folder: str, name: str) -> str:
    """`name` in `folder`; an absolute path or a URL stays what it is."""
    if is_url(name) or Path(name).is_absolute():
        return name
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def tried_again(location: str, read: Callable[[], Value]) -> Value:
    """The value of `read`, which may fail for a while."""
    for pause in (*PAUSES_S, None):
        try:
            return read()
        except _FINAL as error:
            raise UserError(f"{location} cannot be read: {_reason(error)}.") from error
        except _NOT_THE_STORE:
            raise
        except Exception as error:  # every store has errors of its own; all end in a UserError
            if _refused(error):
                raise UserError(
                    f"{location} cannot be read: {_reason(error)}. Check the address, and give the "
                    "credentials as docs/data.md says under Reading."
                ) from error
            if pause is None:
                kind = UserError if isinstance(error, DamagedError) else OutageError
                raise kind(
                    f"{location} stays out of reach after {len(PAUSES_S) + 1} tries: "
                    f"{_reason(error)}. Check the address, the network and the credentials."
                ) from error
            log.warning("%s: %s; next try in %d s", location, _reason(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _refused(error: Exception) -> bool:
    """Whether the store has nothing of this name, or not for these credentials."""
    # Here, like all that belongs to a kind of store.
    from botocore.exceptions import NoCredentialsError, ProfileNotFound
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, (NoCredentialsError, ProfileNotFound, OfflineModeIsEnabled)):
        return True
    response = getattr(error, "response", None)
    status = (
        getattr(error, "status", None)  # aiohttp's
        or getattr(response, "status_code", None)  # the hub's
        or getattr(error, "code", None)  # gcsfs', which leaves of a 403 an OSError with a word
    )
    return status in (401, 403, 404) or str(error).startswith("Forbidden: ")


def _reason(error: Exception) -> str:
    text = without_secrets(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
