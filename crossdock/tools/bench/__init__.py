"""`crossdock bench`: how tokens travel, each way beside a plain all-to-all (docs/bench.md)."""

from crossdock.tools.bench.cases import Case, bench_cases
from crossdock.tools.bench.counting import Counts, count
from crossdock.tools.bench.measuring import measure
from crossdock.tools.bench.outcome import Bench, BenchError, Moves, Outcome
from crossdock.tools.bench.page import bench_page
from crossdock.tools.bench.plain import PlainDispatcher
from crossdock.tools.bench.simulating import Speeds, simulate
from crossdock.tools.bench.table import bench_table
from crossdock.tools.bench.workload import Skew, Workload, parse_skew

__all__ = [
    "Bench",
    "BenchError",
    "Case",
    "Counts",
    "Moves",
    "Outcome",
    "PlainDispatcher",
    "Skew",
    "Speeds",
    "Workload",
    "bench_cases",
    "bench_page",
    "bench_table",
    "count",
    "measure",
    "parse_skew",
    "simulate",
]
