"""Loads of ranks: metrics are what a count by hand of the records says, and the report shows both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from crossdock.tools.report import LOAD_FILE, RANK_LOAD_FILE, read_load, write_report
from crossdock.tools.report.heat import to_indices
from crossdock.tools.report.ranks import looks
from crossdock.tools.report.records import read_run
from tests.ranks import RankPool
from tests.tiny import by_hand, run_trainer, write_assets
from tests.tools.pages import charts_of, figures_of, maps_of, points, rows_of
from tests.tools.runs import metrics_of, write_loads, write_metrics

RANK_CHARTS = ["rank_max_mean", "imbalance_seconds"]
STEPS = 7


class Run(NamedTuple):
    """A run of two ranks with skewed routing: its folder, lines of metrics, and routes `[N, L, E]` and `[N, L, R]`."""

    folder: Path
    metrics: list[dict[str, Any]]
    of_experts: np.ndarray
    of_ranks: np.ndarray

    def column(self, name: str) -> list[float]:
        return [line[name] for line in self.metrics]


def _run(ranks: RankPool, folder: Path, *balance: str) -> Run:
    assets = write_assets(folder / "assets")
    settings = (
        *("--training.steps", str(STEPS), "--metrics.load-interval", "1"),
        *("--parallelism.expert-parallel-degree", "2", "--moe.debug-force-zipf", "1.2"),
        *balance,
    )
    results = ranks.run(2, run_trainer, str(assets), str(folder / "run"), str(folder / "cache"), settings)
    (steps, of_experts), (same, of_ranks) = (
        read_load(folder / "run" / name)[:2] for name in (LOAD_FILE, RANK_LOAD_FILE)
    )
    assert steps.tolist() == same.tolist() == list(range(1, STEPS + 1))
    return Run(folder / "run", results[0]["metrics"], of_experts, of_ranks)


@pytest.fixture(scope="module")
def plain(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(ranks, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def balanced(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    often = ("--balance.rebalance-interval", "2", "--balance.no-move-if-it-pays")
    return _run(ranks, tmp_path_factory.mktemp("balanced"), "--balance.strategy", "eplb", *often)


def _max_over_mean(loads: np.ndarray) -> np.ndarray:
    """`[N, L]` of `[N, L, R]`."""
    return loads.max(axis=2) / loads.mean(axis=2)


@pytest.mark.parametrize("name", ["plain", "balanced"])
def test_metrics_are_what_a_count_by_hand_says(name: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(name)
    assert run.of_ranks.shape == (STEPS, 2, 2)
    np.testing.assert_array_equal(run.of_ranks.sum(axis=2), run.of_experts.sum(axis=2), "every route is computed once")
    after = _max_over_mean(run.of_ranks)
    np.testing.assert_allclose(run.column("rank_max_mean"), after.mean(axis=1))
    np.testing.assert_allclose(run.column("worst_rank_max_mean"), after.max(axis=1))
    # Rank 0 has the experts 0 to 3 as long as none has moved.
    unmoved = run.of_experts.reshape(STEPS, 2, 2, 4).sum(axis=3)
    np.testing.assert_allclose(run.column("rank_max_mean_before"), _max_over_mean(unmoved).mean(axis=1))
    assert "node_max_mean" not in run.metrics[0], "there is one node"
    for line in run.metrics:
        seconds = line["tokens"] / line["tokens_per_second_per_gpu"] / 2
        # Of the time that both ranks compute at once, a backward pass being two forward passes.
        assert 0 < line["imbalance_seconds"] < 3 * seconds


def test_without_relief_there_is_nothing_before_and_after(plain: Run) -> None:
    assert plain.column("rank_max_mean") == plain.column("rank_max_mean_before")
    assert min(plain.column("rank_max_mean")) > 1.3, "the popular experts share a rank"
    relief = {"predicted_rank_max_mean", "moved_experts", "moved_bytes", "move_seconds", "borrowed_experts"}
    assert not relief & set().union(*plain.metrics)
    html = write_report(plain.folder).read_text()
    (only,) = points(html, "rank_max_mean")
    assert len(only["points"]) == STEPS
    assert "before relief" not in figures_of(html)["Busiest rank"]
    assert "Moves of experts" not in html


def test_looks_are_in_the_metrics_and_in_the_report(balanced: Run) -> None:
    looked = [line for line in balanced.metrics if "predicted_rank_max_mean" in line]
    assert [line["step"] for line in looked] == [2, 4, 6]
    assert looked[0]["moved_experts"] > 0
    assert looked[0]["moved_bytes"] > 0
    after = balanced.column("rank_max_mean")
    assert after[:2] == balanced.column("rank_max_mean_before")[:2]
    assert np.mean(after[2:]) < 0.9 * np.mean(balanced.column("rank_max_mean_before")[2:])
    found = looks(read_run(balanced.folder))
    assert [(look.step, look.experts, look.bytes, look.seconds, look.predicted) for look in found] == [
        tuple(
            line[name] for name in ("step", "moved_experts", "moved_bytes", "move_seconds", "predicted_rank_max_mean")
        )
        for line in looked
    ]
    achieved = [np.mean(after[2:4]), np.mean(after[4:6]), after[6]]
    np.testing.assert_allclose([look.achieved for look in found], achieved)
    html = write_report(balanced.folder).read_text()
    rows = rows_of(html, "Moves of experts")
    assert [row[0] for row in rows] == ["2", "4", "6"]
    np.testing.assert_allclose([float(row[2]) for row in rows], achieved, rtol=1e-3)
    np.testing.assert_allclose(float(rows[0][4]), looked[0]["moved_bytes"] / 2**20, rtol=1e-3)
    moves = [line["step"] for line in looked if line["moved_experts"]]
    assert html.count(": experts moved</title>") == len(moves)


def test_the_report_draws_what_was_recorded(balanced: Run) -> None:
    html = write_report(balanced.folder).read_text()
    assert charts_of(html)[-2:] == RANK_CHARTS
    for series, name in zip(points(html, "rank_max_mean"), ("rank_max_mean_before", "rank_max_mean"), strict=True):
        assert [step for step, _ in series["points"]] == list(range(1, STEPS + 1))
        np.testing.assert_allclose([value for _, value in series["points"]], balanced.column(name), rtol=1e-3)
    (price,) = points(html, "imbalance_seconds")
    np.testing.assert_allclose(
        [value for _, value in price["points"]], balanced.column("imbalance_seconds"), rtol=1e-3, atol=1e-7
    )
    maps = maps_of(html)
    assert list(maps) == ["overview", "0", "1", "rank-overview", "rank-0", "rank-1"]
    ratios = balanced.of_ranks / balanced.of_ranks.mean(axis=2, keepdims=True)
    for layer in range(2):
        np.testing.assert_array_equal(maps[f"rank-{layer}"], to_indices(ratios[:, layer]).T)
    np.testing.assert_array_equal(maps["rank-overview"], to_indices(ratios.max(axis=2)).T)
    busiest = figures_of(html)["Busiest rank"]
    last = balanced.metrics[-1]
    assert busiest.startswith(
        f"{last['rank_max_mean']:.2f} \u00d7 mean {last['rank_max_mean_before']:.2f} before relief"
    )
    assert len(rows_of(html, "Load of each rank")) == 2


def test_maps_are_left_out_where_there_is_no_record(balanced: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(balanced.folder, folder, ignore=shutil.ignore_patterns("checkpoint", RANK_LOAD_FILE))
    html = write_report(folder).read_text()
    assert list(maps_of(html)) == ["overview", "0", "1"]
    assert charts_of(html)[-2:] == RANK_CHARTS
    assert f"{RANK_LOAD_FILE} holds" not in html
    (folder / RANK_LOAD_FILE).write_bytes(b"something else, of some length")
    html = write_report(folder).read_text()
    assert list(maps_of(html)) == ["overview", "0", "1"]
    assert f"{RANK_LOAD_FILE} holds no loads." in html


def test_a_run_on_one_rank_says_nothing_of_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_metrics(folder, [metrics_of(step, 20) for step in range(1, 21)])
    write_loads(folder, np.ones((2, 1, 4)))
    html = write_report(folder).read_text()
    assert "Rank load" not in html
    assert "Busiest rank" not in html


def test_nodes_are_shown_where_their_ranks_are_known(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path / "run", [metrics_of(step, 20, node_max_mean=1.5) for step in range(1, 21)])
    counts = np.random.default_rng(0).integers(0, 1000, size=(2, 1, 6))
    write_loads(folder, counts, name=RANK_LOAD_FILE)
    assert list(maps_of(write_report(folder).read_text())) == ["rank-0"]
    (folder / "config.toml").write_text(by_hand("[moe]\nranks_per_node = 3\n"))
    html = write_report(folder).read_text()
    maps = maps_of(html)
    assert list(maps) == ["rank-0", "node-0"]
    of_nodes = np.stack([counts[..., :3].sum(axis=2), counts[..., 3:].sum(axis=2)], axis=2)
    np.testing.assert_array_equal(maps["node-0"], to_indices(of_nodes / of_nodes.mean(axis=2, keepdims=True))[:, 0].T)
    assert charts_of(html)[-1] == "node_max_mean"


def test_the_last_looks_of_many_are_in_the_table(tmp_path: Path) -> None:
    rows = [metrics_of(step, 300, rank_max_mean=float(step), predicted_rank_max_mean=1.1) for step in range(1, 301)]
    for row in rows[::2]:
        del row["predicted_rank_max_mean"]
    rows[101] |= {"rank_max_mean": None}
    html = write_report(write_metrics(tmp_path / "run", rows)).read_text()
    table = rows_of(html, "Moves of experts")
    assert [row[0] for row in table] == [str(step) for step in range(102, 301, 2)]
    assert table[0][1:] == ["1.1", "103.5", "0", "0", "0"]
    assert table[-1][2] == "\u2013", "no step came after the last look"
    assert "The last 100 of 150 looks" in html
    assert looks(read_run(tmp_path / "run"))[49].achieved == 101.0, "a step without a value does not count"
