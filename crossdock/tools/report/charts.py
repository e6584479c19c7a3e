"""Line charts over the steps of a run, as SVG that keeps its type size at any width.

An SVG without a viewBox, in which x is a percentage and y a pixel, holds the text and the marks; one inside it,
stretched to its size, holds the curves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from crossdock.tools.report.numbers import log_ticks, short, steps_text, ticks

__all__ = ["COLUMNS", "MOST_SERIES", "Chart", "Marks", "Series", "Thinned", "draw", "thin"]

# Across a chart; more would be narrower than the pixels of most screens, and the file grows with them.
COLUMNS = 500
# Colours, with dashes beside them, that can be told apart.
MOST_SERIES = 8
_MARKS = 150
# All names of a chart, in letters, that find room on one line with their values.
_SHORT_NAMES = 30
# Of the stretched SVG.
_WIDTH = 1000
# From where on a linear axis would hide all but the largest values.
_LOG_RATIO = 25


@dataclass(frozen=True)
class Thinned:
    """A metric over columns of steps, `[C]` each: a column's first and last step, mean, least and greatest value.

    `breaks` `[C]` bool: steps without a value lie before it.
    """

    first: np.ndarray
    last: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    breaks: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def thin(steps: np.ndarray, values: np.ndarray, columns: int = COLUMNS) -> Thinned:
    """At most `columns` points of `values` `[S]` at `steps` `[S]`, without losing a spike; NaN is no value."""
    span = int(steps[-1] - steps[0]) + 1
    column = (steps - steps[0]) * columns // span if span > columns else steps - steps[0]
    finite = np.isfinite(values)
    missing = np.cumsum(~finite)[finite]
    column, steps, values = column[finite], steps[finite], values[finite]
    if not len(steps):
        empty = np.empty(0)
        return Thinned(empty, empty, empty, empty, empty, empty.astype(bool))
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    ends = np.append(starts[1:], len(steps)) - 1
    mean = np.add.reduceat(values, starts) / (ends - starts + 1)
    breaks = np.diff(missing[starts], prepend=missing[0]) > 0
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return Thinned(steps[starts], steps[ends], mean, low, high, breaks)


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: for people.
        points: the curve.
        latest: step and value of the last measurement.
        sparse: measured now and then, so that its points are joined and shown.
        colour: its number; that of its place among the chart's series if `None`.
    """

    name: str
    points: Thinned
    latest: tuple[int, float]
    sparse: bool = False
    colour: int | None = None

    @classmethod
    def of(
        cls, name: str, steps: np.ndarray, values: np.ndarray, columns: int = COLUMNS, colour: int | None = None
    ) -> Series:
        """Of `values` `[S]` at `steps` `[S]`, of which one or more are finite, in so many `columns` at most."""
        measured = np.isfinite(values)
        last = np.flatnonzero(measured)[-1]
        latest = int(steps[last]), float(values[last])
        # What is measured now and then has gaps that are none.
        return cls(name, thin(steps, values, columns), latest, bool(measured.mean() < 0.5), colour)


@dataclass(frozen=True)
class Marks:
    """Steps that triangles mark.

    Attributes:
        steps: `[K]`, any number.
        text: what happened there, for people.
        kind: their style's name.
    """

    steps: np.ndarray
    text: str = "skipped"
    kind: str = "skipped"


@dataclass(frozen=True)
class Chart:
    """What one chart shows.

    Attributes:
        key: of the metric, for the page's script and tests.
        title, unit: for people; the unit may be empty.
        series: one to `MOST_SERIES`, each with a point or more.
        span: first and last step of the run.
        base: a value that the axis starts at; `None` fits it to the curve.
        logarithmic: draw on a logarithmic axis where the values ask for it.
        marks: steps to be marked.
        height: of the plot, pixels.
    """

    key: str
    title: str
    unit: str
    series: Sequence[Series]
    span: tuple[int, int]
    base: float | None = None
    logarithmic: bool = False
    marks: Marks | None = None
    height: int = 150


class _Axis:
    """Where a value lies on a plot of some height."""

    def __init__(self, low: float, high: float, height: int, *, logarithmic: bool) -> None:
        self.low, self.high, self.height, self.logarithmic = low, high, height, logarithmic

    def y(self, value: np.ndarray | float) -> np.ndarray:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = np.log(value), math.log(low), math.log(high)
        return self.height * (1 - (np.asarray(value) - low) / (high - low))

    def ticks(self) -> list[tuple[float, str]]:
        if self.logarithmic:
            return log_ticks(self.low, self.high)
        return ticks(self.low, self.high, 5 if self.height > 200 else 4)


def _axis(chart: Chart) -> _Axis:
    low = min(float(series.points.low.min()) for series in chart.series)
    high = max(float(series.points.high.max()) for series in chart.series)
    if chart.logarithmic and low > 0 and high / low > _LOG_RATIO:
        room = (high / low) ** 0.04
        return _Axis(low / room, high * room, chart.height, logarithmic=True)
    if chart.base is not None:
        low = min(low, chart.base)
    # Below the rounding of float32 there is nothing to see.
    room = 0.06 * (high - low) if high - low > 1e-7 * abs(high) else 0.05 * (abs(high) or 1.0)
    return _Axis(low if low == chart.base else low - room, high + room, chart.height, logarithmic=False)


def draw(chart: Chart) -> str:
    """The chart as a `<figure>`."""
    axis = _axis(chart)
    shown = chart.series
    colours = [index if series.colour is None else series.colour for index, series in enumerate(shown)]
    lines = "".join(_curve(series, colour, chart.span, axis) for series, colour in zip(shown, colours, strict=True))
    dots = "".join(_dots(series, colour, chart.span, axis) for series, colour in zip(shown, colours, strict=True))
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    scale = " <small>log scale</small>" if axis.logarithmic else ""
    keys = zip(shown, colours, strict=True)
    names = "".join(f'<span class="key s{colour}">{escape(series.name)}</span>' for series, colour in keys)
    legend = f'<span class="legend">{names}</span>' if len(shown) > 1 else ""
    return (
        f'<figure class="chart" data-chart="{escape(chart.key)}" data-points="{escape(_data(shown))}">'
        f"<figcaption><h3>{escape(chart.title)}{unit}{scale}</h3>{legend}</figcaption>"
        f"{_readout(shown)}"
        f'<div class="plot line" id="chart-{escape(chart.key)}" tabindex="0" role="img" '
        f'aria-label="{escape(_description(chart, shown))}">'
        f'<svg width="100%" height="{chart.height}" aria-hidden="true" focusable="false">{_grid(chart, axis)}'
        f'<svg width="100%" height="100%" viewBox="0 0 {_WIDTH} {chart.height}" preserveAspectRatio="none">'
        f"{lines}</svg>{dots}{_marks(chart)}"
        f'<line class="cursor" y1="0" y2="{chart.height}" visibility="hidden"/></svg></div></figure>'
    )


def _share(step: np.ndarray | float, span: tuple[int, int]) -> np.ndarray:
    """Where a step lies from left (0) to right (1)."""
    first, last = span
    return (np.asarray(step, dtype=float) - first) / (last - first) if last > first else np.full(np.shape(step), 0.5)


def _x(points: Thinned, span: tuple[int, int]) -> np.ndarray:
    return _WIDTH * _share((points.first + points.last) / 2, span)


def _segments(series: Series) -> list[slice]:
    """Runs of columns without a break."""
    points = series.points
    starts = [0] if series.sparse else [0, *np.flatnonzero(points.breaks).tolist()]
    starts = sorted(set(starts))
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(points)], strict=True)]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in zip(x.tolist(), y.tolist(), strict=True))


def _curve(series: Series, index: int, span: tuple[int, int], axis: _Axis) -> str:
    points, x = series.points, _x(series.points, span)
    band, line = "", ""
    for part in _segments(series):
        line += _path(x[part], axis.y(points.mean[part]))
        if (points.first[part] != points.last[part]).any():
            around = np.concatenate([points.high[part], points.low[part][::-1]])
            band += _path(np.concatenate([x[part], x[part][::-1]]), axis.y(around)) + "Z"
    drawn = f'<path class="band s{index}" d="{band}"/>' if band else ""
    return f'{drawn}<path class="curve s{index}" d="{line}"/>'


def _dots(series: Series, index: int, span: tuple[int, int], axis: _Axis) -> str:
    """A line of one point is invisible; sparse measurements are marked while they are few."""
    every = series.sparse and len(series.points) <= 60
    parts = [part for part in _segments(series) if every or part.stop - part.start == 1]
    x, y = _x(series.points, span) / _WIDTH * 100, axis.y(series.points.mean)
    places = [place for part in parts for place in range(part.start, part.stop)]
    return "".join(f'<circle class="s{index}" cx="{x[i]:.2f}%" cy="{y[i]:.1f}" r="2.5"/>' for i in places)


def _grid(chart: Chart, axis: _Axis) -> str:
    parts = []
    for value, label in axis.ticks():
        y = float(axis.y(value))
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="-8" y="{y + 4:.1f}">{label}</text>')
    first, last = chart.span
    marks = ticks(first, last, 5, whole=True)
    if marks[0][0] - first > 0.1 * (last - first):
        marks = [(first, f"{first:,}"), *marks]
    for value, label in marks:
        x = float(_share(value, chart.span)) * 100
        parts.append(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="{chart.height}" y2="{chart.height + 4}"/>')
        parts.append(f'<text class="tick middle" x="{x:.2f}%" y="{chart.height + 17}">{label}</text>')
    return "".join(parts)


def _marks(chart: Chart) -> str:
    """A triangle at the top for marked steps; neighbours share one."""
    if chart.marks is None or not len(chart.marks.steps):
        return ""
    marked, (first, last) = chart.marks.steps, chart.span
    places = (marked - first) * _MARKS // (last - first + 1) if last - first >= _MARKS else marked
    parts = []
    for place in np.unique(places):
        steps = marked[places == place]
        x = float(_share(float(steps.mean()), chart.span)) * 100
        text = steps_text(int(steps[0]), int(steps[-1]))
        many = f", {len(steps)} of them" if len(steps) not in (1, steps[-1] - steps[0] + 1) else ""
        parts.append(
            f'<svg class="mark {chart.marks.kind}" x="{x:.2f}%" overflow="visible">'
            f"<title>{text}{many}: {escape(chart.marks.text)}</title>"
            f'<line y2="{chart.height}"/><path d="M-4.5-7h9L0 0z"/></svg>'
        )
    return "".join(parts)


def _data(shown: Sequence[Series]) -> str:
    """For the page's script: each curve's name and its points, `[step, value]` or `[first, last, mean, low, high]`."""
    return json.dumps([{"name": s.name, "points": _rows(s.points)} for s in shown], separators=(",", ":"))


def _rows(points: Thinned) -> list[list[float]]:
    rows = []
    for i in range(len(points)):
        first, last = int(points.first[i]), int(points.last[i])
        mean, low, high = (float(f"{values[i]:.4g}") for values in (points.mean, points.low, points.high))
        rows.append([first, mean] if first == last else [first, last, mean, low, high])
    return rows


def _readout(shown: Sequence[Series]) -> str:
    """The last values, as long as nobody points at a step; of long names, each on a line of its own."""
    if len(shown) == 1:
        step, value = shown[0].latest
        return f'<div class="readout">step {step:,}: <b>{short(value)}</b></div>'
    if sum(len(s.name) for s in shown) > _SHORT_NAMES:
        lines = "\n".join(f"<b>{short(s.latest[1])}</b> {escape(s.name)}, step {s.latest[0]:,}" for s in shown)
        return f'<div class="readout lines" style="height:{20 * len(shown)}px">{lines}</div>'
    said = " · ".join(f"{escape(s.name)} <b>{short(s.latest[1])}</b> at step {s.latest[0]:,}" for s in shown)
    return f'<div class="readout">{said}</div>'


def _description(chart: Chart, shown: Sequence[Series]) -> str:
    unit = f" {chart.unit}" if chart.unit else ""
    parts = []
    for series in shown:
        points = series.points
        name = f"{series.name}: " if len(shown) > 1 else ""
        parts.append(
            f"{name}{short(float(points.mean[0]))}{unit} at {steps_text(int(points.first[0]), int(points.last[0]))}, "
            f"{short(series.latest[1])}{unit} at step {series.latest[0]:,}, "
            f"least {short(float(points.low.min()))}, greatest {short(float(points.high.max()))}"
        )
    marked = len(chart.marks.steps) if chart.marks is not None else 0
    if marked and chart.marks is not None:
        parts.append(f"{chart.marks.text} at {marked} step{'s' * (marked > 1)}")
    return f"{chart.title}. {'; '.join(parts)}"
