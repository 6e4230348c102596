"""Serve a folder on this machine alone, by HTTP or as an S3 store: for tests and `bench-data`.

    python -m flux2_ds.loopback http 8080 shards      http://127.0.0.1:8080/...
    python -m flux2_ds.loopback s3 8080 shards        s3://data/..., AWS_ENDPOINT_URL=http://127.0.0.1:8080

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
    from moto.server import ThreadedMotoServer

    filling = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    filling.start()
    host, filling_port = filling.get_host_and_port()
    os.environ |= CREDENTIALS
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{filling_port}", region_name="us-east-1"
    )
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(path), BUCKET, str(path.relative_to(folder)))
    # Only a full store is reachable under the port that its clients know.
    ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False).start()
    while True:
        time.sleep(3600)


def end_with(parent: int) -> None:
    """End this process as soon as its parent is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


class Server:
    """A server process that can be killed and started again under the same address; it does not
    outlive this one."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self._folder = kind, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}" if kind == "http" else f"s3://{BUCKET}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        where = [self.kind, str(self.port), str(self._folder)]
        command = [sys.executable, "-m", __name__, *where, str(os.getpid())]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {self._process.returncode}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """The process that serves."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it without notice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def served(kind: str, folder: Path) -> Iterator[Server]:
    """A running server; for S3 the environment leads clients in this process to it."""
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
        threading.Thread(target=end_with, args=[int(sys.argv[4])], daemon=True).start()
    {"http": serve_http, "s3": serve_s3}[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
