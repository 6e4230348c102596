"""`flux2-ds doctor`: everything that can be known to go wrong, before a queue slot is wasted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from flux2_ds.config.recipe import Launch, Recipe
from flux2_ds.run.run_dir import DOCTOR_TOKEN, existing_parent
from launcher.commands import forwarded, ssh
from launcher.hosts import Hosts
from launcher.supervise import Stopper, commands_here, run

_LIMIT = 300.0  # s for one host's checks, the CPU Adam build included
_SKEW = 2.0  # s by which clocks may differ
_WITHOUT = ["--run_dir=.", "--model.path=.", "--data.images=.", "--data.shards=."]
"""For a look at the machine alone; no check reads them."""


def examine(recipe: Recipe | None, launch: Launch, hosts: Hosts, arguments: list[str]) -> bool:
    """Print every finding; whether there is no failure among them."""
    slots = hosts.slots or {"": hosts.processes}
    token = place_token(recipe)
    common = [*arguments, "--all-processes", str(hosts.processes)]
    if recipe is None:
        common += [*_WITHOUT, "--without-recipe", f"--launch.accelerator={launch.accelerator}"]
    if token is not None:
        common += ["--token", str(token)]
    try:
        with ThreadPoolExecutor(32) as pool:
            found = dict(
                zip(
                    slots,
                    pool.map(lambda host: ask(host, slots[host], common), slots),
                    strict=True,
                )
            )
    finally:
        if token is not None:
            token.unlink()
    lines = grouped({host: findings.lines for host, findings in found.items()})
    answered = {host: findings.facts for host, findings in found.items() if findings.facts}
    if len(slots) > 1:
        odd = odd_ones_out(answered)
        lines += odd or [
            Finding("ok", "hosts", f"{len(answered)} hosts have the same of everything")
        ]
    show(lines)
    if all(line.status != "failure" for line in lines):
        measured = measure(launch, hosts)
        show(measured)
        lines += measured
    counts = {
        status: sum(line.status == status for line in lines) for status in ("failure", "warning")
    }
    print(f"{counts['failure']} failures, {counts['warning']} warnings")
    return not counts["failure"]


def ask(host: str, processes: int, common: list[str]) -> Findings:
    """One host's findings; `host` is empty for this one."""
    argv = [sys.executable, "-m", "launcher.host_checks", *common, "--processes", str(processes)]
    if host:
        variables = [f"{name}={value}" for name, value in forwarded(dict(os.environ)).items()]
        argv = ssh(host, ["env", *variables, *argv])
    started = time.time()
    findings = Findings()
    try:
        asked = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        findings.fail("host", f"{host or 'this host'} did not answer in {_LIMIT:.0f} s")
        return findings
    values, reason = answer(asked)
    if asked.returncode == 255 and host:
        findings.fail(
            "ssh", f"{reason} ({host})", f"`ssh {host} true` must work without a password"
        )
    elif values is None:
        findings.fail("host", reason, "the same directory and Python must be on every host")
    else:
        findings = Findings.of(values)
        # The host looked at its clock at some time between start and now.
        now = values["clock"]
        skew = max(started - now, now - time.time(), 0.0)
        if skew > _SKEW:
            findings.warn("clock", f"{skew:.0f} s off from this host's", "run an NTP client")
    return findings


def place_token(recipe: Recipe | None) -> Path | None:
    """A file where run_dir will be, for other hosts to see."""
    if recipe is None:
        return None
    place = existing_parent(recipe)
    if not os.access(place, os.W_OK):
        return None  # the checks say so
    token = place / f"{DOCTOR_TOKEN}{uuid.uuid4().hex[:8]}"
    token.touch()
    return token


def measure(launch: Launch, hosts: Hosts) -> list[Finding]:
    """The bandwidth between the processes, from a start like a training's."""
    if hosts.processes == 1:
        return []
    arguments = ["--accelerator", launch.accelerator, "--bandwidth"]
    commands = commands_here(launch, hosts, arguments, module="flux2_ds.commands.probe")
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "out").open("w+") as out:
        with Stopper(None) as stopper:  # the probe has nothing to save
            code = run(commands, stopper, output=out.fileno())
        if stopper.reason is not None:
            sys.exit(code)
        out.seek(0)
        said = out.read().strip().splitlines()
    found = [Finding(**json.loads(line)) for line in said if line.startswith('{"status"')]
    if code != 0:
        rest = [line for line in said if not line.startswith('{"status"')]
        reason = (rest or [f"it ended with code {code}"])[-1]
        remedy = "NCCL_DEBUG=INFO or docs/launcher.md; the command: " + str(commands[0])
        found.append(Finding("failure", "start", f"the processes do not meet: {reason}", remedy))
    return found


def grouped(lines: dict[str, list[Finding]]) -> list[Finding]:
    """One line for what all hosts say alike; a host's name before what only some say."""
    if len(lines) == 1:
        return next(iter(lines.values()))
    hosts_of: dict[Finding, list[str]] = {}
    for host, found in lines.items():
        for line in found:
            hosts_of.setdefault(line, []).append(host)
    merged = []
    for line, hosts in hosts_of.items():
        where = f"all {len(hosts)} hosts" if len(hosts) == len(lines) else ", ".join(hosts)
        merged.append(Finding(line.status, line.name, f"{where}: {line.text}", line.remedy))
    return merged


def show(lines: list[Finding]) -> None:
    """Print, at once."""
    for line in lines:
        print(line, flush=True)


Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do about it."""

    status: Status
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.status:<8} {self.name:<12} {self.text}{remedy}"


@dataclass
class Findings:
    """All lines of a host. `facts` should be the same on every host."""

    lines: list[Finding] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def ok(self, name: str, text: str) -> None:
        """Nothing to do."""
        self.lines.append(Finding("ok", name, text))

    def warn(self, name: str, text: str, remedy: str) -> None:
        """The run starts, but slower or with less than was meant."""
        self.lines.append(Finding("warning", name, text, remedy))

    def fail(self, name: str, text: str, remedy: str = "") -> None:
        """The run would not start."""
        self.lines.append(Finding("failure", name, text, remedy))

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def of(values: dict[str, Any]) -> Findings:
        """What `values` gave."""
        return Findings([Finding(**line) for line in values["lines"]], values["facts"])


def answer(asked: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any] | None, str]:
    """The JSON values in a program's last line; or None, and the last that it said of an error."""
    lines = asked.stdout.strip().splitlines()
    if asked.returncode != 0 or not lines:
        return None, (asked.stderr.strip().splitlines() or ["it ended in silence"])[-1]
    values: dict[str, Any] = json.loads(lines[-1])
    return values, ""


def odd_ones_out(facts: dict[str, dict[str, str]]) -> list[Finding]:
    """The hosts whose facts differ from those of most hosts; `facts[host][name]`."""
    found = []
    for name in sorted({name for of_host in facts.values() for name in of_host}):
        values = {host: of_host.get(name, "nothing") for host, of_host in facts.items()}
        counts = list(values.values())
        # Of as many of the one as of the other, the first host's is taken for the usual one.
        usual = max(counts, key=lambda value: (counts.count(value), -counts.index(value)))
        for host, value in values.items():
            if value != usual:
                remedy = "make them the same" if name != "cores" else ""
                text = f"{host} has {name} {value}, the others {usual}"
                found.append(Finding("warning", "odd host", text, remedy))
    return found
