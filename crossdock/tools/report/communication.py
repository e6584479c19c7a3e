"""What the page says of the bytes that MoE layers sent, by link, and of the least that they could have sent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossdock.tools.report.charts import Series
from crossdock.tools.report.curves import MIB, chart, series_of
from crossdock.tools.report.markup import DASH, Bar, bars
from crossdock.tools.report.numbers import size
from crossdock.tools.report.records import RunRecords

__all__ = ["LINKS", "communication_section"]


@dataclass(frozen=True)
class Link:
    """A kind of link.

    Attributes:
        key: of what was sent over it.
        least: of the least for the same routes; empty where there is no such thing.
        name: for people.
    """

    key: str
    least: str
    name: str


LINKS: tuple[Link, ...] = (
    Link("bytes_within_nodes", "least_bytes_within_nodes", "within nodes"),
    Link("bytes_between_nodes", "least_bytes_between_nodes", "between nodes"),
    Link("metadata_bytes", "", "counts, ids and weights"),
    Link("replica_bytes", "", "experts' gradients, over replicas"),
    Link("moved_bytes", "", "experts that moved"),
)


def communication_section(records: RunRecords) -> str:
    """Bars and curves; nothing for a run that sent nothing."""
    rows, drawn = [], []
    for link in LINKS:
        sent = records.column(link.key)
        if not np.isfinite(sent).any() or not np.nanmax(sent) > 0:
            continue
        least = records.column(link.least) if link.least else np.full(len(sent), np.nan)
        # A step that moved nothing says nothing of it.
        mean, total = float(np.nansum(sent)) / len(sent), float(np.nansum(sent))
        known = bool(np.isfinite(least).any())
        least_mean = float(np.nansum(least)) / len(least)
        over = f"{mean / least_mean:.2f}" if known and least_mean else DASH
        rows.append(Bar(link.name, [mean], [size(mean), size(least_mean) if known else DASH, over, size(total)]))
        if link.key == "moved_bytes":
            continue
        series = [series_of(records, link.key, "sent")]
        if known:
            series.append(Series.of("the least", records.steps, least / MIB))
        drawn.append(chart(link.key, series, records.span))
    if not rows:
        return ""
    caption = (
        "Bytes per step, the mean, that all ranks sent to others for MoE layers, forward and backward. The least "
        "is what any dispatcher must send for these routes: a token once to each other node, and once to each further "
        "rank."
    )
    shown = bars(caption, ["link", "per step", "the least", "times the least", "the whole run"], rows)
    return f'{shown}<div class="charts even">{"".join(drawn)}</div>'
