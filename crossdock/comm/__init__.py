"""Differentiable, functional collectives."""

from crossdock.comm.collectives import (
    EXCHANGE_OPS,
    Pending,
    Splits,
    Tally,
    attach_exchange,
    await_gradient,
    exchange,
    exchange_counts,
    gather_rows,
    is_from_other_rank,
    raise_together,
    scatter_sum,
    sum_over_ranks,
)
from crossdock.comm.hang_report import Report
from crossdock.comm.peer_memory import GpuMemory, PeerMemory, SharedFiles, VirtualRanks, peer_memory
from crossdock.comm.place import Place
from crossdock.comm.shares import enter_parts, gather_parts, join_parts, scatter_terms, sum_terms, take_part
from crossdock.comm.streams import run_beside
from crossdock.comm.watchdog import GRACE_SECONDS, WATCHDOG_EXIT_CODE, Watchdog
from crossdock.comm.wire import UNTOUCHED, Wire, WireDtype
from crossdock.comm.work_profile import Straggler

__all__ = [
    "EXCHANGE_OPS",
    "GRACE_SECONDS",
    "UNTOUCHED",
    "WATCHDOG_EXIT_CODE",
    "GpuMemory",
    "PeerMemory",
    "Pending",
    "Place",
    "Report",
    "SharedFiles",
    "Splits",
    "Straggler",
    "Tally",
    "VirtualRanks",
    "Watchdog",
    "Wire",
    "WireDtype",
    "attach_exchange",
    "await_gradient",
    "enter_parts",
    "exchange",
    "exchange_counts",
    "gather_parts",
    "gather_rows",
    "is_from_other_rank",
    "join_parts",
    "peer_memory",
    "raise_together",
    "run_beside",
    "scatter_sum",
    "scatter_terms",
    "sum_over_ranks",
    "sum_terms",
    "take_part",
]
