"""What the page says of the ranks that hold the experts: how even they were, what that cost, and what was moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossdock.tools.report.balance import Balance
from crossdock.tools.report.charts import Marks
from crossdock.tools.report.curves import MIB, chart, charts, series_of
from crossdock.tools.report.maps import load_maps
from crossdock.tools.report.markup import cell, details, many, table
from crossdock.tools.report.numbers import short
from crossdock.tools.report.records import RunRecords

__all__ = ["Look", "looks", "rank_figure", "rank_section"]

_BEFORE, _AFTER = "rank_max_mean_before", "rank_max_mean"
# After that of the busiest rank.
_CURVES = ("imbalance_seconds", "node_max_mean", "borrowed_experts")
_MOST_LOOKS = 100


@dataclass(frozen=True)
class Look:
    """A look at the placement after a step, and what came of it.

    Attributes:
        step: after which.
        predicted: max/mean over ranks of the placement that was then in force, by the loads it was planned by.
        achieved: the mean of the steps from then to the next look; NaN where there is none.
        experts, bytes, seconds: of what was moved; 0 where all stayed.
    """

    step: int
    predicted: float
    achieved: float
    experts: float
    bytes: float
    seconds: float


def looks(records: RunRecords) -> list[Look]:
    """All of a run, in order."""
    predicted = records.column("predicted_rank_max_mean")
    places = np.flatnonzero(np.isfinite(predicted))
    moved = [np.nan_to_num(records.column(name)) for name in ("moved_experts", "moved_bytes", "move_seconds")]
    # Each until the next, the last until the end.
    ends = np.append(places, len(predicted) - 1)[1:]
    found = []
    for place, following in zip(places, ends, strict=True):
        after = records.column(_AFTER)[place + 1 : following + 1]
        after = after[np.isfinite(after)]
        achieved = float(after.mean()) if len(after) else np.nan
        experts, sent, seconds = (float(values[place]) for values in moved)
        found.append(Look(int(records.steps[place]), float(predicted[place]), achieved, experts, sent, seconds))
    return found


def rank_figure(records: RunRecords) -> list[tuple[str, str, str]]:
    """Title, value and note of the key figure; none where one rank has all experts."""
    after, before = records.last(_AFTER), records.last(_BEFORE)
    if after is None:
        return []
    notes = [f"{before[1]:.2f} before relief"] if before is not None and _is_relieved(records) else []
    if records.has("imbalance_seconds"):
        notes.append(f"{short(float(np.nanmedian(records.column('imbalance_seconds'))))} s lost per step, median")
    return [("Busiest rank", f"{after[1]:.2f} <small>&times; mean</small>", "; ".join(notes))]


def rank_section(records: RunRecords) -> str:
    """Charts, looks at the placement, and maps; nothing where one rank has all experts."""
    return _charts(records) + _looks_table(records) + _maps(records)


def _is_relieved(records: RunRecords) -> bool:
    """Whether relief has ever made a difference."""
    before, after = records.column(_BEFORE), records.column(_AFTER)
    both = np.isfinite(before) & np.isfinite(after)
    return not np.allclose(before[both], after[both])


def _charts(records: RunRecords) -> str:
    moved = records.steps[np.nan_to_num(records.column("moved_experts")) > 0]
    # Without relief the two curves are one.
    names = {_BEFORE: "before relief", _AFTER: "after"} if _is_relieved(records) else {_AFTER: "busiest rank"}
    series = [series_of(records, key, name) for key, name in names.items() if records.has(key)]
    marks = Marks(moved, "experts moved", "moved")
    drawn = [chart(_AFTER, series, records.span, marks, 200)] if series else []
    drawn += charts(records, _CURVES)
    note = '<p class="note">A triangle marks steps after which experts moved.</p>' if len(moved) else ""
    return f'<div class="charts">{"".join(drawn)}</div>{note}' if drawn else ""


def _looks_table(records: RunRecords) -> str:
    found = looks(records)
    if not found:
        return ""
    rows = [
        [
            f"{look.step:,}",
            cell(look.predicted),
            cell(look.achieved),
            *((short(look.experts), cell(look.bytes / MIB), cell(look.seconds)) if look.experts else ("0", "0", "0")),
        ]
        for look in found[-_MOST_LOOKS:]
    ]
    which = f"The last {_MOST_LOOKS} of {len(found):,} looks" if len(found) > _MOST_LOOKS else "Looks"
    caption = (
        f"{which} at the placement; experts moved in {sum(look.experts > 0 for look in found):,}. Predicted: max/mean "
        "over ranks by the loads that it was planned by. Achieved: the mean of the steps from then to the next look."
    )
    head = ["after step", "predicted", "achieved", "experts moved", "MiB moved", "seconds"]
    return details("Moves of experts", table(caption, head, rows))


def _maps(records: RunRecords) -> str:
    if records.rank_loads is None:
        return ""
    num_ranks = records.rank_loads.counts.shape[2]
    what = (
        "Routes that each rank computed, over the mean of its layer, copied and borrowed experts among them; "
        f"{many(num_ranks, 'rank')} hold the experts of a layer together, and groups that hold the same are summed."
    )
    drawn = load_maps(Balance.of(*records.rank_loads), "rank", what)
    per_node = records.config.moe.ranks_per_node if records.config is not None else 0
    if 1 < per_node < num_ranks and num_ranks % per_node == 0:
        what = f"The same, summed over the {per_node} ranks of a node."
        drawn += load_maps(Balance.of(*records.rank_loads, together=per_node), "node", what)
    return drawn
