"""What the page says of recorded loads, those of experts and those of ranks alike: maps and tables."""

from __future__ import annotations

from crossdock.tools.report import heat
from crossdock.tools.report.balance import Balance, FinalLoad
from crossdock.tools.report.markup import cell, details, many, table
from crossdock.tools.report.numbers import steps_text
from crossdock.tools.report.whole import whole_map

__all__ = ["load_maps"]


def load_maps(balance: Balance, thing: str, what: str) -> str:
    """A text, the colours, a map for each layer, and tables.

    Args:
        balance: of the loads.
        thing: one of those that have a load, such as `expert`; unlike that of other maps on the page.
        what: a sentence or more on what is shown.
    """
    final = balance.final
    together = -(-balance.records // len(balance.first))
    text = (
        f"{what} The run recorded the global batch of {many(balance.records, 'step')}; a column is "
        f"{'one of them' if together == 1 else f'the sum of {together}'}. "
        f"Bars show the last quarter of the records ({steps_text(final.first, final.last)}) and are cut at "
        f"{heat.LONGEST_BAR:g} times the mean; the dashed line is the mean."
    )
    tables = _layer_table(final, thing) + _table_of_each(final, thing)
    return f"<p>{text}</p>{heat.legend(thing)}{whole_map(balance, thing)}{heat.panels(balance, thing)}{tables}"


def _layer_table(final: FinalLoad, thing: str) -> str:
    effective = final.effective_number()
    rows = []
    for layer, own in enumerate(final.known):
        ends = [f"{own[pick]:.2f} ({thing} {pick})" for pick in (int(own.argmax()), int(own.argmin()))]
        idle = str(int((final.routes[layer] == 0).sum()))
        rows.append([str(layer), *ends, idle, f"{effective[layer]:.1f} of {len(own)}"])
    caption = (
        f"The last quarter of the records, {steps_text(final.first, final.last)}. "
        f"Effective {thing}s: the exponential of the entropy of the {thing}s' shares."
    )
    head = ["layer", "most / mean", "least / mean", f"{thing}s without a token", f"effective {thing}s"]
    title = "Load of each layer" if thing == "expert" else f"Load of each layer's {thing}s"
    return details(title, table(caption, head, rows))


def _table_of_each(final: FinalLoad, thing: str) -> str:
    layers, things = final.ratios.shape
    rows = [
        [str(one), *(cell(round(float(final.ratios[layer, one]), 2)) for layer in range(layers))]
        for one in range(things)
    ]
    caption = f"Load over the mean of the layer, {steps_text(final.first, final.last)}."
    head = [thing, *(f"layer {layer}" for layer in range(layers))]
    return details(f"Load of each {thing}", table(caption, head, rows))
