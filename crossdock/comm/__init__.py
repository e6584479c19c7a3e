"""Differentiable, functional collectives."""

from crossdock.comm.collectives import (
    EXCHANGE_OPS,
    Pending,
    Splits,
    attach_exchange,
    exchange,
    exchange_counts,
    gather_rows,
    raise_together,
    scatter_sum,
    sum_over_ranks,
)

__all__ = [
    "EXCHANGE_OPS",
    "Pending",
    "Splits",
    "attach_exchange",
    "exchange",
    "exchange_counts",
    "gather_rows",
    "raise_together",
    "scatter_sum",
    "sum_over_ranks",
]
