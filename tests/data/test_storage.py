"""Real servers on loopback: what is read from a store is what is on disk, whatever happens to it."""

import base64
import errno
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import fsspec
import pytest
import torch
from botocore.exceptions import ParamValidationError
from huggingface_hub import HfFileSystem, constants
from safetensors.torch import save_file
from test_loader import assert_same, make_loader, prepared
from urllib3 import ProxyManager

from flux2_ds.commands.loopback import CREDENTIALS, served
from flux2_ds.config.recipe import Data
from flux2_ds.data import storage
from flux2_ds.data.cache import FOLDER, Cache
from flux2_ds.data.index import (
    CONDITIONING_NAME,
    PROMPTS_NAME,
    encoded_prompts,
    read_index,
    write_index,
)
from flux2_ds.data.shards import ShardReader, read_conditioning
from flux2_ds.data.storage import Blob, connections, join
from flux2_ds.errors import EXIT_USER_ERROR, OutageError, UserError
from flux2_ds.prepare.sources import find_images

__all__ = ["prepared"]  # the fixture
STORES = ["http", "s3"]
CONDITIONING = {
    "latent_mean": torch.arange(128.0),
    "latent_std": torch.ones(128),
    "empty_text": torch.arange(1024.0).view(512, 2),
}


@pytest.fixture(scope="module")
def folder(prepared) -> Path:
    """Shards with an index, as `prepare` leaves them."""
    path, index = prepared
    write_index(path, index)
    save_file(CONDITIONING, path / CONDITIONING_NAME)
    (path / "whole.bin").write_bytes(bytes(range(256)) * 40)
    return path


@pytest.mark.parametrize("kind", STORES)
def test_training_batches_are_those_from_disk(folder, kind):
    local = make_loader((folder, read_index(folder)))
    with served(kind, folder) as server:
        index = read_index(server.url)
        assert index == read_index(folder)
        found = read_conditioning(server.url, index)
        assert all((found[name] == CONDITIONING[name]).all() for name in CONDITIONING)
        remote = make_loader((server.url, index))
        for step, batches in enumerate(remote.steps(3, 12), start=3):
            assert_same(batches, local.read(step))


@pytest.mark.parametrize("kind", STORES)
def test_a_server_killed_while_reading_is_waited_for(folder, kind, monkeypatch, caplog):
    monkeypatch.setattr(storage, "PAUSES_S", (0.2,) * 100)
    caplog.set_level(logging.WARNING)
    index = read_index(folder)
    local = make_loader((folder, index))
    with served(kind, folder) as server:
        remote = make_loader((server.url, index))
        for step, batches in enumerate(remote.steps(0, 60)):
            assert_same(batches, local.read(step))
            if step in (2, 20):
                server.kill()
                threading.Timer(0.6, server.start).start()
                time.sleep(0.1)
    assert "next try in" in caplog.text and server.url in caplog.text


@pytest.mark.parametrize("kind", STORES)
def test_a_server_that_stays_away_is_named_with_its_shard(folder, kind, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.01))
    index = read_index(folder)
    with served(kind, folder) as server:
        loader = make_loader((server.url, index))
        loader.read(0)
        server.kill()
        with pytest.raises(
            OutageError, match=rf"{server.url}/\d\.tar stays out of reach after 3 tries"
        ):
            for step in range(1, 100):
                loader.read(step)


@pytest.mark.parametrize(("number", "passes"), [(errno.ESTALE, True), (errno.EACCES, False)])
def test_a_disk_that_may_come_back_is_no_mistake_of_the_user(folder, monkeypatch, number, passes):
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(
        UserError, match=rf"whole\.bin cannot be read: {os.strerror(number)}"
    ) as error:
        Blob(str(folder / "whole.bin")).read()
    assert isinstance(error.value, OutageError) == passes


@pytest.mark.parametrize("kind", STORES)
def test_what_is_not_there_is_an_error_at_once(folder, kind):
    with served(kind, folder) as server:
        assert Blob(join(server.url, "whole.bin"), 256, 256).read() == bytes(range(256))
        assert len(Blob(join(server.url, "whole.bin")).read()) == 10240
        started = time.monotonic()
        with pytest.raises(UserError, match=r"gone\.bin cannot be read: FileNotFoundError"):
            Blob(join(server.url, "gone.bin")).read()
        assert time.monotonic() - started < 1  # without a pause of the retries


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def pythons_server(
    folder: Path, authorization: str | None = None, sent: list[int] | None = None
) -> Iterator[tuple[str, list]]:
    """`python -m http.server`, which ignores ranges: its address, and what it is asked for.

    `sent`: filled with how many bytes of each file it could send.
    """
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            given = self.headers["Authorization"]
            if authorization in (None, given):
                super().do_GET()
            else:
                self.send_error(403 if given else 401)

        def copyfile(self, source, outputfile):
            with suppress(ConnectionError):
                super().copyfile(source, outputfile)
            if sent is not None:
                sent.append(source.tell())

        def log_message(self, *_):
            pass

    with serving(partial(Handler, directory=folder)) as url:
        yield url, asked


def test_a_server_without_ranges_is_said_before_it_has_sent_the_file(tmp_path):
    size = 64 << 20
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(size)
    sent = []
    with pythons_server(tmp_path, sent=sent) as (url, asked):
        assert Blob(f"{url}/large.bin", 0, size).read() == bytes(
            size
        )  # which is the part asked for
        for offset in (0, 256):
            with pytest.raises(UserError, match="asked for 256 bytes, its server sends the whole"):
                Blob(f"{url}/large.bin", offset, 256).read()
        assert asked == ["/large.bin"] * 3
    assert len(sent) == 3 and sent[0] == size and max(sent[1:]) < size / 2


def test_the_environments_proxy_is_asked(tmp_path, monkeypatch):
    asked = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Proxy-Authorization"]))
            self.send_response(206)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")

        def log_message(self, *_):
            pass

    with serving(Proxy) as url:
        monkeypatch.setenv("http_proxy", url.replace("://", "://me:p%40ss@"))
        monkeypatch.setenv("no_proxy", "near.test")
        assert Blob("http://far.test/x.tar", 8, 4).read() == b"data"
        account = base64.b64encode(b"me:p@ss").decode()
        assert asked == [("http://far.test/x.tar", f"Basic {account}")]
        assert isinstance(connections("http://far.test/y"), ProxyManager)
        for near in ("http://near.test/y", "http://user:word@near.test:80/y"):
            assert not isinstance(connections(near), ProxyManager)


def test_a_store_without_ranges_is_said_at_once(tmp_path, monkeypatch, fresh_clients):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "x.tar").write_bytes(bytes(range(256)) * 40)
    for name, value in {**CREDENTIALS, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    with pythons_server(tmp_path) as (url, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert len(Blob("s3://bucket/x.tar", 0, 10240).read()) == 10240
        for offset in (0, 256):
            with pytest.raises(UserError, match=r"s3://bucket/x\.tar: asked for 256 .* whole file"):
                Blob("s3://bucket/x.tar", offset, 256).read()
        paths, signatures = zip(*(path.split("?X-Amz-Algorithm=") for path in asked), strict=True)
        assert paths == ("/bucket/x.tar",) * 3 and all(signatures)


def test_a_store_that_refuses_signed_urls_is_read_all_the_same(
    tmp_path, monkeypatch, fresh_clients
):
    """As one in another region does."""
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "x.tar").write_bytes(b"content")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            self.send_error(400) if "?" in self.path else super().do_GET()

    with serving(partial(Handler, directory=tmp_path)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert Blob("s3://bucket/x.tar", 0, 7).read() == b"content"


def answering(status: int) -> type[BaseHTTPRequestHandler]:
    """A server of nothing but this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    return Handler


@pytest.mark.parametrize(
    ("status", "error"), [(401, UserError), (403, UserError), (404, UserError), (500, OutageError)]
)
def test_what_the_hub_refuses_is_an_error_at_once(monkeypatch, status, error):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(storage, "PAUSES_S", (0.01,))
    with serving(answering(status)) as url:
        hub = HfFileSystem(endpoint=url, skip_instance_cache=True)
        monkeypatch.setattr(storage, "file_system", lambda _: (hub, "datasets/o/n/x.tar"))
        with pytest.raises(UserError, match=rf"hf://datasets/o/n/x\.tar .*{status}") as caught:
            Blob("hf://datasets/o/n/x.tar", 5, 10).read()
    assert type(caught.value) is error


def test_an_offline_hub_is_said_at_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be read: OfflineModeIsEnabled: .*HF_HUB_OFFLINE"):
        Blob("hf://datasets/o/n/x.tar").read()


class GoogleError(Exception):
    """As gcsfs 2026.8 gives them, which is not installed here."""

    def __init__(self, code: int) -> None:
        super().__init__(f"Anonymous caller does not have access, {code}")
        self.code = code


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (GoogleError(401), UserError),
        (OSError("Forbidden: https://host/b/x.tar?alt=media\nno access"), UserError),
        (ParamValidationError(report="no name of a bucket"), UserError),
        (GoogleError(503), OutageError),
    ],
)
def test_what_a_store_refuses_is_an_error_at_once(monkeypatch, answer, error):
    monkeypatch.setattr(storage, "PAUSES_S", (0.01,))
    store = Mock(cat_file=Mock(side_effect=answer))
    monkeypatch.setattr(storage, "file_system", lambda _: (store, "b/x.tar"))
    with pytest.raises(UserError, match=r"gs://b/x\.tar ") as caught:
        Blob("gs://b/x.tar", 5, 10).read()
    assert type(caught.value) is error
    assert store.cat_file.call_count == (1 if error is UserError else 2)


def test_the_signature_of_a_url_that_a_store_sends_us_to_is_not_said(monkeypatch, caplog):
    monkeypatch.setattr(storage, "PAUSES_S", (0.01,))

    class Elsewhere(answering(503)):
        def do_GET(self):  # noqa: N802
            if "secret" in self.path:
                super().do_GET()
            else:
                self.send_response(302)
                self.send_header("Location", "/elsewhere.bin?Signature=secret&Expires=5")
                self.end_headers()

    with (
        serving(Elsewhere) as url,
        pytest.raises(OutageError, match=r"503, .*/elsewhere\.bin'") as error,
    ):
        Blob(f"{url}/whole.bin").read()
    assert "next try in" in caplog.text
    assert "secret" not in caplog.text + str(error.value)


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    """fsspec keeps clients with the configuration that they began with."""
    for kind in STORES:
        fsspec.get_filesystem_class(kind).clear_instance_cache()
    yield
    for kind in STORES:
        fsspec.get_filesystem_class(kind).clear_instance_cache()


def test_credentials_of_a_server_are_in_fsspecs_configuration(folder, monkeypatch, fresh_clients):
    right, wrong = (
        {"headers": {"Authorization": f"Basic {base64.b64encode(name).decode()}"}}
        for name in (b"user:password", b"user:guess")
    )
    with pythons_server(folder, right["headers"]["Authorization"]) as (url, asked):
        for settings, status in (({}, 401), (wrong, 403)):
            monkeypatch.setitem(fsspec.config.conf, "https", settings)
            with pytest.raises(
                UserError, match=rf"{status}, .* give the credentials as docs/data\.md"
            ):
                Blob(f"{url}/whole.bin").read()
        monkeypatch.setitem(fsspec.config.conf, "https", right)
        assert len(Blob(f"{url}/whole.bin").read()) == 10240
    assert len(asked) == 3


@pytest.mark.parametrize("profile", [None, "none-such"])
def test_a_store_without_credentials_is_said_at_once(tmp_path, monkeypatch, fresh_clients, profile):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    monkeypatch.setattr(storage, "PAUSES_S", ())
    with pytest.raises(UserError, match=r"s3://bucket/x cannot be read: .* give the credentials"):
        Blob("s3://bucket/x").read()


def test_prompts_whose_header_asks_for_more_than_there_is_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", ())
    (tmp_path / PROMPTS_NAME).write_bytes((1 << 45).to_bytes(8, "little") + b"{}")
    with served("http", tmp_path) as server:
        assert encoded_prompts(str(tmp_path)) == encoded_prompts(server.url) == set()


@pytest.mark.parametrize("cut", [False, True])
def test_a_shard_damaged_in_the_store_is_refused(folder, tmp_path, monkeypatch, cut):
    monkeypatch.setattr(storage, "PAUSES_S", (0.01,))
    shutil.copytree(folder, tmp_path / "copy")
    index = read_index(folder)
    path = tmp_path / "copy" / index.shards[0].name
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content[:800] if cut else content)
    reason = "it ends before byte" if cut else "not what was written"
    with (
        served("http", tmp_path / "copy") as server,
        pytest.raises(UserError, match=rf"0\.tar stays out of reach.*{reason}") as error,
    ):
        ShardReader(join(server.url, "0.tar"), index.shards[0]).latent(0)
    assert error.value.code == EXIT_USER_ERROR  # starting again would not help


def test_the_cache_is_used_checked_and_bounded(folder, tmp_path):
    index = read_index(folder)
    local = make_loader((folder, index))
    steps = 24
    with served("http", folder) as server:
        cache = Cache(tmp_path / "cache", 10**9)
        loader = make_loader((server.url, index), fetch=cache.view)
        for step in range(steps):
            assert_same(loader.read(step), local.read(step))
        assert list((tmp_path / "cache" / FOLDER).iterdir())
        server.kill()
        again = make_loader((server.url, index), fetch=Cache(tmp_path / "cache", 10**9).view)
        for step in range(steps):
            assert_same(again.read(step), local.read(step))  # without the server

        server.start()
        for path in (tmp_path / "cache" / FOLDER).iterdir():
            path.write_bytes(b"damaged" * 100)
        assert_same(make_loader((server.url, index), fetch=cache.view).read(3), local.read(3))

        small = Cache(tmp_path / "small", 30_000)
        loader = make_loader((server.url, index), fetch=small.view)
        mine = [tmp_path / "small" / "thesis.txt", tmp_path / "small" / FOLDER / "folder" / "x"]
        for path in mine:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(bytes(50_000))
            os.utime(path, (0, 0))
        largest = 0
        for step in range(steps):
            assert_same(loader.read(step), local.read(step))
            sizes = [path.stat().st_size for path in (tmp_path / "small" / FOLDER).glob("?" * 40)]
            largest = max(largest, sum(sizes))
        assert 10_000 < largest <= 30_000 + 10_000  # one read is at most 6 kB here
    assert not list((tmp_path / "small" / FOLDER).glob("*.partial"))
    assert all(path.is_file() for path in mine)


def test_training_goes_on_without_a_cache_that_is_full_or_damaged(
    folder, tmp_path, monkeypatch, caplog
):
    index = read_index(folder)
    local = make_loader((folder, index))
    with served("http", folder) as server:
        kept = Cache(tmp_path, 10**9)
        make_loader((server.url, index), fetch=kept.view).read(0)
        for path in (tmp_path / FOLDER).iterdir():
            path.unlink()
            path.mkdir()  # reading it is an OSError
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=full))
        loader = make_loader((server.url, index), fetch=kept.view)
        for step in range(4):
            assert_same(loader.read(step), local.read(step))
    assert caplog.text.count("cannot be written (No space left on device)") == 1


def test_processes_that_make_room_for_each_other_go_on(tmp_path):
    caches = [Cache(tmp_path, 1000) for _ in range(4)]  # as of one process each

    def keep(number: int) -> None:
        for n in range(300):
            caches[number]._keep(tmp_path / FOLDER / f"{number}-{n}", memoryview(bytes(600)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(keep, range(4)))


def test_files_on_disk_are_not_cached(folder, tmp_path):
    cache = Cache(tmp_path / "cache", 10**6)
    make_loader((folder, read_index(folder)), fetch=cache.view).read(0)
    assert not list((tmp_path / "cache" / FOLDER).iterdir())


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("gs://bucket/x.tar", r"needs another package: .*install gcsfs"),
        ("s4://bucket/x.tar", r"cannot be opened: Protocol not known: s4"),
    ],
)
def test_an_unknown_kind_of_store(tmp_path, monkeypatch, location, reason):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # wherever it is installed
    for read in (
        Blob(location).read,
        lambda: find_images(Data(images=location, shards=""), tmp_path),
    ):
        with pytest.raises(UserError, match=f"{location} {reason}"):
            read()
