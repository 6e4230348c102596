"""Read files, or parts of them, on a local disk or under a URL. No torch.

URLs are read through fsspec: http(s)://, s3://, gs://, hf:// and whatever else is installed; parts of files over
http(s):// and s3:// by urllib3, a connection for each thread. A read that
fails is tried again with growing pauses, because stores and networks come back; what will not come
back (no such file, no permission) is an error at once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import fsspec
import numpy as np
from urllib3 import PoolManager, ProxyManager, Retry, Timeout, make_headers
from urllib3.exceptions import MaxRetryError, SSLError

from flux2_ds.config.recipe import is_url
from flux2_ds.errors import OutageError, UserError, without_secrets

log = logging.getLogger("flux2_ds")

PAUSES_S = (1, 2, 4, 8, 16, 30, 60)
"""Waits between the tries of a read: a store may be away for two minutes."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_HTTP = ("http://", "https://")
_CHUNK = 1 << 18
_NOT_THE_STORE = (UserError, TypeError, AttributeError, NameError)

Value = TypeVar("Value")


class DamagedError(Exception):
    """The bytes are not those that were written."""


class StatusError(Exception):
    """A web server's refusal."""

    def __init__(self, status: int, reason: str | None, url: str) -> None:
        super().__init__(f"{status}, {reason}, url={url!r}")
        self.status = status


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
            data = self._fetch() if is_url(self.location) else self._load()
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
            left = max(0, os.fstat(stream.fileno()).st_size - self.offset)
            # No more than there is: a damaged header may ask for any size.
            size = left if self.size is None else min(left, self.size)
            buffer = np.empty(size, np.uint8).data  # memory that nobody fills with zeros first
            stream.seek(self.offset)
            return buffer[: stream.readinto(buffer)]  # in several reads: one ends at 2 GiB

    def _fetch(self) -> memoryview:
        system, path = file_system(self.location)
        headers = getattr(system, "kwargs", {})
        if self.location.startswith(_HTTP) and headers.keys() <= {"headers"}:
            return self._download(path, headers.get("headers", {}))
        if self.location.startswith("s3://") and self.size is not None:
            with suppress(StatusError, FileNotFoundError, SSLError):
                return self._download(system.sign(path), {})
            # Then s3fs finds the bucket's region, has other certificates, or says what is wrong.
        end = None if self.size is None else self.offset + self.size
        data: bytes = system.cat_file(path, start=self.offset or None, end=end)
        if self.size is not None and len(data) > self.size:
            raise self._no_ranges()
        return memoryview(data)

    def _download(self, url: str, headers: Mapping[str, str]) -> memoryview:
        """The bytes over HTTP, received where they stay, by the thread that asks.

        fsspec reads for all threads in one, and into memory that is not to be written to, so that it was copied again.
        """
        headers = {**headers, "Accept-Encoding": "identity"}
        if self.size is not None:
            headers["Range"] = f"bytes={self.offset}-{self.offset + self.size - 1}"
        try:
            response = connections(url).request("GET", url, headers=headers, preload_content=False)
        except MaxRetryError as error:
            raise error.reason or error from None  # its own text has the URL with its query
        try:
            if response.status == 404:
                raise FileNotFoundError(url)
            if response.status == 416:  # of what cannot be there no server is away
                raise DamagedError(f"it ends before byte {self.offset}")
            if response.status not in (200, 206):
                where = urljoin(url, response.geturl() or "")
                raise StatusError(response.status, response.reason, where)
            length = int(response.headers.get("Content-Length", -1))
            if self.size is None:
                return memoryview(response.read())
            if response.status == 200 and (self.offset or length != self.size):
                raise self._no_ranges()
            size = self.size if length < 0 else min(length, self.size)
            buffer, filled = np.empty(size, np.uint8).data, 0
            while read := response.readinto(buffer[filled : filled + _CHUNK]):
                filled += read
            return buffer[:filled]
        finally:
            response.close()

    def _no_ranges(self) -> UserError:
        return UserError(
            f"{self.location}: asked for {self.size} bytes, its server sends the whole file: it does "
            "not serve parts of files (HTTP range requests). Use one that does, such as nginx."
        )


def connections(url: str) -> PoolManager:
    """To the server of a URL, through the proxy that the environment names for it, such as HTTPS_PROXY."""
    server = urlsplit(url)
    host = server.netloc.rpartition("@")[2]
    proxy = None if proxy_bypass(host) else getproxies().get(server.scheme)
    return _connections(proxy if proxy is None or "://" in proxy else f"http://{proxy}")


@cache
def _connections(proxy: str | None) -> PoolManager:
    """Kept open from one read to the next, for as many threads as there are; trying again is left to us."""
    retries = Retry(total=None, connect=0, read=0, status=0, other=0, redirect=10)
    settings: dict[str, Any] = {
        "maxsize": 64,
        "timeout": Timeout(connect=15, read=60),
        "retries": retries,
    }
    if proxy is None:
        return PoolManager(**settings)
    account, _, _ = urlsplit(proxy).netloc.rpartition("@")
    headers = make_headers(proxy_basic_auth=unquote(account)) if account else None
    return ProxyManager(proxy, proxy_headers=headers, **settings)


def file_system(location: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Trying again and again is left to us."""
    options: dict[str, Any] = {}
    if location.startswith("s3://"):
        retries = {"total_max_attempts": 1}
        options = {"config_kwargs": {"retries": retries, "signature_version": "s3v4"}}
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
    from botocore.exceptions import NoCredentialsError, ParamValidationError, ProfileNotFound
    from huggingface_hub.errors import OfflineModeIsEnabled

    final = (NoCredentialsError, ParamValidationError, ProfileNotFound, OfflineModeIsEnabled)
    if isinstance(error, final):
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
    return f"{type(error).__name__}: {text[0].rstrip('.:')}" if text else type(error).__name__
