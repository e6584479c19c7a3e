"""Several runs on one page: figures side by side, curves over each other, and what their settings differ in."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from crossdock.tools.report.charts import COLUMNS
from crossdock.tools.report.curves import chart, series_of
from crossdock.tools.report.document import document
from crossdock.tools.report.markup import DASH, Bar, bars, cell, section, table
from crossdock.tools.report.numbers import count, size
from crossdock.tools.report.page import footer, run_name
from crossdock.tools.report.records import RunRecords
from crossdock.tools.report.times import PARTS

__all__ = ["comparison"]

_CURVES = (
    "loss",
    "validation_loss",
    "grad_norm",
    "lr",
    "tokens_per_second_per_gpu",
    "step_seconds",
    "memory_gib",
    "max_mean_load",
    "load_entropy",
    "dead_experts",
    "dropped_routes",
    "rank_max_mean",
    "imbalance_seconds",
    "bytes_within_nodes",
    "bytes_between_nodes",
    "skipped_steps",
)
# Across a chart of one run; more runs share about as many points.
_MOST_POINTS = 2 * COLUMNS


def comparison(runs: Sequence[RunRecords], live: tuple[str, float] | None = None) -> str:
    """A whole page.

    Args:
        runs: two to `charts.MOST_SERIES`.
        live: see `document`.
    """
    names = _names(runs)
    span = (min(run.span[0] for run in runs), max(run.span[1] for run in runs))
    keys = "".join(f'<span class="key s{index}">{escape(name)}</span>' for index, name in enumerate(names))
    notes = [f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes]
    content = (
        f'<header><h1>{len(runs)} runs</h1><p class="legend">{keys}</p></header>\n'
        f"{section('Figures', _figures(runs, names))}"
        f"{section('Curves', _curves(runs, names, span))}"
        f"{section('Where the time goes', _times(runs, names))}"
        f"{section('Settings that differ', _settings(runs, names))}"
        f"{footer(notes)}"
    )
    return document(f"{len(runs)} runs: {', '.join(names)}", content, span, live=live)


def _names(runs: Sequence[RunRecords]) -> list[str]:
    """Of the runs; those of the same name by their place on the command line."""
    names = [run_name(run) for run in runs]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]


def _figures(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    head = (
        "run",
        "steps",
        "loss",
        "validation loss, best",
        "tokens",
        "tokens/s per rank, median",
        "memory, GiB",
        "busiest expert / mean",
        "busiest rank / mean",
        "sent per step",
        "s per step, median",
        "not applied",
        "starts",
    )
    rows = []
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        sent = run.column("bytes_within_nodes") + run.column("bytes_between_nodes")
        starts = sum(event.kind == "start" for event in run.events)
        rows.append(
            [
                f'<span class="key s{index}">{escape(name)}</span>',
                f"{int(run.steps[-1]):,}",
                _last(run, "loss"),
                _of(run, "validation_loss", np.nanmin),
                count(float(np.nansum(run.column("tokens")))),
                _of(run, "tokens_per_second_per_gpu", np.nanmedian),
                _of(run, "memory_gib", np.nanmax),
                _last(run, "max_mean_load"),
                _last(run, "rank_max_mean"),
                size(float(np.nanmean(sent))) if np.isfinite(sent).any() else DASH,
                _of(run, "step_seconds", np.nanmedian),
                _last(run, "skipped_steps"),
                str(starts) if starts else DASH,
            ]
        )
    caption = "At the last step, where nothing else is said."
    return f'<div class="scroll flat" tabindex="0">{table(caption, head, rows)}</div>'


def _last(run: RunRecords, key: str) -> str:
    found = run.last(key)
    return DASH if found is None else cell(found[1])


def _of(run: RunRecords, key: str, what: Callable[[np.ndarray], float]) -> str:
    return cell(float(what(run.column(key)))) if run.has(key) else DASH


def _curves(runs: Sequence[RunRecords], names: Sequence[str], span: tuple[int, int]) -> str:
    columns = min(COLUMNS, _MOST_POINTS // len(runs))
    drawn = []
    for key in _CURVES:
        # A run keeps its colour where others have no such metric.
        series = [
            series_of(run, key, name, columns, index)
            for index, (name, run) in enumerate(zip(names, runs, strict=True))
            if run.has(key)
        ]
        if any(one.points.high.max() > 0 for one in series):
            drawn.append(chart(key, series, span))
    return f'<div class="charts">{"".join(drawn)}</div>'


def _times(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    of_runs = enumerate(zip(names, runs, strict=True))
    shown = [(index, name, run) for index, (name, run) in of_runs if run.has("step_seconds")]
    content = ""
    for key, title in PARTS:
        rows = []
        for index, name, run in shown:
            values = run.column(key)
            if np.isfinite(values).any() and np.nanmax(values) > 0:
                mean = float(np.nanmean(values))
                rows.append(Bar(name, [0.0] * index + [mean], [cell(mean)]))  # in the run's colour
        if rows:
            content += bars(title[0].upper() + title[1:], ["run", "s per step, mean"], rows)
    return f'<div class="charts even">{content}</div>' if content else ""


def _settings(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    flat = [None if run.config is None else _flat(run.config) for run in runs]
    known = [settings for settings in flat if settings is not None]
    if len(known) < 2:
        return '<p class="quiet">Fewer than two of the runs have settings that can be read.</p>'
    differing = [key for key in known[0] if len({settings[key] for settings in known}) > 1]
    if not differing:
        return '<p class="quiet">None but the run folder.</p>'
    rows = [
        [escape(key), *(DASH if settings is None else escape(settings[key]) for settings in flat)] for key in differing
    ]
    shown = table("As each run resolved them.", ["setting", *names], rows)
    return f'<div class="scroll flat words" tabindex="0">{shown}</div>'


def _flat(config: object) -> dict[str, str]:
    """Settings by name, as text; without the place of the run."""
    sections = dataclasses.asdict(config)  # type: ignore[call-overload]
    texts = {f"{name}.{key}": str(value) for name, keys in sections.items() for key, value in keys.items()}
    del texts["job.dump_folder"]
    return texts
