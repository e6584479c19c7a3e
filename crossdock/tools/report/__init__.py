"""The report of a run: one HTML file that needs no network (docs/report.md)."""

from crossdock.tools.report.events import EVENTS_FILE, EventKind, note_event
from crossdock.tools.report.load import LOAD_FILE, RANK_LOAD_FILE, LoadFileError, LoadLog, read_load
from crossdock.tools.report.records import FAULTS_FOLDER, METRICS_FILE, ReportError, read_metrics
from crossdock.tools.report.report import REPORT_FILE, write_page, write_report

__all__ = [
    "EVENTS_FILE",
    "FAULTS_FOLDER",
    "LOAD_FILE",
    "METRICS_FILE",
    "RANK_LOAD_FILE",
    "REPORT_FILE",
    "EventKind",
    "LoadFileError",
    "LoadLog",
    "ReportError",
    "note_event",
    "read_load",
    "read_metrics",
    "write_page",
    "write_report",
]
