"""A real Slurm of one node with two GPUs that are only files, as root, for the time of a test."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from machines import CannotStartError

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")


class Slurm:
    """munged, slurmctld and slurmd in a network namespace of their own, a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._space = f"f2ds{os.getpid()}s"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Slurm:
        folder = self._folder
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        for number in range(2):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "slurm.conf").write_text(
            "ClusterName=one\nSlurmctldHost=node01\nSlurmUser=root\n"
            f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket,cred_expire=5\n"
            f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool\n"
            f"SlurmctldLogFile={folder}/slurmctld.log\nSlurmdLogFile={folder}/slurmd.log\n"
            f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.pid\n"
            "ProctrackType=proctrack/pgid\nTaskPlugin=task/none\nMpiDefault=none\n"
            "SelectType=select/cons_tres\nGresTypes=gpu\nReturnToService=2\nKillWait=30\n"
            "SlurmdParameters=config_overrides\n"
            "SelectTypeParameters=CR_Core_Memory\nDefMemPerCPU=10\n"
            "NodeName=node01 CPUs=4 RealMemory=1000 Gres=gpu:2\n"
            "PartitionName=all Nodes=node01 Default=YES MaxTime=INFINITE State=UP\n"
        )
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.8.1 node01\n")
        for words in (
            f"netns add {self._space}",
            f"-n {self._space} link set lo up",
            f"-n {self._space} addr add 10.77.8.1/32 dev lo",
        ):
            subprocess.run(["ip", *words.split()], check=True)
        munge = {name: f"{folder}/munge.{name}" for name in ("key", "log", "pid", "seed")}
        options = [f"--{name}-file={path}" for name, path in munge.items()]
        self._start("munged", "-F", "--force", f"--socket={folder}/munge.socket", *options)
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D", "-N", "node01")
        for _ in range(30):
            if any(daemon.poll() is not None for daemon in self._daemons):
                break
            if "idle" in self.told("sinfo", "--noheader", "--format=%T"):
                return self
            time.sleep(0.5)
        logs = "".join(path.read_text() for path in folder.glob("slurm*.log"))
        self.__exit__()
        raise CannotStartError(f"Slurm does not start:\n{logs[-3000:]}")

    def __exit__(self, *error: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait()
        subprocess.run(["ip", "netns", "del", self._space], check=False)

    def inside(self, argv: list[str]) -> list[str]:
        """`argv` on the node."""
        # Not `ip netns exec`: it hides /sys/fs/cgroup, which slurmd looks for.
        setting = f'hostname node01; mount --bind {self._folder}/hosts /etc/hosts; exec "$@"'
        inside = ["unshare", "--uts", "--mount", "sh", "-c", setting, "sh", *argv]
        return ["nsenter", f"--net=/run/netns/{self._space}", *inside]

    def told(self, *argv: str) -> str:
        """What one of Slurm's programs prints."""
        done = subprocess.run(
            self.inside(list(argv)),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stdout + done.stderr

    def _start(self, *argv: str) -> None:
        log = (self._folder / f"{argv[0]}.out").open("w")
        self._daemons.append(
            subprocess.Popen(self.inside(list(argv)), env=self.environment, stdout=log, stderr=log)
        )
        time.sleep(0.5)
