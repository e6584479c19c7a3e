"""The bench as a page: bars of bytes and of time, and a timeline of each case."""

from __future__ import annotations

from html import escape

from crossdock.tools.bench import table as text
from crossdock.tools.bench.outcome import PARTS, Bench, Outcome
from crossdock.tools.report.document import document
from crossdock.tools.report.markup import Bar, bars, details, section, table
from crossdock.tools.report.numbers import size, ticks
from crossdock.tools.report.page import footer

__all__ = ["bench_page"]

_ROW_PIXELS = 14


def bench_page(bench: Bench) -> str:
    """One HTML document."""
    title = f"Moving tokens: {bench.workload.num_ranks:,} ranks, {bench.workload.num_experts:,} experts"
    facts = "".join(f"<span>{escape(fact)}</span>" for fact in bench.facts)
    content = (
        f'<header><h1>{escape(title)}</h1><p>{escape(text.subject(bench))}</p><p class="facts">{facts}</p></header>\n'
        f"{section('Bytes', _bytes(bench))}"
        f"{section('Time', _times(bench))}"
        f"{section('Timeline', _timelines(bench))}"
        f"{section('What each case does', _cases(bench))}"
        f"{footer(bench.notes)}"
    )
    return document(title, content, (0, 0))


def _bytes(bench: Bench) -> str:
    shown = []
    for outcome, row in zip(bench.outcomes, text.rows(bench), strict=True):
        traffic = outcome.traffic
        parts = [float(number) for number in (traffic.within, traffic.between, traffic.metadata)]
        shown.append(Bar(outcome.case.name, parts, [size(sum(parts)), row[4]]))
    caption = (
        "Bytes of a forward and a backward pass that all ranks send to others: tokens, results, the gradients of both, "
        "and what goes along."
    )
    kinds = ("within nodes", "between nodes", "counts, ids and weights")
    return bars(caption, ["case", "in all", "rows, of plain"], shown, kinds)


def _times(bench: Bench) -> str:
    shown = []
    for outcome, row in zip(bench.outcomes, text.rows(bench), strict=True):
        spread = "" if outcome.spread is None else f"{outcome.spread[0]:.3f} to {outcome.spread[2]:.3f}"
        values = [f"{row[5]} ms", row[6], *([spread] if bench.measured else []), row[7]]
        shown.append(Bar(outcome.case.name, [outcome.seconds], values))
    how = (
        "the median of rounds in which each case had its turn, and the middle half of its ratios to the plain one"
        if bench.measured
        else "computed from the bytes and the speeds that are assumed above"
    )
    head = ["case", "time", "of plain", *(["middle half"] if bench.measured else []), "busiest rank / mean"]
    moved = next((outcome.moves for outcome in bench.outcomes if outcome.moves is not None), None)
    note = ""
    if moved is not None:
        note = (
            f'<p class="note">Placing experts by their loads once: {moved.experts:,} are fetched by other ranks, '
            f"{size(moved.bytes)} of weights.</p>"
        )
    return bars(f"Time of a forward and a backward pass on the slowest rank: {how}.", head, shown) + note


def _timelines(bench: Bench) -> str:
    longest = max(segment.end for one in bench.outcomes for own in one.timeline.values() for segment in own)
    keys = "".join(f'<span class="key block s{index}">{part}</span>' for index, part in enumerate(PARTS))
    how = (
        "The forward pass of one more round, by the clock of each rank: waiting for other ranks counts where it waits."
        if bench.measured
        else "The forward pass as computed; of many ranks sixteen, from the least to the most loaded."
    )
    drawn = "".join(_timeline(outcome, longest) for outcome in bench.outcomes)
    return f'<p>{how}</p><p class="legend">{keys}</p><div class="charts even">{drawn}</div>'


def _timeline(outcome: Outcome, longest: float) -> str:
    """A row per rank, all cases on one scale."""
    height = _ROW_PIXELS * len(outcome.timeline)
    shapes, labels = [], []
    for place, (rank, segments) in enumerate(outcome.timeline.items()):
        top = place * _ROW_PIXELS
        labels.append(f'<text class="tick end" x="-6" y="{top + 11}">{rank}</text>')
        for part, begin, end in segments:
            said = f"rank {rank}, {PARTS[part]}: {text.milliseconds(begin)} to {text.milliseconds(end)} ms"
            shapes.append(
                f'<rect class="s{part}" x="{100 * begin / longest:.2f}%" y="{top + 1}" '
                f'width="{100 * (end - begin) / longest:.2f}%" height="{_ROW_PIXELS - 2}"><title>{said}</title></rect>'
            )
    marks = "".join(
        f'<text class="tick middle" x="{100 * value / (1000 * longest):.2f}%" y="{height + 17}">{label}</text>'
        for value, label in ticks(0, 1000 * longest, 4)
    )
    ended = max(segments[-1].end for segments in outcome.timeline.values())
    spoken = f"{outcome.case.name}: the last of these ranks has its results after {text.milliseconds(ended)} ms"
    name = escape(outcome.case.name)
    return (
        f'<figure class="timeline"><figcaption><h3>{name} <small>ms, by rank</small></h3></figcaption>'
        f'<div class="plot line" role="img" aria-label="{escape(spoken)}" tabindex="0">'
        f'<svg width="100%" height="{height}">{"".join(labels)}{"".join(shapes)}{marks}</svg></div></figure>'
    )


def _cases(bench: Bench) -> str:
    what = [[escape(outcome.case.name), escape(outcome.case.what)] for outcome in bench.outcomes]
    shown = f'<div class="words">{table("Cases", ["case", "what"], what)}</div>'
    cells = [[escape(cell) for cell in row] for row in text.rows(bench)]
    return f'<div class="scroll flat" tabindex="0">{shown}</div>' + details(
        "All figures", table("Bytes of all ranks, times of the slowest.", list(text.HEAD), cells)
    )
