"""`crossdock bench`: what it counts is what dispatchers send, and what it says of time follows from its assumptions."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from crossdock.cli import main
from crossdock.tools.bench import (
    Bench,
    Skew,
    Speeds,
    Workload,
    bench_cases,
    bench_page,
    bench_table,
    count,
    measure,
    parse_skew,
    simulate,
)
from crossdock.tools.bench.measuring import bench_layers
from crossdock.tools.bench.placing import place
from tests.blocks import commands_of
from tests.browser import Browser
from tests.ranks import RankPool
from tests.tiny import speeches, write_assets
from tests.tools.pages import bars_of
from tests.tools.test_report_in_browser import OVERLAPS, STICKS_OUT

ROOT = Path(__file__).parents[2]
SECONDS = 180
# 19 experts do not divide over 8 ranks; fp8 has two scales for 160 values.
SMALL = Workload(8, 4, 19, 3, 160, 8, 37, torch.float32, Skew(0.8))


def _sent(workload: Workload) -> list[tuple[int, int, int]]:
    """What this rank's dispatchers count of a forward and a backward pass of each case."""
    routes, sent = workload.draw(), []
    placed = {balanced: place(workload, routes, balanced=balanced) for balanced in (False, True)}
    for layer in bench_layers(workload, placed, torch.device("cpu")):
        torch.manual_seed(dist.get_rank())
        x = torch.randn(workload.tokens, workload.hidden_size, dtype=workload.dtype, requires_grad=True)
        weights = torch.rand(workload.tokens, workload.top_k, requires_grad=True)
        layer.run(x, weights).sum().backward()
        traffic = layer.dispatcher.traffic
        sent.append((traffic.within, traffic.between, traffic.metadata))
    return sent


@pytest.mark.parametrize(
    "workload",
    [
        SMALL,
        replace(SMALL, ranks_per_node=2, skew=Skew(0.0), dtype=torch.bfloat16),
        replace(SMALL, ranks_per_node=8, num_experts=8, top_k=8, skew=Skew(2.0)),
    ],
    ids=["2 nodes", "4 nodes", "1 node, all experts"],
)
def test_simulated_bytes_are_those_counted_over_8_processes(ranks: RankPool, workload: Workload) -> None:
    by_rank = np.array(ranks.run(8, _sent, workload))
    routes = workload.draw()
    for case, counted in zip(bench_cases(workload), by_rank.sum(axis=0).tolist(), strict=True):
        simulated = count(case, workload, place(workload, routes, balanced=case.balanced)).traffic
        assert (simulated.within, simulated.between, simulated.metadata) == tuple(counted), case.name
        assert sum(counted) > 0


def test_counting_is_by_definition() -> None:
    """In plain loops, over sets of ranks and nodes."""
    routes = SMALL.draw()
    placed = place(SMALL, routes, balanced=False)
    row = 160 * 4
    expected = {"plain all-to-all": [0, 0], "deduplicated": [0, 0], "+ hierarchy": [0, 0]}
    for source, tokens in enumerate(placed.ranks.tolist()):
        for ranks in tokens:
            node = source // 4
            for rank in ranks:
                expected["plain all-to-all"][rank // 4 != node] += rank != source
            for rank in set(ranks) - {source}:
                expected["deduplicated"][rank // 4 != node] += 1
            expected["+ hierarchy"][1] += len({rank // 4 for rank in ranks} - {node})
            expected["+ hierarchy"][0] += sum(rank % 4 != source % 4 for rank in set(ranks))
    for case in bench_cases(SMALL)[:3]:
        traffic = count(case, SMALL, placed).traffic
        assert [traffic.within, traffic.between] == [4 * row * rows for rows in expected[case.name]], case.name


def test_rare_experts_are_drawn_where_tokens_need_all() -> None:
    workload = Workload(2, 2, 64, 64, 8, 8, 16, torch.float32, Skew(4.0))
    assert (np.sort(workload.draw(), axis=2) == np.arange(64)).all()


def test_routes_are_distinct_and_follow_the_law() -> None:
    workload = replace(SMALL, tokens=20_000, num_experts=7, top_k=2, skew=Skew(1.0), num_ranks=1, ranks_per_node=1)
    routes = workload.draw()
    np.testing.assert_array_equal(routes, workload.draw())
    assert routes.shape == (1, 20_000, 2)
    assert (routes[..., 0] != routes[..., 1]).all()
    first = np.sort(np.bincount(routes[..., 0].reshape(-1), minlength=7) / 20_000)[::-1]
    law = 1 / np.arange(1, 8) / (1 / np.arange(1, 8)).sum()
    np.testing.assert_allclose(first, law, atol=0.015)
    # The second is drawn from the others, in proportion.
    popular = np.bincount(routes[..., 0].reshape(-1)).argmax()
    after = routes[routes[..., 0] == popular][:, 1]
    share = np.bincount(after, minlength=7).max() / len(after)
    assert share == pytest.approx(law[1] / law[1:].sum(), abs=0.02)
    assert sorted(np.unique(replace(workload, top_k=7).draw()[0, 0])) == list(range(7)), "all there are"


@pytest.mark.parametrize("text", ["zipf", "zipf:-1", "zipf:nan", "flat", "zipf:1:2"])
def test_a_skew_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be uniform, or zipf:S"):
        parse_skew(text)


def test_balance_evens_the_ranks_and_tells_what_it_moves() -> None:
    workload = replace(SMALL, num_ranks=16, num_experts=64, tokens=500)
    routes = workload.draw()
    for balanced, least, most in ((False, 1.3, 16), (True, 1, 1.1)):
        placed = place(workload, routes, balanced=balanced)
        loads = np.bincount(placed.ranks.reshape(-1), minlength=16)
        assert least <= loads.max() / loads.mean() <= most
        assert loads.sum() == routes.size
        assert (placed.moves is not None) == balanced
    assert placed.moves is not None
    assert placed.moves.experts >= 16, "a copy for each rank at least"
    assert placed.moves.bytes == placed.moves.experts * 3 * 160 * 8 * 4


def test_simulated_times_follow_from_the_speeds() -> None:
    workload = replace(SMALL, tokens=300)
    fast = Speeds(1e30, 1e30, 1e12, 0.0)
    only_experts = {outcome.case.name: outcome for outcome in simulate(workload, fast).outcomes}
    mean = 300 * 3 * 6 * 160 * 8 / 1e12
    for outcome in only_experts.values():
        assert outcome.seconds == pytest.approx(3 * mean * outcome.busiest), "backward takes two forward passes"
    only_links = {one.case.name: one for one in simulate(workload, Speeds(1e9, 1e9, 1e30, 0.0)).outcomes}
    assert only_links["deduplicated"].seconds < only_links["plain all-to-all"].seconds
    assert only_links["+ fp8 wire"].seconds == pytest.approx(168 / 640 * only_links["deduplicated"].seconds)
    assert only_links["+ overlap"].seconds == pytest.approx(only_links["deduplicated"].seconds)
    both = {one.case.name: one for one in simulate(workload, Speeds(1e9, 1e9, 1e10, 0.0)).outcomes}
    assert both["+ overlap"].seconds < both["deduplicated"].seconds
    for outcome in both.values():
        for segments in outcome.timeline.values():
            assert [segment.part for segment in segments][:1] == [0]
            assert segments[-1].part == 2
            assert all(segment.begin <= segment.end for segment in segments)


def _measured(workload: Workload) -> Bench:
    return measure(workload, torch.device("cpu"), 2, ["measured here"])


def test_measured_cases_agree_and_are_timed(ranks: RankPool) -> None:
    workload = replace(SMALL, num_ranks=4, ranks_per_node=2, hidden_size=32)
    bench = ranks.run(4, _measured, workload)[0]
    assert [outcome.case for outcome in bench.outcomes] == bench_cases(workload)
    for outcome in bench.outcomes:
        simulated = count(outcome.case, workload, place(workload, workload.draw(), balanced=outcome.case.balanced))
        assert replace(outcome.traffic, least_within=0, least_between=0) == simulated.traffic
        assert outcome.busiest == pytest.approx(simulated.computed.max() / simulated.computed.mean())
        assert outcome.seconds > 0
        assert sorted(outcome.timeline) == [0, 1, 2, 3]
        for segments in outcome.timeline.values():
            assert {segment.part for segment in segments} == {0, 1, 2}
    table = bench_table(bench)
    assert "plain all-to-all" in table
    assert "measured here" in table


def _wrong(workload: Workload) -> str:
    """With a dispatcher that returns something else on one rank alone."""
    from crossdock.tools.bench.plain import PlainDispatcher

    combine = PlainDispatcher.combine
    if dist.get_rank() == 1:
        PlainDispatcher.combine = lambda self, y, handle: combine(self, 1.1 * y, handle)  # type: ignore[method-assign]
    try:
        _measured(workload)
    except ValueError as error:
        return str(error)
    finally:
        PlainDispatcher.combine = combine
    return ""


def test_results_that_differ_are_refused_on_all_ranks(ranks: RankPool) -> None:
    told = ranks.run(2, _wrong, replace(SMALL, num_ranks=2, ranks_per_node=2))
    assert told[0] == told[1]
    assert "results differ from those of the plain all-to-all: deduplicated" in told[0]


def _call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["bench", *arguments])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def test_the_command_simulates_a_large_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--simulate", "--ranks", "1024", "--experts", "4096", "--ranks-per-node", "8", "--tokens", "64"]
    assert _call(*arguments) == 0
    output = capsys.readouterr().out
    assert "1,024 ranks (128 nodes of 8)" in output
    assert "assumed, not measured: 450 GB/s within a node" in output
    assert output.endswith("bench.html\n")
    html = (tmp_path / "bench.html").read_text()
    bars = bars_of(html, "Bytes")
    assert bars["plain all-to-all"][-1] == "1.000"
    assert len(bars) == 7
    assert html.count('<figure class="timeline"') == 7


def test_the_command_measures_on_this_machine(tmp_path: Path) -> None:
    sizes = "--experts 8 --top-k 2 --hidden-size 32 --intermediate-size 16 --tokens 16 --rounds 2"
    command = [sys.executable, "-m", "crossdock", "bench", *sizes.split(), "--nproc", "2", "--output", "page.html"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "measured on" in done.stdout
    assert "+ balance" in done.stdout
    assert "+ hierarchy" not in done.stdout, "there is one node"
    assert "middle half" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--ranks 8", "--ranks goes with --simulate; --nproc is the number"),
        ("--simulate --nproc 8", "--ranks is the number of simulated ranks"),
        ("--simulate --ranks 2048", "--ranks must be 2 to 1024, not 2048"),
        ("--simulate --experts 5000", "--experts must be 1 to 4096, not 5000"),
        ("--simulate --experts 4 --top-k 5", "--top-k must be 1 to 4, not 5"),
        ("--simulate --ranks 10 --ranks-per-node 4", "--ranks-per-node must divide --ranks, 10"),
        ("--simulate --ranks 1024 --tokens 100000", "67,108,864 routes are the most"),
        ("--simulate --skew zipf", "'zipf' must be uniform, or zipf:S"),
        ("--simulate --tflops 0", "--tflops must be a positive number"),
        ("--simulate --within 1e-320", "--within must be a positive number"),
        ("--simulate --latency nan", "--latency must be a positive number"),
        ("--simulate --tokens 16 --output .", "cannot write .: it is a folder"),
        ("--nproc 4 --ranks-per-node 3", "--ranks-per-node must divide the 4 ranks (--nproc)"),
        ("--simulat", "--simulat"),
    ],
)
def test_a_mistake_gives_one_message(
    arguments: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert _call(*arguments.split()) in (1, 2)
    output, message = capsys.readouterr()
    assert output == ""
    assert words in message
    assert "Traceback" not in message


@pytest.mark.parametrize(("output", "where"), [("nowhere/bench.html", ""), ("bench.html", "> /dev/full")])
def test_what_cannot_be_written_is_one_message(output: str, where: str, tmp_path: Path) -> None:
    bench = f"{sys.executable} -m crossdock bench --simulate --ranks 4 --tokens 16 --output {output} {where}"
    shell = subprocess.run(["bash", "-c", bench], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert shell.returncode == 2, shell.stderr
    assert "Traceback" not in shell.stderr
    assert shell.stderr.count("╭") == 1


def test_measuring_does_not_begin_where_the_page_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--nproc", "2", "--output", str(tmp_path / "nowhere" / "bench.html")])
    assert ended.value.code == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_opens_cleanly_at_any_width(browser: Browser, tmp_path: Path, dark: bool) -> None:
    path = tmp_path / "bench.html"
    path.write_text(bench_page(simulate(replace(SMALL, num_ranks=64, num_experts=256), Speeds())))
    page = browser.open(path, dark=dark)
    for width in (1400, 700, 400):
        page.resize(width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(STICKS_OUT) == [], width
        assert page.evaluate(OVERLAPS) == [], width
    flat = "[...document.querySelectorAll('.timeline')].filter((one) => !one.querySelectorAll('rect').length).length"
    assert page.evaluate(flat) == 0
    fills = "[...new Set([...document.querySelectorAll('rect')].map((one) => getComputedStyle(one).fill))].length"
    assert page.evaluate(fills) == 3, "dispatch, experts and combine"
    rows = "[...document.querySelectorAll('details tbody tr')].filter((one) => one.checkVisibility()).length"
    assert page.evaluate(rows) == 0
    page.evaluate("document.querySelector('summary').focus()")
    for event in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=event, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13)
    assert page.evaluate(rows) > 0, "the figures open by keyboard"
    links = "[...document.querySelectorAll('nav a')].map((one) => document.querySelector(one.getAttribute('href')))"
    assert page.evaluate(f"{links}.length > 2 && {links}.every(Boolean)")
    assert page.complaints() == []
    assert [url for url in page.requests()[1:] if not url.startswith("data:")] == []
    page.close()


PAGE = (ROOT / "docs" / "bench.md").read_text()
COMMANDS = [command.removeprefix("crossdock ") for command in commands_of("docs/bench.md")]


def test_there_are_commands() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"bench", "train"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_work(
    command: str, only_rank: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank, and on fewer tokens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    program, *arguments = shlex.split(command)
    if program == "bench":
        assert only_rank(program, *arguments, "--tokens", "16", "--rounds", "1") == 0
        assert (tmp_path / "bench.html").exists()
    else:
        arguments[arguments.index("--training.steps") + 1] = "3"
        assets = write_assets(tmp_path / "assets")
        sources = ("--model.hf-assets-path", assets, "--data.source", speeches(assets), "--data.cache-folder", "cache")
        assert only_rank(program, *arguments, *sources, "--training.seq-len", "32", "--job.dump-folder", "run") == 0
        assert (tmp_path / "run" / "profile_traces" / "step-00000003" / "rank-0.json.gz").exists()


@pytest.mark.parametrize(("column", "ranks", "skew"), [(0, 8, "uniform"), (2, 64, "uniform"), (4, 64, "zipf:0.5")])
def test_the_simulated_figures_of_the_page_are_those_of_the_command(column: int, ranks: int, skew: str) -> None:
    workload = Workload(ranks, 8, 128, 8, 2048, 768, 4096, torch.bfloat16, parse_skew(skew))
    table = PAGE[PAGE.index("| | rows | time | rows | time |") :].partition("\n\n")[0]
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:]] for row in table.splitlines()}
    bench = simulate(workload, Speeds())
    for outcome in bench.outcomes:
        rows, share = cells[outcome.case.name][column : column + 2]
        sent, plain = (one.traffic.within + one.traffic.between for one in (outcome, bench.plain))
        assert rows == f"{sent / plain:.3f}".replace("1.000", "1"), outcome.case.name
        seconds = outcome.seconds / bench.plain.seconds
        assert share.startswith(f"{seconds:.3f}" if seconds != 1 else "1 ("), outcome.case.name


def test_nothing_of_a_bench_is_taken_for_markup() -> None:
    bench = simulate(SMALL, Speeds())
    html = bench_page(replace(bench, facts=["<img src=x>"], notes=["<b>"]))
    assert "<img src=x>" not in html
    assert "&lt;img src=x&gt;" in html
    assert "<b>" not in html.partition("<footer>")[2]
