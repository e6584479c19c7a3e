"""Heat maps of load: a row per expert or rank, a column per time, coloured by load over the mean.

A map is one SVG `<image>`, a PNG of a pixel per cell: a big model has a million cells, too many for their own shapes.
The pixels are indices into one palette, from which the page's script reads the values back. On a dark page a CSS filter
turns the lightness around and keeps the hue.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from html import escape

import numpy as np

from crossdock.tools.report.balance import Balance
from crossdock.tools.report.numbers import steps_text, ticks

__all__ = ["LONGEST_BAR", "PALETTE", "image_url", "legend", "panels", "row_pixels", "row_ticks", "to_indices"]

# log2 of the load over the mean is in steps of a tenth, from an eighth of the mean to eight times the mean.
_RANGE = 3.0
_STEPS_PER_DOUBLING = 10
_LEVELS = 2 * int(_RANGE * _STEPS_PER_DOUBLING) + 1
# A bar of the last quarter is cut at this load over the mean.
LONGEST_BAR = 4.0
_UNKNOWN, _NONE, _FIRST = 0, 1, 2
# Blue and orange differ for every kind of colour vision; from the mean outwards.
_BELOW = ["#f8f8f7", "#d3e5f2", "#92c0e0", "#4a90c8", "#1f5f9f"]
_ABOVE = ["#f8f8f7", "#fde3c0", "#fbb76a", "#e37a1c", "#a8460a"]


def _between(stops: list[str], share: float) -> tuple[int, int, int]:
    """The colour at `share` (0 to 1) of the way along `stops`."""
    place = share * (len(stops) - 1)
    index = min(int(place), len(stops) - 2)
    one, two = (bytes.fromhex(stop[1:]) for stop in stops[index : index + 2])
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(one, two, strict=True))
    return red, green, blue


def _colour(level: int) -> tuple[int, int, int]:
    away = (level - _LEVELS // 2) / (_LEVELS // 2)
    # Steeper near the mean, where good routers live.
    return _between(_ABOVE if away > 0 else _BELOW, abs(away) ** 0.8)


# No record, no token, then one colour for each level.
PALETTE: list[tuple[int, int, int]] = [(200, 200, 200), (0, 0, 0), *(_colour(level) for level in range(_LEVELS))]


def to_indices(ratios: np.ndarray) -> np.ndarray:
    """Palette indices, uint8, of loads over the mean of any shape; NaN is no record."""
    with np.errstate(divide="ignore"):
        levels = np.rint((np.log2(ratios) + _RANGE) * _STEPS_PER_DOUBLING)
    indices = np.where(np.isfinite(levels), np.clip(levels, 0, _LEVELS - 1) + _FIRST, _UNKNOWN)
    return np.where(ratios == 0, _NONE, indices).astype(np.uint8)


def image_url(pixels: np.ndarray) -> str:
    """A palette PNG of `pixels` `[height, width]`, indices into `PALETTE`, as a `data:` address."""
    height, width = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1)  # each row has filter type 0
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": bytes(channel for colour in PALETTE for channel in colour),
        b"IDAT": zlib.compress(rows.tobytes(), 9),
        b"IEND": b"",
    }
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
    encoded = base64.b64encode(b"\x89PNG\r\n\x1a\n" + body)
    return f"data:image/png;base64,{encoded.decode()}"


def panels(balance: Balance, thing: str) -> str:
    """A panel for each layer, after one with the busiest `thing` (`expert`) of every layer."""
    layers, rows = balance.ratios.shape[1:]
    prefix = "" if thing == "expert" else f"{thing}-"
    # A layer without a route in a column has no busiest expert.
    busiest = np.fmax.reduce(balance.ratios, axis=2)
    final_busiest = np.fmax.reduce(balance.final.ratios, axis=1)
    drawn = []
    # Bars share one scale, so that panels can be compared; a collapsed layer must not flatten the others.
    longest = float(np.clip(balance.final.known.max(), 2.0, LONGEST_BAR))
    if layers > 1:
        title = f"Busiest {thing} of each layer"
        drawn.append(_panel(title, "layer", busiest, final_busiest, balance, longest, f"{prefix}overview"))
    for layer in range(layers):
        final = balance.final.ratios[layer]
        ratios, key = balance.ratios[:, layer], f"{prefix}{layer}"
        drawn.append(_panel(f"Layer {layer}", thing, ratios, final, balance, longest, key))
    columns = json.dumps(
        [[int(a), int(b)] for a, b in zip(balance.first, balance.last, strict=True)], separators=(",", ":")
    )
    palette = json.dumps([list(colour) for colour in PALETTE], separators=(",", ":"))
    values = json.dumps([_meaning(index) for index in range(len(PALETTE))])
    wide = " wide" if rows > 16 and layers == 1 else ""
    return (
        f'<div class="panels{wide}" data-columns="{columns}" data-palette="{palette}" '
        f'data-values="{escape(values)}">{"".join(drawn)}</div>'
    )


def _meaning(index: int) -> str:
    if index == _UNKNOWN:
        return "no tokens in this layer"
    if index == _NONE:
        return "no tokens"
    level = index - _FIRST
    ratio = 2 ** (level / _STEPS_PER_DOUBLING - _RANGE)
    bound = "at most " if level == 0 else "at least " if level == _LEVELS - 1 else ""
    return f"{bound}{ratio:.2f} \N{MULTIPLICATION SIGN} mean"


def _panel(
    title: str, row: str, ratios: np.ndarray, final: np.ndarray, balance: Balance, longest: float, key: str
) -> str:
    """One map: `ratios` `[C, rows]` over time, with bars of the `final` `[rows]` at its right."""
    columns, rows = ratios.shape
    height = max(48, round(rows * row_pixels(rows)))
    image = image_url(to_indices(ratios.T))
    known = np.nan_to_num(final)
    top = int(known.argmax())
    readout = f"last quarter: {row} {top} highest, <b>{known[top]:.2f}</b> &times; mean"
    label = (
        f"{title}: load over the mean per {row}, {steps_text(int(balance.first[0]), int(balance.last[-1]))}. "
        f"Last quarter: highest {row} {top} with {known[top]:.2f}, lowest {row} {known.argmin()} with {known.min():.2f}"
    )
    kind = "panel overview" if key.endswith("overview") else "panel"
    return (
        f'<figure class="{kind}" data-panel="{key}" data-row="{row}" data-rows="{rows}">'
        f'<figcaption><h3>{title}</h3></figcaption><div class="readout">{readout}</div>'
        f'<div class="heat"><div class="plot map" id="map-{key}" tabindex="0" role="img" aria-label="{escape(label)}">'
        f'<svg class="cells" width="100%" height="{height}" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" '
        f'aria-hidden="true" focusable="false"><image width="{columns}" height="{rows}" preserveAspectRatio="none" '
        f'href="{image}"/></svg>'
        f'<svg class="axes" width="100%" height="{height}" aria-hidden="true" focusable="false">'
        f"{row_ticks(rows, height)}{_time_ticks(balance, height)}"
        f'<line class="cursor" y1="0" y2="{height}" visibility="hidden"/></svg></div>'
        f"{_profile(known, longest, height)}</div></figure>"
    )


def row_pixels(rows: int) -> float:
    """The height of a row of a map."""
    return next((pixels for most, pixels in ((8, 16), (16, 12), (32, 7), (64, 4), (128, 2)) if rows <= most), 1.25)


def row_ticks(rows: int, height: int) -> str:
    """The numbers of a map's rows, as many as find room."""
    if rows <= 8:
        every = 1
    else:
        every = next(size for size in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, rows) if rows / size * 18 <= height)
    return "".join(
        f'<text class="tick end" x="-6" y="{(index + 0.5) * height / rows + 4:.1f}">{index}</text>'
        for index in range(0, rows, every)
    )


def _time_ticks(balance: Balance, height: int) -> str:
    columns = len(balance.first)
    if columns == 1:
        places = [(0.5, f"{int(balance.last[0]):,}")]
    else:
        middles = (balance.first + balance.last) / 2
        centres = (np.arange(columns) + 0.5) / columns
        marks = ticks(float(middles[0]), float(middles[-1]), 4, whole=True)
        places = [(float(np.interp(step, middles, centres)), label) for step, label in marks]
    parts = []
    for place, label in places:
        x = place * 100
        parts.append(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="{height}" y2="{height + 4}"/>')
        parts.append(f'<text class="tick middle" x="{x:.2f}%" y="{height + 17}">{label}</text>')
    return "".join(parts)


def _profile(final: np.ndarray, longest: float, height: int) -> str:
    """Bars of the last quarter in the rows of the map, a line at the mean; bars beyond `longest` are cut."""
    gap = 0.12 if len(final) <= 32 else 0.0
    bars = "".join(
        f"M0 {row + gap:g}H{min(float(value), longest):.2f}V{row + 1 - gap:g}H0z" for row, value in enumerate(final)
    )
    mean = 100 / longest
    return (
        f'<div class="plot profile"><svg width="100%" height="{height}" aria-hidden="true" focusable="false">'
        f'<svg width="100%" height="100%" viewBox="0 0 {longest:g} {len(final)}" preserveAspectRatio="none">'
        f'<path class="bars" d="{bars}"/></svg>'
        f'<line class="mean" x1="{mean:.1f}%" x2="{mean:.1f}%" y1="0" y2="{height}"/>'
        f'<text class="tick middle" x="{mean:.1f}%" y="{height + 17}">1</text>'
        f'<text class="tick end" x="100%" y="{height + 17}">{longest:.2g} &times;</text></svg></div>'
    )


def legend(thing: str) -> str:
    """The colour scale with its numbers, of the maps for each `thing`."""
    marks = (0.125, 0.25, 0.5, 1, 2, 4, 8)
    swatches = "".join(
        f'<stop offset="{place / 40:.3f}" stop-color="#{bytes(_colour(round(place / 40 * (_LEVELS - 1)))).hex()}"/>'
        for place in range(41)
    )
    labels = "".join(
        f'<text class="tick middle" x="{(np.log2(mark) + _RANGE) / (2 * _RANGE) * 100:.2f}%" y="30">{name}</text>'
        for mark, name in zip(marks, ("⅛", "¼", "½", "1", "2", "4", "8"), strict=True)
    )
    return (
        '<div class="scale" role="img" aria-label="Colours: blue is below the mean of the layer, orange above it; the '
        'swatch is no tokens"><span class="none"><i></i>no tokens</span><span class="ramp">'
        '<svg class="cells" width="100%" height="14" aria-hidden="true"><defs>'
        f'<linearGradient id="ramp-{thing}">'
        f'{swatches}</linearGradient></defs><rect width="100%" height="14" fill="url(#ramp-{thing})"/></svg>'
        f'<svg class="axes" width="100%" height="14" aria-hidden="true">{labels}</svg></span>'
        '<span class="unit">times the mean load of the layer</span></div>'
    )
