"""Differentiable, functional collectives."""

from crossdock.comm.collectives import (
    EXCHANGE_OPS,
    Pending,
    Splits,
    Tally,
    attach_exchange,
    exchange,
    exchange_counts,
    gather_rows,
    raise_together,
    scatter_sum,
    sum_over_ranks,
)
from crossdock.comm.wire import UNTOUCHED, Wire, WireDtype

__all__ = [
    "EXCHANGE_OPS",
    "UNTOUCHED",
    "Pending",
    "Splits",
    "Tally",
    "Wire",
    "WireDtype",
    "attach_exchange",
    "exchange",
    "exchange_counts",
    "gather_rows",
    "raise_together",
    "scatter_sum",
    "sum_over_ranks",
]
