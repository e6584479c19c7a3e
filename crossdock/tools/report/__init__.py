"""The report of a run: one HTML file that needs no network (docs/report.md)."""

from crossdock.tools.report.load import LOAD_FILE, RANK_LOAD_FILE, LoadFileError, LoadLog, read_load
from crossdock.tools.report.records import METRICS_FILE, ReportError, read_metrics
from crossdock.tools.report.report import REPORT_FILE, write_report

__all__ = [
    "LOAD_FILE",
    "METRICS_FILE",
    "RANK_LOAD_FILE",
    "REPORT_FILE",
    "LoadFileError",
    "LoadLog",
    "ReportError",
    "read_load",
    "read_metrics",
    "write_report",
]
