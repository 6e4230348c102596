"""What `doctor` finds on one host, as lines and as facts that hosts can be compared by."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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
