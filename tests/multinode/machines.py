"""Two machines in one: network namespaces with their own addresses, names and ssh servers.

Made with `ip` and Debian's openssh-server, which need root. The file system is shared, as a cluster's
is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SSHD = "/usr/sbin/sshd"


class CannotStartError(Exception):
    """This machine does not allow what the test needs."""


@dataclass
class Machine:
    """A network namespace with an ssh server."""

    name: str
    address: str
    server: subprocess.Popen[bytes] | None = None

    def inside(self, argv: list[str]) -> list[str]:
        """`argv` in this machine: its network, its /etc/hosts, its host name."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh", *argv]
        return ["ip", "netns", "exec", self.name, *named]


class Cluster:
    """Two machines on one wire, a context; `environment` makes ssh between them work."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Names of this process, so that two test runs do not meet.
        self.machines = [
            Machine(f"f2ds{os.getpid()}{letter}", f"10.77.7.{number}")
            for number, letter in enumerate("ab", start=1)
        ]
        programs = folder / "bin"
        programs.mkdir()
        ssh = programs / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}

    def __enter__(self) -> Cluster:
        try:
            self._wire()
            self._serve()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for machine in self.machines:
            if machine.server is not None:
                machine.server.terminate()
                machine.server.wait()
            subprocess.run(["ip", "netns", "del", machine.name], check=False, capture_output=True)
            shutil.rmtree(f"/etc/netns/{machine.name}", ignore_errors=True)

    def link(self, state: str) -> None:
        """Cut the wire ("down") or mend it ("up")."""
        do("ip", "-n", self.machines[0].name, "link", "set", "wire", state)

    def _wire(self) -> None:
        first, second = self.machines
        hosts = "127.0.0.1 localhost\n" + "".join(f"{m.address} {m.name}\n" for m in self.machines)
        for machine in self.machines:
            do("ip", "netns", "add", machine.name)
            etc = Path("/etc/netns") / machine.name  # what `ip netns exec` lays over /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(hosts)
        peer = ["peer", "name", "wire", "netns", second.name]
        do("ip", "-n", first.name, "link", "add", "wire", "type", "veth", *peer)
        for machine in self.machines:
            do("ip", "-n", machine.name, "link", "set", "lo", "up")
            do("ip", "-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "wire")
            do("ip", "-n", machine.name, "link", "set", "wire", "up")

    def _serve(self) -> None:
        for name in ("host_key", "user_key"):
            do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / name))
        public = (self._folder / "host_key.pub").read_text()
        known = "".join(f"{machine.name} {public}" for machine in self.machines)
        (self._folder / "known_hosts").write_text(known)
        (self._folder / "ssh_config").write_text(
            f"Host *\n User root\n IdentityFile {self._folder}/user_key\n"
            f" UserKnownHostsFile {self._folder}/known_hosts\n StrictHostKeyChecking yes\n"
        )
        (self._folder / "sshd_config").write_text(
            f"HostKey {self._folder}/host_key\nAuthorizedKeysFile {self._folder}/user_key.pub\n"
            "StrictModes no\nPasswordAuthentication no\nUsePAM no\nPidFile none\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it; a started service would make it
        for machine in self.machines:
            log = str(self._folder / f"{machine.name}.log")
            serve = [SSHD, "-D", "-E", log, "-f", str(self._folder / "sshd_config")]
            machine.server = subprocess.Popen(machine.inside(serve))
        first, second = self.machines
        for _ in range(50):
            asked = first.inside(["ssh", second.name, "hostname"])
            told = subprocess.run(
                asked, capture_output=True, text=True, check=False, env=self.environment
            )
            if told.stdout.strip() == second.name:
                return
            time.sleep(0.2)
        raise CannotStartError(f"ssh between the test's machines does not work: {told.stderr}")


def do(*argv: str) -> None:
    """Run a program that must succeed."""
    subprocess.run(argv, check=True, capture_output=True)
