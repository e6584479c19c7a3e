"""The report's numbers: what it draws, tells and warns of is what the run folder holds."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from crossdock.checkpoint import to_checked_json
from crossdock.cli import main
from crossdock.tools.report import LOAD_FILE, RANK_LOAD_FILE, ReportError, write_report
from crossdock.tools.report.balance import IDLE_ROUTES, OVERLOAD, Balance, warnings
from crossdock.tools.report.charts import thin
from crossdock.tools.report.heat import PALETTE, to_indices
from crossdock.tools.report.numbers import count, log_ticks, short, ticks
from tests.tiny import by_hand
from tests.tools.pages import charts_of, figures_of, maps_of, points
from tests.tools.runs import metrics_of, write_loads, write_metrics


def _html(folder: Path) -> str:
    return write_report(folder).read_text()


def test_every_metric_has_its_curve_with_the_values_of_the_run(tmp_path: Path) -> None:
    rows = [metrics_of(step, 40) for step in range(1, 41)]
    for row in rows[9::10]:
        row["validation_loss"] = row["loss"] + 0.5
    html = _html(write_metrics(tmp_path / "run", rows))
    measured = ["lr", "grad_norm", "tokens_per_second_per_gpu", "memory_gib", "max_mean_load", "sequence_aux_loss"]
    assert charts_of(html) == ["loss", *measured]
    training, validation = points(html, "loss")
    assert (training["name"], validation["name"]) == ("training", "validation")
    assert [step for step, _ in training["points"]] == list(range(1, 41))
    np.testing.assert_allclose([value for _, value in training["points"]], [row["loss"] for row in rows], rtol=1e-3)
    assert [step for step, _ in validation["points"]] == [10, 20, 30, 40]
    for name in measured:
        (series,) = points(html, name)
        np.testing.assert_allclose([value for _, value in series["points"]], [row[name] for row in rows], rtol=1e-3)


def test_key_figures(tmp_path: Path) -> None:
    rows = [metrics_of(step, 100, tokens_per_second_per_gpu=float(step)) for step in range(1, 102)]
    rows[30] |= {"memory_gib": 71.5, "max_mean_load": 6.25, "validation_loss": 3.0, "memory_percent": 89.0}
    rows[60] |= {"validation_loss": 3.5, "mfu": 41.0}
    rows[100] |= {"loss": 2.125, "max_mean_load": 1.25, "skipped_steps": 7}
    folder = write_metrics(tmp_path / "run", rows)
    (folder / "config.toml").write_text(by_hand("[training]\nsteps = 300\n"))
    figures = figures_of(_html(folder))
    assert figures["Loss"].startswith("2.125 from 8.7")
    assert figures["Validation loss"] == "3.5 at step 61; best 3 at step 31"
    assert figures["Steps"] == "101 of 300; not complete"
    assert figures["Tokens"] == "206.8 k 2,048 per step".replace("206.8", "207")
    assert figures["Throughput"] == "51 tokens/s per rank, median; 41 % MFU"
    assert figures["Memory, peak"] == "71.50 GiB 89 % of the device"
    assert figures["Busiest expert"] == "1.25 \u00d7 mean worst 6.25 at step 31"
    assert figures["Skipped steps"].startswith("7 ")


def test_the_title_names_settings_file_run_model_and_layout(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path / "runs" / "debug" / "20261121-101622", [metrics_of(1, 1)])
    (folder / "config.toml").write_text(
        by_hand('[model]\nflavor = "debug"\n[parallelism]\nexpert_parallel_degree = -1\n')
    )
    checkpoint = folder / "checkpoint" / "step-00000001"
    checkpoint.mkdir(parents=True)
    state = {"format": 2, "step": 1, "world_size": 4, "random_states": [], "counters": {}, "files": {}}
    (checkpoint / "state.json").write_text(to_checked_json(state, lines=True))
    html = _html(folder)
    assert "<h1>debug / 20261121-101622</h1>" in html
    assert "<span>qwen3 debug</span>" in html
    assert "<span>4 ranks: ep 2, ep_shard 2, dp_shard 4</span>" in html
    (checkpoint / "state.json").write_text((checkpoint / "state.json").read_text().replace("4", "8"))
    html = _html(folder)
    assert "ranks: ep" not in html
    assert "step-00000001/state.json could not be read" in html
    assert str(tmp_path) not in html


def test_a_long_run_keeps_its_spikes_in_a_small_file(tmp_path: Path) -> None:
    rows = [metrics_of(step, 100_000) for step in range(1, 100_001)]
    rows[70_122]["loss"] = 99.5
    rows[30_000]["tokens_per_second_per_gpu"] = 3.0
    path = write_report(write_metrics(tmp_path / "run", rows))
    assert path.stat().st_size < 1_000_000
    html = path.read_text()
    (series,) = points(html, "loss")
    first, last, _, low, high = next(point for point in series["points"] if point[4] > 50)
    assert first <= 70_123 <= last
    assert (low < 3, high) == (True, 99.5)
    assert min(point[3] for point in points(html, "tokens_per_second_per_gpu")[0]["points"]) == 3.0


def test_thinning_equals_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    steps = np.unique(generator.integers(5, 5000, 1500))
    values = np.where(generator.random(len(steps)) < 0.3, np.nan, generator.normal(size=len(steps)))
    values[200:300] = np.nan
    thinned = thin(steps, values, columns=40)
    columns: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        if np.isfinite(values[index]):
            columns.setdefault(int((step - steps[0]) * 40 // (steps[-1] - steps[0] + 1)), []).append(index)
    assert len(thinned) == len(columns) <= 40
    for place, members in enumerate(columns.values()):
        assert (thinned.first[place], thinned.last[place]) == (steps[members[0]], steps[members[-1]])
        assert (thinned.low[place], thinned.high[place]) == (values[members].min(), values[members].max())
        assert thinned.mean[place] == pytest.approx(values[members].mean())


def test_a_skipped_step_breaks_the_curve_and_is_marked(tmp_path: Path) -> None:
    rows = [metrics_of(step, 30) for step in range(1, 31)]
    for step in (11, 12, 13):
        rows[step - 1] |= {"loss": None, "grad_norm": None}
    html = _html(write_metrics(tmp_path / "run", rows))
    (loss,) = points(html, "loss")
    assert [step for step, _ in loss["points"]] == [*range(1, 11), *range(14, 31)]
    figure = html[html.index('data-chart="loss"') : html.index('data-chart="lr"')]
    curve = re.findall(r'class="curve s0" d="([^"]*)"', figure)
    assert [path.count("M") for path in curve] == [2], "the curve must not run across the gap"
    assert re.findall(r"<title>(.*?): skipped</title>", figure) == ["step 11", "step 12", "step 13"]
    assert figures_of(html)["Skipped steps"].startswith("3 ")
    learning_rate = re.findall(r'class="curve s0" d="([^"]*)"', html[html.index('data-chart="lr"') :])[0]
    assert learning_rate.count("M") == 1


@pytest.mark.parametrize("tail", ['{"step": 6, "lo', "garbage\n", "[]\n", '{"loss": 3}\n'])
def test_a_line_that_cannot_be_read_is_left_out_and_told(tmp_path: Path, tail: str) -> None:
    folder = write_metrics(tmp_path / "run", [metrics_of(step, 5) for step in range(1, 6)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(tail)
    html = _html(folder)
    assert [step for step, _ in points(html, "loss")[0]["points"]] == [1, 2, 3, 4, 5]
    assert "metrics.jsonl: line 6 could not be read: cut off or damaged." in html


@pytest.mark.parametrize(
    "rows",
    [
        [metrics_of(1, 1)],
        [{"step": 1}],
        [{"step": step, "loss": None, "grad_norm": None} for step in range(1, 4)],
        [metrics_of(step, 3, loss=2.0, grad_norm=0.0, lr=0.0) for step in range(1, 4)],
        [{"step": step, "loss": 1e300 * step, "lr": 1e-12} for step in (5, 1000)],
    ],
    ids=["one step", "nothing measured", "all skipped", "constant", "far apart"],
)
def test_runs_of_few_numbers_have_a_report(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    html = _html(write_metrics(tmp_path / "run", rows))
    assert "The run holds no record of expert loads" in html
    assert re.findall(r"\b(?:nan|inf)\b", html) == []


def test_names_from_files_are_text(tmp_path: Path) -> None:
    row = metrics_of(1, 1) | {"<b>&_loss": 1.0}
    html = _html(write_metrics(tmp_path / "<i>run&", [row]))
    assert "<i>" not in html
    assert "<h1>&lt;i&gt;run&amp;</h1>" in html
    assert "<b>&_loss" not in html


def test_links_out_of_the_run_folder_are_not_followed(tmp_path: Path) -> None:
    """A folder that somebody else has made, whose report is handed on."""
    secret = tmp_path / "secret"
    secret.write_text("private key")
    folder = write_metrics(tmp_path / "run", [metrics_of(1, 1)])
    (folder / "faults").mkdir()
    for name in (LOAD_FILE, RANK_LOAD_FILE, "events.jsonl", "config.toml", "faults/1.txt"):
        (folder / name).symlink_to(secret)
    os.mkfifo(folder / "faults" / "2.txt")  # whoever opened it would wait for ever
    (folder / "faults" / "3.txt").write_text("of this run")
    html = _html(folder)
    assert "private key" not in html
    assert "of this run" in html
    assert html.count("is a link that leads out of the run folder, and is not followed.") == 5
    (folder / "faults" / "1.txt").unlink()
    (folder / "faults" / "1.txt").symlink_to(folder / "faults" / "3.txt")
    assert _html(folder).count("of this run") == 2, "a link within is"
    whole = tmp_path / "link to a run"
    whole.symlink_to(write_metrics(tmp_path / "other", [metrics_of(1, 1)]))
    assert "leads out" not in _html(whole)
    (tmp_path / "other" / "metrics.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (tmp_path / "other" / "metrics.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(ReportError, match="leads out of the run folder"):
        _html(whole)


def test_the_maps_show_load_over_mean(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(1, 1000, size=(7, 3, 8))
    counts[3, 1, 5] = 0
    folder = write_metrics(tmp_path / "run", [metrics_of(step, 70) for step in range(1, 71)])
    write_loads(folder, counts)
    html = _html(folder)
    maps = maps_of(html)
    assert list(maps) == ["overview", "0", "1", "2"]
    ratios = counts / counts.mean(axis=2, keepdims=True)
    for layer in range(3):
        np.testing.assert_array_equal(maps[str(layer)], to_indices(ratios[:, layer]).T)
    np.testing.assert_array_equal(maps["overview"], to_indices(ratios.max(axis=2)).T)
    assert (maps["1"] == 1).sum() == 1, "no tokens has a colour of its own"
    assert json.loads(re.findall(r'data-columns="(.*?)"', html)[0]) == [[step, step] for step in range(10, 71, 10)]


def test_colours_tell_values_apart() -> None:
    ratios = np.array([np.nan, 0.0, 0.01, 0.125, 0.5, 0.93, 1.0, 1.08, 2.0, 8.0, 100.0])
    indices = to_indices(ratios)
    assert indices.tolist() == [0, 1, 2, 2, 22, 31, 32, 33, 42, 62, 62]
    assert len(set(PALETTE)) == len(PALETTE) == 63
    lightness = [sum(colour) for colour in PALETTE[2:]]
    assert lightness[:31] == sorted(lightness[:31])
    assert lightness[30:] == sorted(lightness[30:], reverse=True)


def test_many_records_are_summed_in_columns() -> None:
    counts = np.random.default_rng(0).integers(0, 50, size=(1000, 2, 4)).astype(np.int32)
    steps = np.arange(1, 1001) * 10
    balance = Balance.of(steps, counts)
    assert len(balance.first) == 143
    assert (balance.first[1], balance.last[1]) == (80, 140)
    own = counts[7:14].sum(axis=0)
    np.testing.assert_allclose(balance.ratios[1], own / own.mean(axis=1, keepdims=True))
    assert (balance.final.first, balance.final.last) == (7510, 10000)
    np.testing.assert_array_equal(balance.final.routes, counts[750:].sum(axis=0))


def test_effective_experts_are_those_that_share_the_load() -> None:
    counts = np.array([[[5, 5, 5, 5], [10, 10, 0, 0], [20, 0, 0, 0], [0, 0, 0, 0]]])
    np.testing.assert_allclose(Balance.of(np.array([10]), counts).final.effective_number(), [4, 2, 1, 1])


def _warned(routes: np.ndarray) -> list[str]:
    """Warnings of 8 records, of which the last two are `routes` `[L, E]` and the others even."""
    counts = np.stack([np.full_like(routes, 1000)] * 6 + [routes] * 2)
    return warnings(Balance.of(np.arange(10, 90, 10), counts).final)


def test_a_collapsing_router_is_named() -> None:
    routes = np.full((4, 8), 100)
    assert _warned(routes) == []
    routes[1, 6] = 0
    routes[2, [0, 3]] = 0, 900
    assert _warned(routes) == [
        "Layer 1: expert 6 received no token (steps 70 to 80).",
        "Layer 2: expert 0 received no token and expert 3 received 4.8 times the mean (steps 70 to 80).",
    ]


def test_warnings_keep_to_their_bounds() -> None:
    """Records are two: an idle expert is one that an even router would have sent `IDLE_ROUTES`."""
    few = np.full((1, 8), IDLE_ROUTES // 2)
    few[0, 0] = 0
    assert _warned(few) == []
    few[0, 1] += IDLE_ROUTES // 2
    assert len(_warned(few)) == 1
    ratio = OVERLOAD * 7 / (8 - OVERLOAD)
    heavy = np.full((1, 8), 1000)
    heavy[0, 2] = int(1000 * ratio)
    assert _warned(heavy) == []
    heavy[0, 2] += 2
    assert len(_warned(heavy)) == 1


def test_many_warnings_are_summed_up() -> None:
    routes = np.full((20, 64), 100)
    routes[:, ::2] = 0
    sentences = _warned(routes)
    assert len(sentences) == 9
    assert sentences[0] == "Layer 0: experts 0, 2, 4, 6, 8, 10 and 26 more received no token (steps 70 to 80)."
    assert "12 more layers" in sentences[-1]


def _words(name: str, header: list[int], *records: list[int]) -> bytes:
    """A file of loads: its letters and header, then the records, each with its checksum."""
    letters = {LOAD_FILE: 0x444C4458, RANK_LOAD_FILE: 0x524C4458}[name]
    words = [np.array(part, "<i4").tobytes() for part in ([letters, *header], *records)]
    return b"".join(part + xxhash.xxh32(part).intdigest().to_bytes(4, "little") for part in words)


# By what is told: header, records, and how many bytes are cut off.
BAD_LOADS: dict[str, tuple[list[list[int]], int]] = {
    "{} has version 1": ([[1, 1, 1]], 0),
    "{} is damaged: it says that it has -1 layers of -1 loads": ([[2, -1, -1]], 0),
    "The steps in {} do not ascend.": ([[2, 1, 1], [20, 5], [10, 5]], 0),
    "{}: 2 records left out: damaged.": ([[2, 1, 1], [20, 5, 0]], 2),
    "{} holds no loads.": ([[2, 1, 1]], 5),
}


@pytest.mark.parametrize("name", [LOAD_FILE, RANK_LOAD_FILE])
@pytest.mark.parametrize("told", BAD_LOADS)
def test_loads_that_cannot_be_read_are_told(tmp_path: Path, name: str, told: str) -> None:
    folder = write_metrics(tmp_path / "run", [metrics_of(1, 1)])
    parts, cut = BAD_LOADS[told]
    data = _words(name, *parts)
    (folder / name).write_bytes(data[: len(data) - cut])
    html = _html(folder)
    assert told.format(name) in html
    assert maps_of(html) == {}
    assert str(tmp_path) not in html


def test_settings_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path / "run", [metrics_of(1, 1)])
    (folder / "config.toml").write_text(by_hand("[training]\nstepz = 5\n"))
    assert "did you mean training.steps?" in _html(folder)


def test_a_report_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path / "run", [metrics_of(1, 2)])
    first = _html(folder)
    assert _html(folder) == first, "the same run has the same report"
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError):
        write_report(folder)
    assert (folder / "report.html").read_text() == first
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.html"]


def _call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["report", *arguments])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def test_the_command_prints_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_metrics(tmp_path / "run", [metrics_of(1, 1)])
    assert _call(str(folder)) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert _call(str(folder), "--output", str(tmp_path / "other.html")) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'other.html'}\n"
    assert (tmp_path / "other.html").read_text() == (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "RUN"),
        ("nowhere", "nowhere is no folder"),
        ("empty", "metrics.jsonl is not in it"),
        ("begun", "has no step yet"),
        ("run --output nowhere/report.html", "cannot write nowhere/report.html"),
        ("run --output empty", "cannot write empty"),
        ("run --ouput x", "--ouput"),
    ],
)
def test_a_mistake_gives_one_message(
    arguments: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    write_metrics(Path("run"), [metrics_of(1, 1)])
    write_metrics(Path("begun"), [])
    Path("empty").mkdir()
    assert _call(*arguments.split()) == 2
    output, message = capsys.readouterr()
    assert output == ""
    assert words in message
    assert sum(line.startswith(("╭", "+-")) for line in message.splitlines()) == 1
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12345.6, "12,346"), (5.48219, "5.482"), (0.0312, "0.0312"), (3.2e-5, "3.2e-5"), (-1e-12, "-1e-12")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(830, "830"), (8300, "8,300"), (12345, "12.3 k"), (999_960, "1.0 M"), (839e9, "839 B"), (1.2e12, "1.2 T")],
)
def test_counts(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (6.17, 9.06), (1, 100_000), (0, 3e-4), (-3, 17), (1e-12, 2e9)])
def test_ticks_are_round_few_and_within(low: float, high: float) -> None:
    marks = ticks(low, high, 5)
    assert 2 <= len(marks) <= 6
    room = 1e-9 * (high - low)
    assert all(low - room <= value <= high + room for value, _ in marks)
    assert len({label for _, label in marks}) == len(marks)
    for value, label in marks:
        assert float(label.replace(",", "")) == pytest.approx(value, rel=1e-3, abs=1e-30)


def test_logarithmic_ticks_are_few() -> None:
    assert [label for _, label in log_ticks(1.5, 40)] == ["2", "5", "10", "20"]
    assert [label for _, label in log_ticks(0.25, 300)] == ["1", "10", "100"]
    assert len(log_ticks(1e-9, 1e9)) <= 7
