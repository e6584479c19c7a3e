"""Writing the report of a run, or that of several."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from crossdock.tools.report.charts import MOST_SERIES
from crossdock.tools.report.compare import comparison
from crossdock.tools.report.page import page
from crossdock.tools.report.records import ReportError, read_run

__all__ = ["COMPARISON_FILE", "REPORT_FILE", "render", "write_page", "write_report"]

REPORT_FILE = "report.html"
"""In a run folder."""
# Of several runs, in the working directory.
COMPARISON_FILE = "comparison.html"


def write_report(run_folders: Path | Sequence[Path], output: Path | None = None) -> Path:
    """Write a run's report, or a comparison of several; an earlier one is replaced only when it is whole.

    Args:
        run_folders: of runs that have ended, or are still going on.
        output: where to; if `None`, `report.html` in the run folder, or `comparison.html` in the working directory.

    Returns:
        The path of the report.

    Raises:
        ReportError: for a folder without a run, too many of them, or a place that cannot be written to.
    """
    folders = [run_folders] if isinstance(run_folders, Path) else list(run_folders)
    default = folders[0] / REPORT_FILE if len(folders) == 1 else Path(COMPARISON_FILE)
    return write_page(default if output is None else output, lambda: render(folders))


def render(run_folders: Sequence[Path], live: tuple[str, float] | None = None) -> str:
    """The page of a run, or of several; for `live` see `document`. Raises as `write_report`."""
    if len(run_folders) > MOST_SERIES:
        raise ReportError(f"{len(run_folders)} runs are too many for one page; at most {MOST_SERIES} can be compared")
    runs = [read_run(folder) for folder in run_folders]
    return page(runs[0], live) if len(runs) == 1 else comparison(runs, live)


def write_page(path: Path, make: Callable[[], str]) -> Path:
    """Write what `make` gives to a file, which it replaces only when it is whole.

    Raises:
        ReportError: where it cannot be written.
    """
    if path.is_dir() or not path.name:
        raise ReportError(f"cannot write {path}: it is a folder; name a file")
    html = make()
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(html, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ReportError(f"cannot write {path}: {error.strerror}") from None
    return path
