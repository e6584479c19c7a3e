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
    raise_together,
    scatter_sum,
    sum_over_ranks,
)
from crossdock.comm.peer_memory import GpuMemory, PeerMemory, SharedFiles, VirtualRanks, peer_memory
from crossdock.comm.shares import enter_parts, gather_parts, join_parts, scatter_terms, sum_terms, take_part
from crossdock.comm.streams import run_beside
from crossdock.comm.wire import UNTOUCHED, Wire, WireDtype

__all__ = [
    "EXCHANGE_OPS",
    "UNTOUCHED",
    "GpuMemory",
    "PeerMemory",
    "Pending",
    "SharedFiles",
    "Splits",
    "Tally",
    "VirtualRanks",
    "Wire",
    "WireDtype",
    "attach_exchange",
    "await_gradient",
    "enter_parts",
    "exchange",
    "exchange_counts",
    "gather_parts",
    "gather_rows",
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
