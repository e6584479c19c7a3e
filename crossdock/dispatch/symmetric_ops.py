"""One-sided exchanges as operators, and the autograd nodes that begin one and wait for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from crossdock.dispatch.symmetric_buffers import Exchange

__all__ = ["SYMMETRIC_OPS", "Flight", "Going", "Receive", "Send", "begin_exchange"]


class _Call:
    """What an op does. After a selective recompute, which runs no op, nothing was done."""

    def __init__(self, run: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
        self.run, self.ran = run, False


# Operators take numbers, not objects: the calls that are being made, by number. An entry is there during its call.
_CALLS: dict[int, _Call] = {}
_NUMBERS = itertools.count()

torch.library.define("crossdock::symmetric_begin", "(Tensor[] tensors, int call) -> Tensor[]")
torch.library.define("crossdock::symmetric_finish", "(Tensor[] tensors, int call) -> Tensor[]")


def _run(tensors: Sequence[Tensor], number: int) -> list[Tensor]:
    call = _CALLS[number]
    call.ran = True
    return call.run(tensors)


torch.library.impl("crossdock::symmetric_begin", "CompositeExplicitAutograd", _run)
torch.library.impl("crossdock::symmetric_finish", "CompositeExplicitAutograd", _run)

_begin_op = torch.ops.crossdock.symmetric_begin.default
_finish_op = torch.ops.crossdock.symmetric_finish.default

# What selective recompute must save, so that it never repeats an exchange.
SYMMETRIC_OPS = (_begin_op, _finish_op)
"""The operators of `symmetric`, which selective recompute saves."""


def _call(
    op: Any, run: Callable[[Sequence[Tensor]], list[Tensor]], tensors: Sequence[Tensor]
) -> tuple[list[Tensor], bool]:
    call, number = _Call(run), next(_NUMBERS)
    _CALLS[number] = call
    try:
        return op(tensors, number), call.ran
    finally:
        del _CALLS[number]


class Going:
    """An exchange on its way; `ran` is false in a selective recompute, which gets what was saved."""

    def __init__(self, ticket: Tensor, exchange: Exchange | None) -> None:
        self.ticket, self.exchange = ticket, exchange

    @property
    def ran(self) -> bool:
        return self.exchange is not None

    def finish(
        self, wait: Callable[[Exchange], Sequence[Tensor | None]], after: Callable[[], None]
    ) -> tuple[Tensor, ...]:
        """What `wait` gives of the exchange; then `after`."""
        exchange, self.exchange = self.exchange, None

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            assert exchange is not None
            return [tensor for tensor in wait(exchange) if tensor is not None]

        results, ran = _call(_finish_op, run, [self.ticket])
        if ran:
            after()
        return tuple(results)


def begin_exchange(begin: Callable[[Sequence[Tensor]], Exchange], *tensors: Tensor) -> Going:
    exchanges: list[Exchange] = []

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        exchanges.append(begin(tensors))
        return [exchanges[0].ticket]

    (ticket,), _ = _call(_begin_op, run, tensors)
    return Going(ticket, exchanges[0] if exchanges else None)


class Flight:
    """An exchange of gradients: how it begins, at the later node, and ends, at the earlier."""

    begin: Callable[[Sequence[Tensor]], Going]
    end: Callable[[Going], tuple[Tensor, ...]]
    going: Going | None = None


class Send(Function):
    """In place of tensors that are on their way, a number; its backward waits for what `Receive` began."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, *sent: Tensor) -> Tensor:
        ctx.flight = flight
        return sent[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        going, ctx.flight.going = ctx.flight.going, None
        return None, *ctx.flight.end(going)


class Receive(Function):
    """What arrived; its backward begins to send gradients the other way, for which `Send` waits."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, sent: Tensor, *arrived: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return tuple(tensor.view_as(tensor) for tensor in arrived)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.flight.going = ctx.flight.begin(grads)
        return None, grads[0].new_zeros(()), *(None,) * len(grads)
