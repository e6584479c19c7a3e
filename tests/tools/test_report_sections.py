"""What the report says of time, communication and faults is what the run folder holds, and nothing in it is markup."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from crossdock.tools.report import EVENTS_FILE, FAULTS_FOLDER, RANK_LOAD_FILE, note_event, write_report
from crossdock.train.times import step_times
from tests.tiny import by_hand
from tests.tools.pages import bars_of, charts_of, figures_of, points, rows_of
from tests.tools.runs import everything_of, long_run, metrics_of, write_loads, write_metrics

HOSTILE = "<img src=x onerror=alert(1)>\"'&"


def _html(folder: Path) -> str:
    return write_report(folder).read_text()


def test_times_of_a_step_add_up_and_miss_nothing() -> None:
    seconds = {("forward", ""): 1.0, ("forward", "experts"): 2.0, ("backward", "experts"): 4.0, ("start", ""): 8.0}
    times = step_times(seconds | {("something new", ""): 16.0})
    assert times["experts_seconds"] == 6.0
    assert times["forward_seconds"] == 1.0
    assert times["other_seconds"] == 24.0
    assert times.pop("step_seconds") == sum(times.values()) == 31.0


def test_bars_say_where_the_time_goes(tmp_path: Path) -> None:
    rows = [everything_of(step, 40, backward_seconds=0.25 + 0.04 * (step == 17)) for step in range(1, 41)]
    html = _html(write_metrics(tmp_path / "run", rows))
    bars = bars_of(html, "Where the time goes")
    assert "moving experts" not in bars, "none were moved"
    longest = 0.25 + 0.04 / 40
    total = np.mean([row["step_seconds"] for row in rows])
    width, mean, share, median, most = bars["backward, but for MoE layers"]
    assert (width, mean, median) == ("100.00", "0.251", "0.25")
    assert share == f"{100 * longest / total:.1f}"
    assert most == "0.29 at step 17"
    assert float(bars["MoE: dispatch"][0]) == pytest.approx(100 * 0.1 / longest, abs=0.01)
    assert points(html, "step_seconds")[0]["points"][0][1] == pytest.approx(rows[0]["step_seconds"], rel=1e-3)


def test_a_run_of_an_earlier_version_has_no_such_section(tmp_path: Path) -> None:
    html = _html(write_metrics(tmp_path / "run", [metrics_of(1, 1)]))
    assert "Where the time goes" not in html
    assert "<h2>Communication" not in html
    assert "Nothing befell this run that it recorded." in html


def test_bytes_are_told_by_link_beside_the_least(tmp_path: Path) -> None:
    rows = [everything_of(step, 40, bytes_between_nodes=200 * 2**20) for step in range(1, 41)]
    rows[9] |= {"moved_bytes": 40 * 2**20}
    html = _html(write_metrics(tmp_path / "run", rows))
    bars = bars_of(html, "Communication")
    least = 100_000_000
    assert bars["between nodes"][1:] == ["200 MiB", "95.4 MiB", f"{200 * 2**20 / least:.2f}", "7.81 GiB"]
    assert bars["experts that moved"][1] == "1 MiB", "a step's share of it"
    assert "experts' gradients, over replicas" not in bars
    sent, needed = points(html, "bytes_between_nodes")
    assert (sent["name"], needed["name"]) == ("sent", "the least")
    assert needed["points"][3][1] == pytest.approx(least / 2**20, rel=1e-3)


def test_loads_have_entropy_dead_experts_and_drops(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path / "run", [everything_of(step, 40) for step in range(1, 41)])
    assert {"load_entropy", "load_variation", "dead_experts", "dropped_routes"} <= set(charts_of(_html(folder)))
    write_metrics(folder, [everything_of(step, 40, dropped_routes=0) for step in range(1, 41)])
    assert "dropped_routes" not in charts_of(_html(folder)), "no capacity, nothing dropped"


def test_faults_and_recoveries_are_told_in_order(tmp_path: Path) -> None:
    rows = [everything_of(step, 40) for step in range(1, 41)]
    for step in (11, 12, 30):
        rows[step - 1] |= {"loss": None}
    folder = write_metrics(tmp_path / "run", rows)
    note_event(folder, "start", "a new run, on 2 ranks", 0)
    note_event(folder, "bad step", "loss is NaN or infinite; the step is skipped", 11)
    note_event(folder, "failure", "rank 1 ended with SIGKILL; starting all ranks again")
    note_event(folder, "start", "goes on at step 20", 20)
    (folder / FAULTS_FOLDER).mkdir()
    (folder / FAULTS_FOLDER / "20261122-101010.txt").write_text("a collective did not complete within 4 s\n  rank 1\n")
    html = _html(folder)
    told = rows_of(html, "What happened, in order")
    assert [(row[1], row[2]) for row in told] == [("0", "start"), ("11", "bad step"), ("", "failure"), ("20", "start")]
    assert all(row[0].startswith(time.strftime("%Y-", time.gmtime())) for row in told)
    assert "rank 1 ended with SIGKILL" in told[2][3]
    assert figures_of(html)["Starts"] == "2 after 1 failure"
    assert "steps 11 to 12, step 30" in html
    assert "64 samples passed over by rollbacks" in html
    assert "a collective did not complete within 4 s\n  rank 1" in html
    assert {"replica_groups", "stall_seconds", "slowest_rank_ratio"} <= set(charts_of(html))


def test_events_that_are_damaged_are_left_out_and_told(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path / "run", [metrics_of(1, 1)])
    for number in range(4):
        note_event(folder, "start", f"number {number}", number)
    lines = (folder / EVENTS_FILE).read_text().splitlines()
    lines[1] = lines[1].replace("number 1", "number 7")
    lines[2] = lines[2][:20]
    (folder / EVENTS_FILE).write_text("\n".join([*lines, "[" * 100_000, json.dumps({"kind": "start"})]))
    html = _html(folder)
    assert [row[3] for row in rows_of(html, "What happened, in order")] == ["number 0", "number 3"]
    assert f"{EVENTS_FILE}: 4 lines left out: damaged." in html


def test_nothing_is_taken_for_markup(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "")
    rows = [everything_of(step, 40) | {f"{HOSTILE}_loss": 1.0} for step in range(1, 41)]
    write_metrics(folder, rows)
    write_loads(folder, np.ones((2, 2, 4)))
    (folder / "config.toml").write_text(by_hand(f"[model]\nflavor = '''{HOSTILE}'''\n"))
    note_event(folder, "failure", HOSTILE)
    (folder / FAULTS_FOLDER).mkdir()
    (folder / FAULTS_FOLDER / f"{HOSTILE}.txt").write_text(f"{HOSTILE} </pre><script>alert(2)</script>")
    other = write_metrics(tmp_path / "other", rows)
    for html in (_html(folder), write_report([folder, other], tmp_path / "both.html").read_text()):
        assert "<img src=x" not in html
        assert "<script>alert" not in html
        assert html.count("<script>") == 1
        assert re.search(r"&lt;img src=x", html)


@pytest.mark.slow
def test_a_long_run_of_a_big_model_stays_small(tmp_path: Path) -> None:
    """`python -m benchmarks.report` also shows how fast it opens."""
    folder = long_run(tmp_path / "run", 10_000)
    loads = np.random.default_rng(0).lognormal(5, 0.6, size=(1000, 94, 128))
    write_loads(folder, loads)
    write_loads(folder, loads[..., :64], name=RANK_LOAD_FILE)
    assert write_report(folder).stat().st_size < 15e6
