"""Kernels of exchanges between ranks that can write to each other's memory, each beside its plain-torch reference."""

from crossdock.kernels.symmetric.layout import Places, place_tokens, place_tokens_reference
from crossdock.kernels.symmetric.memory import Ring, RowLayout, Status, Window, kernels_run
from crossdock.kernels.symmetric.routes import (
    offer_weights,
    offer_weights_reference,
    pull_weights,
    pull_weights_reference,
    push_routes,
    push_routes_reference,
    take_routes,
    take_routes_reference,
)
from crossdock.kernels.symmetric.rows import offer_rows, pull_rows, push_rows, take_rows
from crossdock.kernels.symmetric.rows_reference import (
    offer_rows_reference,
    pull_rows_reference,
    push_rows_reference,
    take_rows_reference,
)
from crossdock.kernels.symmetric.signals import (
    NEVER_RELEASED,
    await_arrivals,
    await_arrivals_reference,
    open_exchange,
    open_exchange_reference,
    send_signals,
    send_signals_reference,
)

__all__ = [
    "NEVER_RELEASED",
    "Places",
    "Ring",
    "RowLayout",
    "Status",
    "Window",
    "await_arrivals",
    "await_arrivals_reference",
    "kernels_run",
    "offer_rows",
    "offer_rows_reference",
    "offer_weights",
    "offer_weights_reference",
    "open_exchange",
    "open_exchange_reference",
    "place_tokens",
    "place_tokens_reference",
    "pull_rows",
    "pull_rows_reference",
    "pull_weights",
    "pull_weights_reference",
    "push_routes",
    "push_routes_reference",
    "push_rows",
    "push_rows_reference",
    "send_signals",
    "send_signals_reference",
    "take_routes",
    "take_routes_reference",
    "take_rows",
    "take_rows_reference",
]
