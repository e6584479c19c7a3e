"""`crossdock report`: the page about a run, or about several side by side; live with --watch."""

from __future__ import annotations

import argparse
from pathlib import Path

from crossdock.cli.common import Parser, fail

__all__ = ["report_command"]


def report_command(arguments: list[str], options: argparse.Namespace) -> int:
    """`crossdock report RUN [RUN...]`."""
    parser = Parser(
        prog="crossdock report",
        description="Write the report of a run, or one that compares several: a file that needs no network. With "
        "--watch, serve it on this machine's loopback address instead, and keep it up to date while the run goes on.",
        examples=(
            "crossdock report runs/debug/20261121-101622",
            "crossdock report runs/plain runs/balanced --output comparison.html",
            "crossdock report runs/debug/20261121-101622 --watch --port 0",
        ),
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folder of a run; up to 8")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="where to (RUN/report.html; of several, comparison.html here)"
    )
    parser.add_argument("--watch", action="store_true", help="serve it, live, until Ctrl-C")
    parser.add_argument("--port", type=int, help="to serve it on, with --watch (8642); 0: any that is free")
    parsed = parser.parse_args(arguments)
    if parsed.port is not None and not parsed.watch:
        parser.error("argument --port goes with --watch")
    if parsed.port is not None and not 0 <= parsed.port < 65536:
        parser.error("argument --port must be 0 to 65535")
    if parsed.output is not None and parsed.watch:
        parser.error("argument --output does not go with --watch, which writes no file")

    from crossdock.tools.report import ReportError, write_report
    from crossdock.tools.report.watch import serve

    try:
        if parsed.watch:
            serve(parsed.runs, 8642 if parsed.port is None else parsed.port, _say_where)
        else:
            print(write_report(parsed.runs, parsed.output))
    except ReportError as error:
        fail(str(error))
    return 0


def _say_where(address: str) -> None:
    print(f"{address}  (Ctrl-C ends it)", flush=True)
