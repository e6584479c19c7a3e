"""Experts that a rank borrows for one step, to help those that own them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from crossdock.balance.rows import RowExchange, at_least_one, gathered_rows
from crossdock.comm import Pending
from crossdock.experts import ComputeRows, GroupedExperts

__all__ = ["Borrowed"]


class Borrowed:
    """What this rank borrows of a layer's experts in one forward pass and its backward pass.

    Weights are there while they are computed with: of the forward pass the tokens are kept alone, and the backward pass
    fetches the weights once more and computes again.

    Args:
        exchange: from the owners to those that borrow.
    """

    def __init__(self, exchange: RowExchange) -> None:
        self._exchange = exchange
        self._arriving: Pending[dict[str, Tensor]] | None = None

    def begin(self, experts: GroupedExperts) -> None:
        """Start to fetch, where the parameters are there, while tokens travel. Collective."""
        if (rows := gathered_rows(experts)) is not None:
            self._arriving = self._exchange.fetch(rows)

    def prepare(self, rows: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor, Tensor, ComputeRows], Tensor]:
        """As `ForeignExperts` has it."""
        arriving, self._arriving = self._arriving or self._exchange.fetch(rows), None

        def compute(tokens: Tensor, slot_ids: Tensor, weights: Tensor, compute_rows: ComputeRows) -> Tensor:
            names = tuple(rows)
            inputs = tokens, self._exchange.arrivals(slot_ids), weights, *rows.values()
            return _ComputeBorrowed.apply(self._exchange, arriving, compute_rows, names, *inputs)  # type: ignore[return-value]

        return compute


class _ComputeBorrowed(Function):
    @staticmethod
    def forward(
        ctx: Any,
        exchange: RowExchange,
        arriving: Pending[dict[str, Tensor]],
        compute_rows: ComputeRows,
        names: tuple[str, ...],
        tokens: Tensor,
        slot_ids: Tensor,
        weights: Tensor,
        *rows: Tensor,
    ) -> Tensor:
        ctx.exchange, ctx.compute_rows, ctx.names = exchange, compute_rows, names
        ctx.save_for_backward(tokens, slot_ids, weights, *rows)
        ctx.autocast = torch.is_autocast_enabled(tokens.device.type), torch.get_autocast_dtype(tokens.device.type)
        borrowed = {name: at_least_one(row) for name, row in arriving.wait().items()}
        return compute_rows(tokens, slot_ids, weights, borrowed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tokens, slot_ids, weights, *own = ctx.saved_tensors
        rows: dict[str, Tensor] = dict(zip(ctx.names, own, strict=True))
        needs_tokens, _, needs_weights, *needs_rows = ctx.needs_input_grad[4:]
        trained = [name for name, needed in zip(ctx.names, needs_rows, strict=True) if needed]
        arrived = ctx.exchange.fetch(rows).wait()
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(tokens.device.type, dtype, enabled=enabled):
            tokens = tokens.detach().requires_grad_(needs_tokens)
            weights = weights.detach().requires_grad_(needs_weights)
            borrowed = {name: row.requires_grad_(name in trained) for name, row in arrived.items()}
            y = ctx.compute_rows(tokens, slot_ids, weights, {name: at_least_one(row) for name, row in borrowed.items()})
        wanted = [tensor for tensor in (tokens, weights) if tensor.requires_grad]
        found = iter(torch.autograd.grad(y, [*wanted, *(borrowed[name] for name in trained)], grads[0]))
        of_tokens, of_weights = (next(found) if needed else None for needed in (needs_tokens, needs_weights))
        returned = ctx.exchange.give_back(dict(zip(trained, found, strict=True)), rows)
        return *(None,) * 4, of_tokens, None, of_weights, *(returned.get(name) for name in ctx.names)
