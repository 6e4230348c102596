"""Serve a folder on this machine alone, by HTTP or as an S3 store: for tests and `bench-data`.

    python -m flux2_ds.commands.loopback http 8080 FOLDER    http://127.0.0.1:8080/...
    python -m flux2_ds.commands.loopback s3 8080 FOLDER      s3://data/..., with
                                                             AWS_ENDPOINT_URL=http://127.0.0.1:8080

The S3 store is moto's, which the `dev` extra installs; it holds the files in memory.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

BUCKET = "data"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "loopback", "AWS_SECRET_ACCESS_KEY": "loopback"}


def serve_http(port: int, folder: Path) -> None:
    """Serve until killed; aiohttp answers range requests."""
    from aiohttp import web  # here: nobody but this process needs a server

    app = web.Application()
    app.router.add_static("/", folder)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def serve_s3(port: int, folder: Path) -> None:
    """Fill a store, then serve it until killed."""
    import boto3
    from moto import mock_aws
    from moto.server import ThreadedMotoServer

    os.environ |= CREDENTIALS
    os.environ.pop("AWS_ENDPOINT_URL", None)  # where this server will be, for its parent
    mock_aws().start()  # this process's client writes into the store that its server then serves
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(path), BUCKET, str(path.relative_to(folder)))
    ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False).start()
    threading.Event().wait()


def exit_with(parent: int) -> None:
    """End this process as soon as its parent is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


class Server:
    """A server process that can be killed and started again at the same address; it does not outlive
    its parent."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self._folder = kind, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}" if kind == "http" else f"s3://{BUCKET}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        where = [self.kind, str(self.port), str(self._folder), str(os.getpid())]
        command = [sys.executable, "-m", __name__, *where]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {self.process.returncode}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End it without notice."""
        self.process.kill()
        self.process.wait()


@contextmanager
def served(kind: str, folder: Path) -> Iterator[Server]:
    """A running server; for S3 the environment leads this process's clients to it."""
    server = Server(kind, folder)
    before = dict(os.environ)
    if kind == "s3":
        os.environ |= {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}
    # fsspec keeps clients, which know the address of an earlier server.
    fsspec.get_filesystem_class(kind).clear_instance_cache()
    try:
        server.start()
        yield server
    finally:
        server.kill()
        os.environ.clear()
        os.environ |= before


if __name__ == "__main__":
    if len(sys.argv) > 4:  # not by hand
        threading.Thread(target=exit_with, args=[int(sys.argv[4])], daemon=True).start()
    {"http": serve_http, "s3": serve_s3}[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
