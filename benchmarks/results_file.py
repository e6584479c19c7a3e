"""What every benchmark writes: a dated JSON file with the machine, the versions and a row per case."""

from __future__ import annotations

import json
import statistics
from datetime import date
from pathlib import Path
from typing import Any

from crossdock.tools.doctor import installed_versions, machine_facts

__all__ = ["RESULTS", "result_row", "spread", "write_results"]

RESULTS = Path(__file__).parent / "results"


def write_results(benchmark: str, packages: list[str], rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Write `folder/BENCHMARK_DATE.json`; `packages` are named with their versions.

    Rows of the same day, machine and versions stay, but for the cases that `rows` have measured anew.
    """
    document: dict[str, Any] = {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "machine": machine_facts(),
        "versions": installed_versions(packages),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}_{document['date']}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = before.pop("rows", [])
    measured = {row["case"] for row in rows}
    if before != document:
        kept = []
    document["rows"] = [row for row in kept if row["case"] not in measured] + rows
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def result_row(
    case: str,
    unit: str,
    ours: list[float],
    peer: str,
    theirs: list[float],
    ratios: dict[str, float],
    *,
    agree: bool,
    goal: float | None = None,
    at_most: bool = False,
) -> dict[str, Any]:
    """Ours beside one peer.

    Args:
        case: what was measured.
        unit: of the figures.
        ours, peer, theirs: both figures of every round, and the peer's name.
        ratios: their `spread`, round by round.
        agree: whether results are equal.
        goal: of the ratio, at least or `at_most`; none where the peer is there for comparison alone.
    """
    row = {"case": case, "figure": round(statistics.median(ours), 2), "unit": unit, "peer": peer}
    row |= {"peer_figure": round(statistics.median(theirs), 2), "ratio": ratios["median"], "spread": ratios}
    row["results_agree"] = agree
    if goal is not None:
        reached = ratios["median"] <= goal if at_most else ratios["median"] >= goal
        row |= {"goal": goal, "met": agree and reached}
    return row


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the range that the middle half of the values takes."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4), "runs": len(values)}
