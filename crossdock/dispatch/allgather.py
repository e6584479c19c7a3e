"""All tokens to all ranks: no routing of rows at all. Right for few experts, or tiny batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.comm import UNTOUCHED, Pending, Wire, gather_rows, scatter_sum
from crossdock.dispatch.agreement import Agreement
from crossdock.dispatch.checks import check_results
from crossdock.dispatch.dispatcher import Dispatched
from crossdock.dispatch.needs import needed_ranks
from crossdock.dispatch.nodes import Nodes
from crossdock.dispatch.traffic import Needs, Traffic, TrafficMeter

__all__ = ["AllGatherDispatcher", "AllGatherHandle"]


class AllGatherHandle(NamedTuple):
    """Tokens of each rank, and of this one; `H`; what the tokens of this one need."""

    counts: list[int]
    num_tokens: int
    hidden_size: int
    needs: Needs


class AllGatherDispatcher:
    """Every rank gets every token, with or without a route to it, and computes its own slots' part of each result.

    Four collectives to dispatch (counts, tokens, ids, weights), one to combine; rows are padded to the largest rank's
    while they travel. The partial results travel back to their ranks and are summed there in rank order, in fp32.

    Args:
        group: the expert-parallel ranks.
        slots_per_rank: `P/R`.
        nodes: of the ranks, for `traffic`; one if `None`.
        wire: what rows look like while they travel.
        chunks: parts that a rank's tokens are dispatched in, each by a call.
        debug_checks: look at ids on a GPU too, where it costs a sync.
    """

    ordered = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        slots_per_rank: int,
        nodes: Nodes | None = None,
        *,
        wire: Wire = UNTOUCHED,
        chunks: int = 1,
        debug_checks: bool = False,
    ) -> None:
        self.group_name, self.num_ranks, self.rank = group.group_name, group.size(), group.rank()
        self.slots_per_rank = slots_per_rank
        self.wire = wire
        self.meter = TrafficMeter(group, nodes)
        self.agreement = Agreement(
            group, slots_per_rank, wire, chunks=chunks, check_ids=debug_checks, tally=self.meter.metadata
        )

    @property
    def traffic(self) -> Traffic:
        return self.meter.traffic

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        self.agreement.check(x, slot_ids, weights)
        return self._gather(x, slot_ids, weights, self._counts(x, slot_ids, weights))

    def _counts(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> list[int]:
        """Tokens of each rank."""
        to_all = torch.full((self.num_ranks,), len(x), dtype=torch.int64, device=x.device)
        _, tokens = self.agreement.exchange_counts(to_all, x, slot_ids, weights)
        return tokens

    def _gather(self, x: Tensor, slot_ids: Tensor, weights: Tensor, counts: list[int]) -> Pending[Dispatched]:
        needs = self.meter.needs(needed_ranks(slot_ids, self.slots_per_rank, self.num_ranks))
        ids = gather_rows(slot_ids, counts, self.group_name, tally=self.meter.metadata)
        all_weights = gather_rows(weights, counts, self.group_name, tally=self.meter.metadata)
        tokens = gather_rows(x, counts, self.group_name, self.wire, self.meter.rows(needs))

        def finish() -> Dispatched:
            own_ids = ids.wait() - self.rank * self.slots_per_rank
            foreign = (own_ids < 0) | (own_ids >= self.slots_per_rank)
            own_weights = all_weights.wait().masked_fill(foreign, 0)
            return Dispatched(
                tokens.wait(),
                own_ids.masked_fill(foreign, -1),
                own_weights,
                AllGatherHandle(counts, len(x), x.shape[1], needs),
            )

        return Pending(finish)

    def refuse(self, device: torch.device) -> None:
        self.agreement.refuse(device)

    def combine(self, y: Tensor, handle: Any) -> Pending[Tensor]:
        check_results(y, sum(handle.counts), handle.hidden_size)
        return scatter_sum(y, handle.counts, self.group_name, self.wire.back, self.meter.rows(handle.needs))
