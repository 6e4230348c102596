"""The report of a run as one HTML page: what was trained, how it went, and what came of it.

The page holds its images and curves; it asks no network. All of it is read from the run directory, and from
the report that `prepare` left beside the shards where these are on a local disk.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import math
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open

from flux2_ds.config.adapter import ADAPTER_KINDS
from flux2_ds.config.recipe import Recipe
from flux2_ds.config.settings import flat, settings_of
from flux2_ds.errors import MALFORMED, UserError, without_secrets
from flux2_ds.run.atomic import atomic_write_text
from flux2_ds.run.metrics import METRICS_NAME, best_held_out, read_metrics
from flux2_ds.run.run_dir import RECIPE_NAME, step_folders

log = logging.getLogger("flux2_ds")

REPORT_NAME = "report.html"
_FRAMES, _POINTS, _EVENTS, _SHEETS, _GRIDS = 12, 1000, 100, 6, 4
"""At most so many: images of a prompt's film strip, points of a curve, events, contact sheets, grids."""
_STRIP, _LARGE, _SHEET = 320, 768, 1600
"""Longest side of the images in the page, in px."""
_ALIVE = 60.0
"""s since its last heartbeat after which a run is not taken for a running one."""

CHARTS = {
    "Loss": r"train/loss|train/loss_smoothed|validation/loss",
    "Loss by timestep t, in %": r"train/loss_(t.+)",
    "Loss by purpose": r"train/loss_(images|regularization|preservation)",
    "Held-out loss by part": r"validation/loss_(.+)",
    "Gain over the base": r"validation/gain_?(.*)",
    "Learning rate": r"train/learning_rate",
    "Gradient norm": r"train/gradient_norm",
    "Seconds a step": r"perf/seconds_per_step",
    "Where a step's seconds go": r"perf/(data_wait|forward|backward|update)_seconds",
    "Samples a second": r"perf/samples_per_second",
    "TFLOP/s of a rank": r"perf/tflops",
    "Share of the card's peak": r"perf/mfu",
    "Seconds between the fastest rank and the slowest": r"perf/rank_spread_seconds",
    "Seconds that a checkpoint held up training": r"perf/checkpoint_stall_seconds",
    "Memory, GiB": r"memory/(.+)_gib",
}
"""Charts by title: a metric is in the first whose pattern it matches, or in one of its own. The group is its label."""
LOSSES = {
    "train/loss": "each record",
    "train/loss_smoothed": "smoothed",
    "validation/loss": "held out",
}
_NO_CHART = r"step|data/epoch|data/repeats|optim/skipped_steps|perf/mfu_peak"
PLAN = (
    *("variant", "model", "batch", "steps", "optimizer", "engine"),
    *("data", "held out", "parameters", "blocks", "ignored"),
)
"""Lines of the log's start that say what was planned; each name takes ten columns."""
_MEMORY = re.compile(r"memory +peak ([\d.]+) GiB, predicted ([\d.]+) GiB")
_LINE = re.compile(r"(\d\d):(\d\d):(\d\d) (?:(warning|error): )?(.*)")
_HARDWARE = re.compile(r"  on +(.+), ZeRO stage \d")
"""In the start banner, whose lines have no time."""
_START = re.compile(r"== (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) process \d+ on (.*)")
_TOLD = re.compile(r"(continuing after step|stopped by|accepted:|done in|nothing to do)")
"""Lines that are events, beside warnings and errors."""


@dataclass(frozen=True)
class Event:
    """Something that happened to the run; `kind`: start, info, warning or error."""

    when: datetime | None
    kind: str
    text: str


@dataclass(frozen=True)
class Frame:
    """A preview in the page; `image`: a data URI, empty if the file cannot be read."""

    step: int
    image: str


@dataclass
class RunReport:
    """What the page says of one run."""

    name: str
    path: Path
    recipe: dict[str, Any]
    records: list[dict[str, Any]]
    events: list[Event] = field(default_factory=list)
    plan: dict[str, str] = field(default_factory=dict)
    memory: tuple[float, float] | None = None
    hosts: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    strips: dict[str, list[Frame]] = field(default_factory=dict)
    """Previews by prompt."""
    before_after: dict[str, tuple[Frame, Frame]] = field(default_factory=dict)
    grids: dict[str, str] = field(default_factory=dict)
    """What `flux2-ds sample` rendered: data URIs by file name."""
    exports: list[dict[str, str]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """The report of `prepare`."""
    sheets: dict[str, str] = field(default_factory=dict)
    """Contact sheets: data URIs by bucket."""
    running: bool = False

    @property
    def step(self) -> int:
        """The last one that is on record."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def subject(self) -> str:
        """What was trained on what."""
        kind = ADAPTER_KINDS.get(self.recipe.get("method", "lora"))
        rank = self.recipe.get("lora", {}).get("rank")
        what = f"{kind} of rank {rank} on" if kind else "Full fine-tune of"
        samples = f", {self.data['samples']:,} samples" if self.data.get("samples") else ""
        return f"{what} {self.recipe.get('model', {}).get('path')}{samples}"

    @property
    def status(self) -> str:
        """How far the run is, for people."""
        of = f"{self.step:,} of {self.recipe.get('steps', 0):,} steps"
        if self.step >= self.recipe.get("steps", 0):
            return f"finished, {self.step:,} steps"
        return f"running, {of}" if self.running else f"stopped after {of}"

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        before, total = 0, 0.0
        for record in self.records:
            total += (record["step"] - before) * (record.get("perf/seconds_per_step") or 0.0)
            before = record["step"]
        return total

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, where it has one."""
        found = ((r["step"], r.get(name)) for r in self.records)
        return [
            (step, float(v)) for step, v in found if isinstance(v, int | float) and math.isfinite(v)
        ]

    def facts(self) -> dict[str, str]:
        """The numbers that a reader looks for first."""
        losses, best = self.values("train/loss_smoothed"), best_held_out(self.records)
        paces, rates = self.values("perf/seconds_per_step"), self.values("perf/samples_per_second")
        facts = {}
        if losses:
            facts["loss"] = f"{losses[0][1]:.4f} → {losses[-1][1]:.4f}"
        if best:
            facts["best held-out loss"] = f"{best[1]:.4f} at step {best[0]:,}"
        if paces:
            facts["time in steps"] = str(timedelta(seconds=round(self.seconds)))
            facts["seconds a step"] = f"{statistics.median(v for _, v in paces):.3g}"
        if rates:
            facts["samples a second"] = f"{statistics.median(v for _, v in rates):.3g}"
        if "hardware" in self.plan:
            facts["hardware"] = self.plan["hardware"]
        if self.memory:
            facts["peak memory"] = f"{self.memory[0]:.1f} GiB a GPU"
        if "parameters" in self.plan:
            facts["trained parameters"] = self.plan["parameters"].removesuffix(" trained")
        return facts

    def against_plan(self) -> list[tuple[str, str, str]]:
        """Rows of what was planned and what was measured."""
        recipe, rows = self.recipe, []
        batch = recipe.get("batch", {}).get("global_size", 0)
        epochs = self.values("data/epoch")
        done = f"{self.step:,} steps, {self.step * batch:,} samples"
        rows.append(("steps", self.plan.get("steps", f"{recipe.get('steps', 0):,}"),
                     done + (f", {epochs[-1][1]:.3g} epochs" if epochs else "")))  # fmt: skip
        if self.memory:
            peak, predicted = self.memory
            measured = f"peak {peak:.1f} GiB ({predicted / peak - 1:+.0%} predicted)"
            rows.append(("memory a GPU", f"{predicted:.1f} GiB", measured))
        every = recipe.get("checkpoint", {}).get("every")
        kept = ", ".join(map(str, self.checkpoints)) or "none"
        rows.append(("checkpoints", f"every {every} steps and at the end", f"there are: {kept}"))
        if held_out := self.values("validation/loss"):
            planned = f"every {recipe['validation']['every']} steps"
            rows.append(("held-out loss", planned, f"{len(held_out)} times"))
        if every := recipe.get("preview", {}).get("every"):
            shown = max((len(frames) for frames in self.strips.values()), default=0)
            rows.append(("previews", f"every {every} steps", f"{shown} in this page"))
        skipped = self.values("optim/skipped_steps")
        if skipped:
            what = recipe.get("optimizer", {}).get("nonfinite", "stop")
            rows.append(("steps that are not finite", what, f"{int(skipped[-1][1])} skipped"))
        names = [name for name in PLAN if name in self.plan and name != "steps"]
        return rows + [(name, self.plan[name], "") for name in names]

    def settings(self) -> tuple[list[tuple[str, Any, Any]], list[tuple[str, Any]]]:
        """(name, value, default) of what differs from the defaults, and (name, value) of the rest."""
        values, known = flat(self.recipe, Recipe), settings_of(Recipe).items()
        defaults = {n: s.default for n, s in known if s.default is not dataclasses.MISSING}
        rest = [(n, value) for n, value in values.items() if n in defaults and defaults[n] == value]
        same = dict(rest)
        return [(n, values[n], defaults.get(n)) for n in values if n not in same], rest

    def charts(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Title -> label -> points, in the order of `CHARTS`, then whatever else is a number."""
        found: dict[str, dict[str, list[tuple[int, float]]]] = {title: {} for title in CHARTS}
        for name in sorted({name for record in self.records for name in record}):
            points = self.values(name)
            if not points or re.fullmatch(_NO_CHART, name):
                continue
            title, label = chart_of(name)
            found.setdefault(title, {})[label.replace("_", " ")] = points
        return {title: series for title, series in found.items() if series}


def chart_of(metric: str) -> tuple[str, str]:
    """Title of a metric's chart, and its label there."""
    for title, pattern in CHARTS.items():
        if match := re.fullmatch(pattern, metric):
            return title, (match.groups() or (LOSSES.get(metric, ""),))[0]
    return metric, ""


def write_report(run_dir: Path) -> Path | None:
    """Write RUN_DIR/report.html; a run goes on without it, so nothing is raised."""
    try:
        return write_page([run_dir], run_dir / REPORT_NAME)
    except Exception as error:  # whatever is wrong with files that others may have changed
        log.warning("%s cannot be written (%s)", run_dir / REPORT_NAME, error)
        return None


def write_page(run_dirs: list[Path], path: Path) -> Path:
    """Write the page of one run, or of several beside each other."""
    for run_dir in run_dirs:
        if not (run_dir / RECIPE_NAME).is_file():
            raise UserError(
                f"{run_dir} holds no run (no {RECIPE_NAME}). Name the run_dir of a run."
            )
    try:
        page = render_page([read_run(run_dir) for run_dir in run_dirs])
    except (OSError, yaml.YAMLError, *MALFORMED) as error:
        where = ", ".join(map(str, run_dirs))
        raise UserError(f"a file in {where} is damaged ({error}). Restore it.") from error
    atomic_write_text(path, page)
    return path


def render_page(reports: list[RunReport]) -> str:
    """Return the page as HTML."""
    tell_apart(reports)
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["as_text"] = as_text
    return environment.from_string(template).render(
        runs=reports,
        charts=charts(reports),
        differing=differing_settings(reports),
        rows=compared_frames(reports),
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def read_run(run_dir: Path) -> RunReport:
    """Read what a run directory holds."""
    recipe = yaml.safe_load((run_dir / RECIPE_NAME).read_text(encoding="utf-8"))
    report = RunReport(
        run_dir.resolve().name, run_dir, recipe, read_metrics(run_dir / METRICS_NAME)
    )
    _read_logs(report)
    _read_images(report)
    _read_files(report)
    return report


def _read_logs(report: RunReport) -> None:
    """Events, plan, memory and hosts."""
    logs = report.path / "logs"
    for file in logs.glob("rank_*.log"):
        rank = int(re.sub(r"\D", "", file.stem) or 0)
        for event in _log_events(file, report if rank == 0 else None):
            if rank == 0:
                report.events.append(event)
            elif event.kind != "start":
                text = f"rank {rank}: {event.text}"
                report.events.append(dataclasses.replace(event, text=text))
    for file in sorted(logs.glob("rank_*.json")):
        place = _json(file)
        report.hosts.append(str(place.get("host", "")))
        alive = not place.get("ended", True) and time.time() - file.stat().st_mtime < _ALIVE
        report.running = report.running or alive
    if failure := _json(logs / "failure.json"):
        when = datetime.fromtimestamp(float(failure.get("time", 0)))
        text = f"{failure.get('where')}: {failure.get('reason')}"
        report.events.append(Event(when, "error", text))
    events = {dataclasses.replace(e, text=without_secrets(e.text)) for e in report.events}
    report.events = sorted(events, key=lambda event: event.when or datetime.max)[-_EVENTS:]


def _log_events(file: Path, report: RunReport | None) -> Iterator[Event]:
    """Events of a rank's log; `report` takes the plan and the memory of rank 0's."""
    now: datetime | None = None
    starts = 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if start := _START.match(line):
            now = datetime.fromisoformat(start[1])
            starts += 1
            yield Event(now, "start", f"started {'again ' * (starts > 1)}on {start[2]}")
            continue
        found = _LINE.match(line)
        if report and (hardware := _HARDWARE.match(line)):
            report.plan["hardware"] = hardware[1]
        if not found:
            if line.startswith("error: "):
                yield Event(now, "error", line.removeprefix("error: "))
            continue
        hour, minute, second, level, text = found.groups()
        if now is not None:
            at = now.replace(hour=int(hour), minute=int(minute), second=int(second))
            # Past midnight; threads, and the end of daylight saving time, put the clock back by less.
            now = at + timedelta(days=now - at > timedelta(hours=12))
        name = text[:11].rstrip()
        if report and name in PLAN and text[10:11] == " ":
            report.plan[name] = text[11:].strip()
        if report and (memory := _MEMORY.match(text)):
            report.memory = (float(memory[1]), float(memory[2]))
        if level or _TOLD.match(text):
            yield Event(now, level or "info", text)


def _read_images(report: RunReport) -> None:
    """Previews by prompt, and the grids that `sample` made."""
    folders = step_folders(report.path / "previews")
    for number, prompt in enumerate(report.recipe.get("preview", {}).get("prompts", [])):
        files = {s: f for s, folder in folders.items() if (f := folder / f"{number}.png").is_file()}
        if not files:
            continue
        steps = list(files)
        frames = [Frame(step, data_uri(files[step], _STRIP)) for step in evenly(steps, _FRAMES)]
        report.strips[prompt] = frames
        first, last = (Frame(s, data_uri(files[s], _LARGE)) for s in (steps[0], steps[-1]))
        report.before_after[prompt] = (first, last)
    grids = sorted(report.path.glob("samples/*.png"), key=lambda file: file.stat().st_mtime)
    report.grids = {file.name: data_uri(file, _SHEET) for file in grids[-_GRIDS:]}


def _read_files(report: RunReport) -> None:
    """Versions, checkpoints, exports, and what `prepare` said of the data."""
    report.versions = {str(k): str(v) for k, v in _json(report.path / "versions.json").items()}
    report.checkpoints = [*step_folders(report.path / "checkpoints")]
    exports = [*report.path.glob("export/*.safetensors"), *report.path.glob("export/*/transformer")]
    for path in sorted(exports):
        size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
        report.exports.append({
            "file": str(path.relative_to(report.path)),
            "size": f"{size / 1e6:,.1f} MB",
            "checked": _safetensors_metadata(path).get("flux2_ds.checked_for", ""),
        })  # fmt: skip
    shards = _local(report, str(report.recipe.get("data", {}).get("shards", "")))
    report.data = _json(shards / "report.json")
    buckets = list(report.data.get("buckets", {}))
    sheets = sorted(shards.glob("contact_sheets/*.jpg"))
    sheets.sort(key=lambda file: buckets.index(file.stem) if file.stem in buckets else len(buckets))
    report.sheets = {file.stem: data_uri(file, _SHEET) for file in sheets[:_SHEETS]}


def _local(report: RunReport, location: str) -> Path:
    """A path of the recipe as seen from here: relative to where the run was started, as run_dir is."""
    asked = Path(str(report.recipe.get("run_dir", "")))
    actual = report.path.resolve()
    if not asked.is_absolute() and actual.parts[-len(asked.parts) :] == asked.parts:
        return Path(*actual.parts[: -len(asked.parts)], location)
    return Path(location)


def charts(reports: list[RunReport]) -> list[dict[str, Any]]:
    """What the page's script draws, of every run; of several, no chart that has parts and no single records."""
    kinds = {"each record": "faint", "held out": "dots"}
    of_runs = [report.charts() for report in reports]
    found: list[dict[str, Any]] = []
    for title in dict.fromkeys(title for of_run in of_runs for title in of_run):
        series: list[dict[str, Any]] = []
        for number, (report, of_run) in enumerate(zip(reports, of_runs, strict=True)):
            for part, (label, points) in enumerate(of_run.get(title, {}).items()):
                if len(reports) > 1 and label == "each record":
                    continue
                words = [report.name] * (len(reports) > 1) + [label] * bool(label)
                series.append({
                    "label": ", ".join(words),
                    "kind": kinds.get(label, "line"),
                    "color": number if len(reports) > 1 else 0 if title == "Loss" else part,
                    "points": evenly(points, _POINTS),
                })  # fmt: skip
        if len(reports) == 1 or title == "Loss" or len(of_runs[0].get(title, {})) <= 1:
            found.append({"name": f"c{len(found)}", "title": title, "series": series})
    return found


def tell_apart(reports: list[RunReport]) -> None:
    """Give runs of the same name as much of their paths as tells them apart."""
    paths = [report.path.resolve().parts for report in reports]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    for report, name in zip(reports, names, strict=True):
        report.name = name


def differing_settings(reports: list[RunReport]) -> list[tuple[str, list[Any]]]:
    """Settings that are not the same in all runs, with the value in each."""
    values = [flat(report.recipe, Recipe) for report in reports]
    names = dict.fromkeys(name for of_run in values for name in of_run)
    rows = [(name, [of_run.get(name, "") for of_run in values]) for name in names]
    rows = [(name, row) for name, row in rows if name != "run_dir"]
    return [(name, row) for name, row in rows if any(value != row[0] for value in row)]


def compared_frames(reports: list[RunReport]) -> list[tuple[str, list[tuple[Frame, Frame] | None]]]:
    """Each prompt with the first and last preview of every run."""
    prompts = dict.fromkeys(prompt for report in reports for prompt in report.before_after)
    return [(p, [report.before_after.get(p) for report in reports]) for p in prompts]


def as_text(value: Any) -> str:
    """A setting as one would type it; long lists and texts in full."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def data_uri(path: Path, side: int) -> str:
    """An image no larger than `side` px, to stand in the page; empty if it cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=84)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_Item = TypeVar("_Item")


def evenly(items: list[_Item], count: int) -> list[_Item]:
    """At most `count` of the items, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(n * (len(items) - 1) / (count - 1))] for n in range(count)]


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _safetensors_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; empty if there is none."""
    try:
        with safe_open(path, "np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}
