"""Writing the report of a run."""

from __future__ import annotations

import os
from pathlib import Path

from crossdock.tools.report.page import page
from crossdock.tools.report.records import ReportError, read_run

__all__ = ["REPORT_FILE", "write_report"]

# In a run folder.
REPORT_FILE = "report.html"


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Write a run's report, which replaces an earlier one only when it is whole.

    Args:
        run_folder: of a run that has ended, or of one that is still going on.
        output: where to; `report.html` in the run folder if `None`.

    Returns:
        The path of the report.

    Raises:
        ReportError: for a folder without a run, or a place that cannot be written to.
    """
    path = run_folder / REPORT_FILE if output is None else output
    if path.is_dir() or not path.name:
        raise ReportError(f"cannot write {path}: it is a folder; name a file")
    html = page(read_run(run_folder))
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(html, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ReportError(f"cannot write {path}: {error.strerror}") from None
    return path
