"""Redundant experts: copies on other ranks of experts that stay one expert in training.

Of an expert there is one primary, a row of the layer's parameters on some rank, with the optimizer's state. A copy is
that row's values and nothing else: fetched in the first forward pass after they have changed, while the router decides
and tokens travel, and kept until they change again. Its gradient returns to the primary within the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.distributed as dist
from torch import Tensor

from crossdock.balance.rows import RowExchange, at_least_one, gathered_rows
from crossdock.comm import Pending, await_gradient
from crossdock.experts import ComputeRows, GroupedExperts
from crossdock.placement import Placement

__all__ = ["Copies"]


class Copies:
    """The copies that this rank holds of a layer's experts.

    Args:
        placement: of primaries and copies.
        group: the ranks that hold the experts.
    """

    def __init__(self, placement: Placement, group: dist.ProcessGroup) -> None:
        ranks = range(placement.num_ranks)
        wanted = [placement.slots_of(rank)[placement.rows_per_rank :] for rank in ranks]
        self._exchange = RowExchange.of(wanted, placement, group)
        self._kept: dict[str, Tensor] | None = None
        self._arriving: Pending[dict[str, Tensor]] | None = None

    def weights_changed(self) -> None:
        """Fetch again before the next use; on all ranks."""
        self._kept = self._arriving = None

    def begin(self, experts: GroupedExperts) -> None:
        """Start to fetch, where need be and the parameters are there. Collective."""
        if self._kept is None and self._arriving is None and (rows := gathered_rows(experts)) is not None:
            self._arriving = self._exchange.fetch(rows)

    def prepare(self, rows: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor, Tensor, ComputeRows], Tensor]:
        """As `ForeignExperts` has it."""
        kept = self._values(rows)
        # Before this rank's own experts: their backward pass runs while gradients of copies travel.
        attach = {
            name: await_gradient(self._exchange.taken(row), self._exchange.splits, self._exchange.group_name)
            for name, row in rows.items()
        }

        def compute(tokens: Tensor, slot_ids: Tensor, weights: Tensor, compute_rows: ComputeRows) -> Tensor:
            copies = {name: at_least_one(attach[name](values)) for name, values in kept.items()}
            return compute_rows(tokens, self._exchange.arrivals(slot_ids), weights, copies)

        return compute

    def _values(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._kept is None:
            arriving, self._arriving = self._arriving or self._exchange.fetch(rows), None
            self._kept = arriving.wait()
        return self._kept
