"""What the page says of what befell a run, and how it went on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

import numpy as np

from crossdock.tools.report.curves import charts
from crossdock.tools.report.markup import DASH, details, many, table
from crossdock.tools.report.numbers import short, steps_text
from crossdock.tools.report.records import RunRecords

__all__ = ["faults_section", "starts_figure"]

_MOST_EVENTS = 200
_MOST_RANGES = 12
_CURVES = ("replica_groups", "stall_seconds", "slowest_rank_ratio")
_COUNTS = (
    ("skipped_steps", "steps that were not applied"),
    ("spikes", "of these, spikes of loss or gradient norm"),
    ("rollbacks", "rollbacks to a checkpoint"),
    ("passed_over_samples", "samples passed over by rollbacks"),
)


def starts_figure(records: RunRecords) -> list[tuple[str, str, str]]:
    """Title, value and note of the key figure; none for a run that was started once."""
    starts = sum(event.kind == "start" for event in records.events)
    if starts < 2:
        return []
    failures = sum(event.kind == "failure" for event in records.events)
    return [("Starts", f"{starts:,}", f"after {many(failures, 'failure')}" if failures else "no failure recorded")]


def faults_section(records: RunRecords) -> str:
    """Counts, curves, events and reports; a sentence where there is nothing."""
    counts, drawn = _counts(records), _charts(records)
    content = counts + drawn + _events(records) + _reports(records)
    if not (drawn or records.reports or len(records.events) > 1 or records.skipped.any() or _largest(records) > 0):
        return '<p class="quiet">Nothing befell this run that it recorded.</p>' + _events(records)
    return content


def _largest(records: RunRecords) -> float:
    counts = [value[1] for key, _ in _COUNTS if (value := records.last(key)) is not None]
    return max(counts, default=0.0)


def _counts(records: RunRecords) -> str:
    said = [f"{short(value[1])} {text}" for key, text in _COUNTS if (value := records.last(key)) and value[1] > 0]
    skipped = records.steps[records.skipped]
    if len(skipped):
        said.append(f"without a finite loss or gradient norm: {_ranges(skipped)}")
    return f"<p>{escape('; '.join(said))}.</p>" if said else ""


def _ranges(steps: np.ndarray) -> str:
    parts = np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1)
    texts = [steps_text(int(part[0]), int(part[-1])) for part in parts[:_MOST_RANGES]]
    return ", ".join([*texts, *([f"{len(parts) - _MOST_RANGES} more"] if len(parts) > _MOST_RANGES else [])])


def _charts(records: RunRecords) -> str:
    drawn = charts(records, _CURVES)
    note = ""
    slowest = records.last("slowest_rank")
    if slowest is not None:
        note = (
            f'<p class="note">At the last look, after step {slowest[0]:,}, the slowest rank was {slowest[1]:.0f}.</p>'
        )
    return f'<div class="charts even">{"".join(drawn)}</div>{note}' if drawn else ""


def _events(records: RunRecords) -> str:
    if not records.events:
        return ""
    events = records.events[-_MOST_EVENTS:]
    rows: list[Sequence[str]] = [
        [
            escape(_moment(event.time)),
            "" if event.step is None else f"{event.step:,}",
            escape(event.kind),
            escape(event.message),
        ]
        for event in events
    ]
    which = (
        f"The last {len(events):,} of {len(records.events):,} events" if len(events) < len(records.events) else "Events"
    )
    head = ["time, UTC", "after step", "what", "in words"]
    return details("What happened, in order", f'<div class="words">{table(f"{which} of the run.", head, rows)}</div>')


def _moment(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return DASH


def _reports(records: RunRecords) -> str:
    return "".join(
        details(f"Report of ranks that waited in vain: {escape(report.name)}", f"<pre>{escape(report.text)}</pre>")
        for report in records.reports
    )
