"""Differentiable, functional collectives."""

from crossdock.comm.collectives import (
    EXCHANGE_OPS,
    Pending,
    Splits,
    attach_exchange,
    exchange,
    exchange_counts,
    raise_together,
    sum_over_ranks,
)

__all__ = [
    "EXCHANGE_OPS",
    "Pending",
    "Splits",
    "attach_exchange",
    "exchange",
    "exchange_counts",
    "raise_together",
    "sum_over_ranks",
]
