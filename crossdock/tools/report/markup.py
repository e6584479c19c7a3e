"""Pieces of pages: tables behind their titles, bars beside their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from crossdock.tools.report.numbers import short

__all__ = ["DASH", "Bar", "bars", "cell", "details", "many", "section", "table"]

DASH = "\N{EN DASH}"
"""Where there is no value."""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column names the rows."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"


def details(title: str, content: str) -> str:
    """`content` behind its title."""
    return f'<details><summary>{title}</summary><div class="scroll" tabindex="0">{content}</div></details>\n'


def cell(value: float) -> str:
    """A number in a table; a dash where there is none."""
    return short(value) if np.isfinite(value) else "&ndash;"


def many(number: int, thing: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


@dataclass(frozen=True)
class Bar:
    """A row of `bars`.

    Attributes:
        name: for people.
        parts: lengths of its pieces, 0 or more.
        values: texts beside it.
    """

    name: str
    parts: Sequence[float]
    values: Sequence[str]


def bars(caption: str, head: Sequence[str], rows: Sequence[Bar], parts: Sequence[str] = ()) -> str:
    """A table with a bar in each row, the longest over the whole width.

    Args:
        caption: what it shows; text.
        head: of the first column and those of values; text.
        rows: their names and values are text, too.
        parts: names of the pieces of which bars are made, where these are several.
    """
    longest = max((sum(row.parts) for row in rows), default=0.0) or 1.0
    name, *others = (f'<th scope="col">{escape(text)}</th>' for text in head)
    legend = "".join(f'<span class="key s{index}">{escape(part)}</span>' for index, part in enumerate(parts))
    body = "".join(
        f'<tr><th scope="row">{escape(row.name)}</th><td class="bar"><span>'
        + "".join(f'<i class="s{index}" style="width:{100 * part / longest:.2f}%"></i>' for index, part in _shown(row))
        + f"</span></td>{''.join(f'<td>{escape(value)}</td>' for value in row.values)}</tr>"
        for row in rows
    )
    # Beside the table and not in it: on a phone the table is wider than the page, and the text need not be.
    said = f'<p class="said">{escape(caption)}{f"<span class=legend>{legend}</span>" if legend else ""}</p>'
    return (
        f'<div class="scroll flat" tabindex="0">{said}<table class="bars" aria-label="{escape(caption)}">'
        f"<thead><tr>{name}<td></td>{''.join(others)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _shown(row: Bar) -> list[tuple[int, float]]:
    return [(index, part) for index, part in enumerate(row.parts) if part > 0]


def section(title: str, content: str) -> str:
    """A part of the page, under a title that its table of contents names; nothing without content."""
    key = title.lower().replace(" ", "-")
    return f'<section id="{escape(key)}"><h2>{escape(title)}</h2>{content}</section>\n' if content else ""
