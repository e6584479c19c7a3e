"""Pieces of the page: tables behind their titles."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from crossdock.tools.report.numbers import short

__all__ = ["cell", "details", "many", "table"]


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
