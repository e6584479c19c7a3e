"""Several runs on one page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from crossdock.cli import main
from crossdock.tools.report import ReportError, write_report
from tests.tiny import by_hand
from tests.tools.pages import bars_of, charts_of, points
from tests.tools.runs import everything_of, metrics_of, write_metrics


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three of different lengths; the last was not timed, and has the name of the first."""
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "other", tmp_path / "c" / "run"]
    for number, folder in enumerate(folders):
        steps, make = 30 + 10 * number, metrics_of if number == 2 else everything_of
        rows = [make(step, steps, loss=5.0 - number - step / 100) for step in range(1, steps + 1)]
        if number == 1:
            rows[9]["validation_loss"] = 2.5
        write_metrics(folder, rows)
        (folder / "config.toml").write_text(by_hand(f"[training]\nsteps = {steps}\n[optimizer]\nlr = 1e-3\n"))
    return folders


def test_curves_are_those_of_each_run(runs: list[Path], tmp_path: Path) -> None:
    html = write_report(runs, tmp_path / "both.html").read_text()
    assert "<h1>3 runs</h1>" in html
    first, second, third = points(html, "loss")
    assert (first["name"], second["name"], third["name"]) == ("run (1)", "other", "run (3)")
    for number, curve in enumerate((first, second, third)):
        np.testing.assert_allclose(curve["points"][9], [10, 4.9 - number], rtol=1e-3)
        assert len(curve["points"]) == 30 + 10 * number
    assert 'data-first="1" data-last="50"' in html
    (validated,) = points(html, "validation_loss")
    assert validated["name"] == "other"
    figure = html[html.index('data-chart="validation_loss"') :].partition("</figure>")[0]
    assert 'circle class="s1"' in figure, "a run keeps its colour"
    assert "step_seconds" in charts_of(html)
    assert "lr" in charts_of(html)


def test_times_and_settings_stand_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    html = write_report(runs, tmp_path / "both.html").read_text()
    assert set(bars_of(html, "Where the time goes")) == {"run (1)", "other"}, "the third was not timed"
    differing = html[html.index("<h2>Settings that differ") :]
    rows = re.findall(r'<th scope="row">([\w.]+)</th>((?:<td>\w+</td>)+)', differing)
    assert rows == [("training.steps", "<td>30</td><td>40</td><td>50</td>")]


def test_too_many_runs_are_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="9 runs are too many for one page; at most 8"):
        write_report(runs * 3, tmp_path / "all.html")


def _call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["report", *arguments])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def test_the_command_writes_one_page(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _call("a/run", "b/other") == 0
    assert capsys.readouterr().out == "comparison.html\n"
    assert "<h1>2 runs</h1>" in (tmp_path / "comparison.html").read_text()
    assert not (tmp_path / "a/run/report.html").exists()
    assert _call("a/run", "b/nowhere") == 2
    assert "b/nowhere is no folder" in capsys.readouterr().err
    assert _call("a/run", "b/other", "--output", "page.html") == 0
    assert (tmp_path / "page.html").exists()
