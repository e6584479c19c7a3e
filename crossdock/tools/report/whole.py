"""All layers of a model in one map, a row for each, at the time that a slider says.

The page's script takes the rows from the maps of the layers, which hold all times already.
"""

from __future__ import annotations

from html import escape

import numpy as np

from crossdock.tools.report.balance import Balance
from crossdock.tools.report.heat import image_url, row_pixels, row_ticks, to_indices
from crossdock.tools.report.numbers import steps_text

__all__ = ["whole_map"]


def whole_map(balance: Balance, thing: str) -> str:
    """Of every `thing` (`expert`) of every layer, at first the last column; nothing for a single layer.

    `panels` of the same balance must follow on the page.
    """
    columns, layers, things = balance.ratios.shape
    if layers == 1:
        return ""
    height = max(48, round(layers * row_pixels(layers)))
    when = steps_text(int(balance.first[-1]), int(balance.last[-1]))
    latest = balance.ratios[-1]
    known = np.nan_to_num(latest)
    layer, top = np.unravel_index(int(known.argmax()), known.shape)
    said = f"highest: layer {layer}, {thing} {top}, <b>{known[layer, top]:.2f}</b> &times; mean"
    label = (
        f"Load over the mean of each {thing} (across) in each layer (down), at the time of the slider below. "
        f"At {when} the highest is layer {layer}, {thing} {top} with {known[layer, top]:.2f}"
    )
    return (
        f'<figure class="whole" data-thing="{thing}"><figcaption><h3>All layers at a time</h3>'
        f'</figcaption><div class="readout">{when}: {said}</div>'
        f'<div class="plot map" id="whole-{thing}" tabindex="0" role="img" aria-label="{escape(label)}">'
        f'<img class="cells" alt="" style="height:{height}px" src="{image_url(to_indices(latest))}">'
        f'<svg class="axes" width="100%" height="{height}" aria-hidden="true" focusable="false">'
        f"{row_ticks(layers, height)}{_ticks(things, height)}</svg></div>"
        f'<label class="slider">time <input id="time-{thing}" type="range" min="0" max="{columns - 1}" '
        f'value="{columns - 1}" aria-valuetext="{when}" disabled><output>{when}</output></label></figure>'
    )


def _ticks(things: int, height: int) -> str:
    """Numbers across: at most some sixteen, so that they find room on a phone."""
    every = next(size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, things) if things / size <= 8)
    return "".join(
        f'<text class="tick middle" x="{(index + 0.5) / things * 100:.2f}%" y="{height + 17}">{index}</text>'
        for index in range(0, things, every)
    )
