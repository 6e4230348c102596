"""Make a W&B workspace for the runs of a project, from the series that a run has.

flux2-ds dashboard --run DIR
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

from flux2_ds.errors import Arguments, UserError, run_root
from flux2_ds.run.metrics import METRICS_NAME, read_metrics
from flux2_ds.run.report import CHARTS, chart_of
from flux2_ds.run.run_dir import RECIPE_NAME
from flux2_ds.run.wandb_run import STEP


def main() -> None:
    """Entry point of `flux2-ds dashboard`."""
    parser = Arguments(
        "flux2-ds dashboard", description="Make a W&B workspace that shows a project's runs."
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory")
    parser.add_argument("--entity", help="W&B's user or team; default: the recipe's log.entity")
    options = parser.parse_args()
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(
            "the package wandb-workspaces is not installed. Install flux2-ds[dashboard]."
        )
    workspace = build_workspace(options.run, options.entity)
    try:
        print(workspace.save().url)
    except Exception as error:  # of any type: the library's, the network's, no key
        raise UserError(
            f"W&B does not take the workspace ({error}). Log in with `wandb login`, and see whether "
            f"{workspace.entity}/{workspace.project} is a project of yours."
        ) from error


def build_workspace(run_dir: Path, entity: str | None = None) -> Any:
    """The workspace: a section for each prefix, a panel for each chart of the report."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    stored = run_dir / RECIPE_NAME
    if not stored.is_file():
        raise UserError(f"{run_dir} holds no run (no {RECIPE_NAME}). Name the run_dir of a run.")
    settings = yaml.safe_load(stored.read_text(encoding="utf-8"))["log"]
    entity = entity or settings.get("entity")
    if entity is None:
        raise UserError("--entity is not given, nor log.entity. Name your W&B user or team.")
    records = read_metrics(run_dir / METRICS_NAME)
    series = sorted({name for record in records for name in record if "/" in name})
    if not series:
        raise UserError(f"{run_dir / METRICS_NAME} has no records yet. Train first.")
    charts: dict[str, list[Any]] = {title: [] for title in CHARTS}
    for name in series:
        if any(isinstance(record.get(name), int | float) for record in records):
            charts.setdefault(chart_of(name)[0], []).append(name)
    sections: dict[str, list[Any]] = {}
    for title, names in charts.items():
        if names:
            plot = panels.LinePlot(title=title, x=STEP, y=names)
            sections.setdefault(names[0].split("/")[0], []).append(plot)
    sections["samples"] = [panels.MediaBrowser(title="Previews", media_keys=["samples/images"])]
    return workspaces.Workspace(
        entity=entity,
        project=settings["project"],
        name="flux2-ds",
        sections=[
            workspaces.Section(name=name, panels=plots, is_open=name in ("train", "samples"))
            for name, plots in sections.items()
        ],
    )


if __name__ == "__main__":
    run_root(main)
