"""How large the report of a long run of a big model is, and how fast a browser opens it.

10,000 steps, 94 layers of 128 experts, their loads recorded every tenth step, the experts on 64 ranks. The browser is
Debian's `chromium`, without a screen or a GPU. Goals: under 15 MB, open in under 2 s.

    python -m benchmarks.report [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.results_file import write_results
from crossdock.tools.report import RANK_LOAD_FILE, write_report
from tests.browser import MISSING, Browser, chromium
from tests.tools.runs import long_run, write_loads

STEPS, LAYERS, EXPERTS, RANKS = 10_000, 94, 128, 64
GOAL_MB, GOAL_SECONDS = 15.0, 2.0
# What a person waits for: all is there, and has been drawn.
DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args(arguments)
    executable = chromium()
    if executable is None:
        print(MISSING, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "long")
        long_run(folder, STEPS)
        loads = np.random.default_rng(0).lognormal(5, 0.6, size=(STEPS // 10, LAYERS, EXPERTS))
        write_loads(folder, loads)
        write_loads(folder, loads[..., :RANKS], name=RANK_LOAD_FILE)
        started = time.perf_counter()
        report = write_report(folder)
        written = time.perf_counter() - started
        megabytes = report.stat().st_size / 1e6
        seconds = [_open(executable, report) for _ in range(parsed.rounds)]
    opened, spread = statistics.median(seconds), [min(seconds), max(seconds)]
    rows = [
        {"case": "size, MB", "figure": round(megabytes, 2), "goal": GOAL_MB, "met": megabytes < GOAL_MB},
        {
            "case": "opens, s",
            "figure": round(opened, 3),
            "spread": [round(value, 3) for value in spread],
            "goal": GOAL_SECONDS,
            "met": opened < GOAL_SECONDS,
        },
        {"case": "is written in, s", "figure": round(written, 2)},
    ]
    for row in rows:
        print(row)
    print(write_results("report", ["crossdock", "numpy"], rows))
    return 0


def _open(executable: str, report: Path) -> float:
    """Seconds until a new browser, which has drawn an empty page, has drawn this one."""
    browser = Browser(executable)
    try:
        empty = report.with_name("empty.html")
        empty.write_text("<!doctype html><title>empty</title>")
        browser.open(empty).close()
        started = time.perf_counter()
        browser.open(report).evaluate(DRAWN)
        return time.perf_counter() - started
    finally:
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
