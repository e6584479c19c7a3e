"""What a person sees of a sweep: how it goes on, and a table at the end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from crossdock.tools.tune.dimensions import Dimension
from crossdock.tools.tune.sweep import Outcome, Row

__all__ = ["SweepDisplay", "outcome_table", "output_console", "remarks"]


# Of a file or a pipe, which have none of their own: the table fits.
_WIDTH = 120


def output_console() -> Console:
    """Standard output, as wide as it is."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


class SweepDisplay:
    """A progress bar on a terminal, else a plain line for each setting that is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()

    def measured(self, name: str, value: Any, done: int, most: int) -> None:
        """A measurement is made, `done` of `most` at most."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{name} = {value}", completed=done, total=most)

    def say(self, message: str) -> None:
        """A line, above the bar where there is one."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        self._console.print(table)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, visible=False)
            self._bar.stop()


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each candidate."""
    title = "Forward and backward on the slowest rank; speed beside the default, and its middle half"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in ("setting", "value"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "speed", "rounds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for outcome in outcomes:
        for number, row in enumerate(outcome.rows):
            last = number + 1 == len(outcome.rows)
            table.add_row(*_cells(outcome, row, "" if number else outcome.dimension.name), end_section=last)
    return table


def remarks(outcomes: Sequence[Outcome], skipped: Sequence[Dimension]) -> list[str]:
    """A line for each setting that was not swept, and each candidate that was measured no more: why."""
    lines = [f"{dimension.name}: skipped, {dimension.skipped}" for dimension in skipped]
    rows = ((outcome.dimension.name, row) for outcome in outcomes for row in outcome.rows)
    return lines + [f"{name} = {row.value}: {row.note}" for name, row in rows if row.note]


def _cells(outcome: Outcome, row: Row, name: str) -> list[str]:
    is_default = row is outcome.rows[0]
    notes = ["default"] if is_default else []
    if row.value == outcome.chosen:
        notes.append("chosen" if outcome.finished else "stays")
    elif outcome.dimension.lossy and not is_default:
        notes.append("changes numbers")
    if row.note:
        notes.append("see below")
    milliseconds = f"{1000 * statistics.median(row.seconds):.3f}" if row.seconds else ""
    speed = row.speed
    beside = "" if speed is None or is_default else f"{speed.median:.3f} ({speed.low:.3f} to {speed.high:.3f})"
    return [name, str(row.value), milliseconds, beside, str(len(row.seconds)), ", ".join(notes)]
