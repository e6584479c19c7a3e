"""The results that were written, as one table.

python -m benchmarks.table [FILE.json ...]      the newest of each benchmark unless told
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.results_file import RESULTS


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    paths = [Path(name) for name in given] or newest(RESULTS)
    for missing in (path for path in paths if not path.is_file()):
        print(f"{missing}: there is no such file", file=sys.stderr)
        return 2
    console = Console(width=170, soft_wrap=True)
    for path in paths:
        document = json.loads(path.read_text())
        machine = document["machine"]
        where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
        versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
        console.print(table(f"{document['benchmark']}, {document['date']}, {where}; {versions}", document["rows"]))
    return 0


def newest(folder: Path) -> list[Path]:
    """The last file of each benchmark: names end in a date."""
    last = {path.stem.rpartition("_")[0]: path for path in sorted(folder.glob("*_????-??-??.json"))}
    return list(last.values())


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """A line per row; what a row does not have stays empty."""
    shown = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name in ("case", "figure", "unit", "beside", "figure there", "ratio", "middle half", "goal", "met"):
        shown.add_column(name, justify="left" if name in ("case", "unit", "beside") else "right")
    for row in rows:
        spread = row.get("spread")
        values = (
            " ".join(str(row[name]) for name in ("case", "variant") if name in row),
            *(row.get(name) for name in ("figure", "unit", "peer", "peer_figure", "ratio")),
            f"{spread['low']} to {spread['high']}" if isinstance(spread, dict) and "low" in spread else None,
            row.get("goal"),
            {True: "yes", False: "no"}.get(row.get("met")),  # type: ignore[call-overload]
        )
        shown.add_row(*("" if value is None else str(value) for value in values))
    return shown


if __name__ == "__main__":
    sys.exit(main())
