"""The W&B workspace, as far as it goes without a network: what would be sent."""

import json

import pytest

from flux2_ds.commands import dashboard
from flux2_ds.errors import UserError


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "recipe.yaml").write_text("log: {project: pandas, entity: me}\n")
    record = {"train/loss": 1.0, "train/loss_smoothed": 1.0, "validation/loss": 0.5}
    record |= {"perf/forward_seconds": 0.1, "perf/update_seconds": 0.1, "perf/slowest_rank": "0"}
    record |= {"memory/host_gib": 2.0, "optim/changed_share": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **record}) + "\n")
    return tmp_path


def test_every_series_that_is_a_number_has_its_panel(run_dir):
    view = dashboard.build_workspace(run_dir)._to_model()
    assert (view.entity, view.project) == ("me", "pandas")
    sections = view.spec.section.panel_bank_config.sections
    found = {
        section.name: [panel.config.metrics for panel in section.panels if hasattr(panel.config, "metrics")]
        for section in sections
    }  # fmt: skip
    assert found == {
        "train": [["train/loss", "train/loss_smoothed", "validation/loss"]],
        "perf": [["perf/forward_seconds", "perf/update_seconds"]],
        "memory": [["memory/host_gib"]],
        "optim": [["optim/changed_share"]],
        "samples": [],
    }
    (media,) = sections[-1].panels
    assert media.config.media_keys == ["samples/images"]
    assert {panel.config.x_axis for section in sections[:-1] for panel in section.panels} == {
        "optimizer_step"
    }
    assert dashboard.build_workspace(run_dir, "another").entity == "another"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), "holds no run"),
        (
            lambda run: (run / "recipe.yaml").write_text("log: {project: p}"),
            "--entity is not given",
        ),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no records yet"),
    ],
)
def test_what_is_missing_is_named(run_dir, damage, message):
    damage(run_dir)
    with pytest.raises(UserError, match=message):
        dashboard.build_workspace(run_dir)


def test_without_the_package_or_a_key_it_says_so(run_dir, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dashboard", "--run", str(run_dir)])
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0")
    with pytest.raises(UserError, match=r"W&B does not take the workspace .*`wandb login`"):
        dashboard.main()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"flux2-ds\[dashboard\]"):
        dashboard.main()
