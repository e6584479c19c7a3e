"""What the page says of the time of a step: where it goes."""

from __future__ import annotations

import numpy as np

from crossdock.tools.report.curves import charts
from crossdock.tools.report.markup import Bar, bars
from crossdock.tools.report.numbers import short
from crossdock.tools.report.records import RunRecords

__all__ = ["PARTS", "times_section"]

# Metrics that add up to `step_seconds`, in the order of a step, for people.
PARTS: tuple[tuple[str, str], ...] = (
    ("data_seconds", "reading data"),
    ("agreement_seconds", "agreeing with other ranks"),
    ("forward_seconds", "forward, but for MoE layers"),
    ("backward_seconds", "backward, but for MoE layers"),
    ("router_seconds", "MoE: router"),
    ("dispatch_seconds", "MoE: dispatch"),
    ("experts_seconds", "MoE: experts"),
    ("combine_seconds", "MoE: combine"),
    ("optimizer_seconds", "gradient norm, optimizer"),
    ("balance_seconds", "moving experts"),
    ("other_seconds", "validation, files, checkpoints"),
)
_STEP = "step_seconds"
# Not the pauses and stalls, which are in the parts above or are told of elsewhere.
_CURVES = (_STEP, "replica_wait_seconds")


def times_section(records: RunRecords) -> str:
    """Bars of the parts of a step, and the step's time over the run; nothing for a run that did not record them."""
    if not records.has(_STEP):
        return ""
    total = float(np.nanmean(records.column(_STEP)))
    rows = []
    for key, name in PARTS:
        values = records.column(key)
        if not np.isfinite(values).any() or not np.nanmax(values) > 0:
            continue
        mean, median = float(np.nanmean(values)), float(np.nanmedian(values))
        largest = int(np.nanargmax(values))
        most = f"{short(float(values[largest]))} at step {int(records.steps[largest]):,}"
        rows.append(Bar(name, [mean], [short(mean), f"{100 * mean / total:.1f}" if total else "", short(median), most]))
    caption = (
        f"A step of this run took {short(total)} s, the mean, from one line of metrics to the next. By the main thread "
        "of the rank that writes them: waiting for other ranks counts where it waits."
    )
    on_gpu = records.has("mfu")
    note = (
        '<p class="note">On a GPU the main thread runs ahead of the device: this is where it waited.</p>'
        if on_gpu
        else ""
    )
    shown = bars(caption, ["part", "s per step", "%", "median s", "longest s"], rows)
    return f'{shown}{note}<div class="charts even">{"".join(charts(records, _CURVES))}</div>'
