"""`flux2-ds doctor`: everything that can be known to go wrong, before a queue slot is wasted."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flux2_ds.config.deepspeed_config import read_deepspeed, shipped_configs
from flux2_ds.config.recipe import Launch, Recipe
from flux2_ds.data.index import is_prepared
from flux2_ds.errors import EXIT_USER_ERROR, UserError
from flux2_ds.run.run_dir import DOCTOR_TOKEN, existing_parent
from launcher.commands import PROBE, forwarded, ssh, start_commands
from launcher.hosts import Hosts, ask
from launcher.supervise import Stopper, run, what_ended

_LIMIT = 300.0  # s for one host's checks, and for what the processes measure together
_PROBE_LIMIT = 200.0  # s of these for torch, the CPU Adam build included
_SKEW = 2.0  # s by which clocks may differ
_WITHOUT = ["--run_dir=.", "--model.path=.", "--data.images=.", "--data.shards=."]
"""For a look at the machine alone; no check reads them."""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do about it."""

    status: Literal["ok", "warning", "failure"]
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

    def add(self, values: dict[str, Any]) -> None:
        """Add another program's, as JSON values."""
        self.lines += [Finding(**line) for line in values["lines"]]
        self.facts |= values["facts"]


def examine(recipe: Recipe | None, launch: Launch, hosts: Hosts, arguments: list[str]) -> bool:
    """Print every finding; return whether there is no failure among them."""
    token = place_token(recipe)
    common = [*arguments, "--all-processes", str(hosts.processes)]
    to_come = []
    if recipe is not None and not is_prepared(recipe.data.shards):
        common += ["--without-shards"]
        text, remedy = f"{recipe.data.shards} is not prepared yet", shlex.join(arguments)
        to_come = [Finding("warning", "shards", text, f"flux2-ds prepare {remedy}")]
    if recipe is None:
        common += [*_WITHOUT, "--without-recipe", f"--launch.accelerator={launch.accelerator}"]
    if token is not None:
        common += ["--token", str(token)]
    try:
        found = ask_hosts(hosts.slots or {"": hosts.processes}, common)
    finally:
        if token is not None:
            token.unlink()
    lines = grouped({host: findings.lines for host, findings in found.items()}) + to_come
    if len(found) > 1:
        answered = {host: findings.facts for host, findings in found.items() if findings.facts}
        same = Finding("ok", "hosts", f"{len(answered)} hosts have the same of everything")
        lines += odd_ones_out(answered) or [same]
    print(*lines, sep="\n", flush=True)
    if all(line.status != "failure" for line in lines) and hosts.processes > 1:
        measured = measure(launch, hosts)
        print(*measured, sep="\n")
        lines += measured
    counts = Counter(line.status for line in lines)
    print(f"{counts['failure']} failures, {counts['warning']} warnings")
    return not counts["failure"]


def place_token(recipe: Recipe | None) -> Path | None:
    """Make a file where run_dir will be, for other hosts to see."""
    place = existing_parent(recipe) if recipe else None
    if place is None or not os.access(place, os.W_OK):
        return None  # the checks say so
    token = place / f"{DOCTOR_TOKEN}{uuid.uuid4().hex[:8]}"
    token.touch()
    return token


def ask_hosts(slots: dict[str, int], common: list[str]) -> dict[str, Findings]:
    """Return what every host finds; this one's name is empty."""
    started, deadline, children = time.time(), time.monotonic() + _LIMIT, {}
    try:
        for host, processes in slots.items():
            checks = [sys.executable, "-m", "launcher.host_checks"]
            argv = [*checks, *common, "--processes", str(processes)]
            if host:
                argv = ssh(host, argv, forwarded(os.environ))
            children[host] = subprocess.Popen(
                argv,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        return {host: answer_of(host, child, started, deadline) for host, child in children.items()}
    finally:
        for child in children.values():
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # and the probe that it waits for


def answer_of(host: str, child: subprocess.Popen[str], started: float, deadline: float) -> Findings:
    """Return a host's findings, or the one why it has none. `started` is of the time of day, `deadline` not."""
    findings = Findings()
    try:
        out, error = child.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        findings.fail("host", f"{host or 'this host'} did not answer in {_LIMIT:.0f} s")
        return findings
    values, reason = last_line(child.returncode, out, error)
    if child.returncode == 255 and host:
        remedy = f"`ssh {host} true` must work without a password"
        findings.fail("ssh", f"{reason} ({host})", remedy)
    elif values is None:
        findings.fail("host", reason, "the same directory and Python must be on every host")
    else:
        findings.add(values)
        # The host looked at its clock at some time between start and now.
        skew = max(started - values["clock"], values["clock"] - time.time())
        if skew > _SKEW:
            findings.warn("clock", f"{skew:.0f} s off from this host's", "run an NTP client")
    return findings


def last_line(code: int, out: str, error: str) -> tuple[dict[str, Any] | None, str]:
    """Return the JSON values of a program's last line; or None, and the last it said of an error."""
    if code != 0 or not out.strip():
        return None, (error.strip().splitlines() or ["it ended in silence"])[-1]
    values: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return values, ""


def measure(launch: Launch, hosts: Hosts) -> list[Finding]:
    """Return the bandwidth between the processes, from a start like a training's."""
    arguments = ["--accelerator", launch.accelerator, "--bandwidth"]
    commands = start_commands(PROBE, launch, hosts, arguments)
    limit = _LIMIT + 20 * len(hosts.slots)  # of 1 Gbit/s a link, one after the other, takes 13 s
    deadline = time.monotonic() + limit
    with tempfile.TemporaryFile("w+") as out:
        with Stopper() as stopper:  # the probe has nothing to save
            code = run(commands, stopper, lambda: time.monotonic() > deadline, out.fileno())
        if stopper.code:
            sys.exit(stopper.code)
        out.seek(0)
        lines = out.read().strip().splitlines()
    found = [Finding(**json.loads(line)) for line in lines if line.startswith('{"status"')]
    if code != 0 or not found:
        rest = [line for line in lines if not line.startswith('{"status"')]
        reason = (rest or [what_ended(code)])[-1]
        if time.monotonic() > deadline:
            reason = f"they were still at it after {limit:.0f} s"
        remedy = f"NCCL_DEBUG=INFO or docs/launcher.md; the command: {commands[0]}"
        found.append(Finding("failure", "start", f"the processes do not meet: {reason}", remedy))
    return found


def grouped(lines: dict[str, list[Finding]]) -> list[Finding]:
    """Return one line for what all hosts say alike, and a host's name before what only some say."""
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


def odd_ones_out(facts: dict[str, dict[str, str]]) -> list[Finding]:
    """Return the hosts whose facts differ from those of most hosts; `facts[host][name]`."""
    found = []
    for name in sorted({name for of_host in facts.values() for name in of_host}):
        values = {host: of_host.get(name, "nothing") for host, of_host in facts.items()}
        usual = Counter(values.values()).most_common(1)[0][0]  # of equally many the first host's
        found += [
            Finding(
                "warning",
                "odd host",
                f"{host} has {name} {value}, the others {usual}",
                "make them the same",
            )
            for host, value in values.items()
            if value != usual
        ]
    return found


def run_probe(accelerator: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask what needs torch, in a process of its own: CUDA, NCCL, the CPU Adam build."""
    argv = [sys.executable, "-m", PROBE, "--accelerator", accelerator, *arguments]
    return ask(argv, _PROBE_LIMIT, DS_ACCELERATOR=accelerator)


def check_zero(recipe: Recipe) -> None:
    """Refuse keys and values of the user's own config that DeepSpeed does not know: some seconds."""
    if isinstance(recipe.deepspeed, str) and recipe.deepspeed in shipped_configs():
        return
    asked = run_probe("cpu", "--zero", json.dumps(read_deepspeed(recipe.deepspeed)))
    if asked.returncode == EXIT_USER_ERROR:
        raise UserError(asked.stderr.strip().splitlines()[-1].removeprefix("error: "))
