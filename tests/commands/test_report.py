"""`flux2-ds report`: where it writes, and what it refuses."""

from pathlib import Path

import pytest

from flux2_ds.commands import report
from flux2_ds.errors import UserError


def call(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr("sys.argv", ["report", *map(str, argv)])
    report.main()


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"run_dir: {name}\nsteps: 10\n")
    return [tmp_path / "one", tmp_path / "two"]


def test_where_the_page_is(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "--run", runs[0])
    call(monkeypatch, "--compare", *runs)
    call(monkeypatch, "--run", runs[0], "--output", "page.html")
    pages = [runs[0] / "report.html", Path("comparison.html"), Path("page.html")]
    assert capsys.readouterr().out.split() == list(map(str, pages))
    assert "stopped after 0 of 10 steps" in pages[0].read_text()
    assert "2 runs compared" in pages[1].read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--run", "nowhere"], "nowhere holds no run"),
        (["--compare", "one"], "--compare one: name two runs"),
        (["--compare", "one", "nowhere"], "nowhere holds no run"),
        (["--run", "one", "--output", "no/page.html"], "no/page.html cannot be written"),
        (["--run", "damaged"], "a file in damaged is damaged"),
        (["--runs", "one"], r"one of the arguments --run --compare is required.*report --help"),
    ],
)
def test_what_is_refused(runs, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/recipe.yaml").write_text("preview: 3\n")
    with pytest.raises(UserError, match=message):
        call(monkeypatch, *argv)
