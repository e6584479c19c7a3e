"""A plain all-to-all, to compare with: a copy of a token for each of its routes, as transformers' `AllToAllEP`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.comm import Pending, Splits, exchange
from crossdock.dispatch import Dispatched, Nodes, Traffic
from crossdock.dispatch.traffic import Needs, TrafficMeter

__all__ = ["PlainDispatcher"]


class PlainHandle(NamedTuple):
    """The order of routes as they were sent, the splits, and the weights of routes `[T, K]`."""

    order: Tensor
    splits: Splits
    weights: Tensor


class PlainDispatcher:
    """Rows sorted by slot, one for each route; counts per slot tell whose they are. Weights stay with the sender.

    Args:
        group: the expert-parallel ranks.
        slots_per_rank: `P/R`.
        nodes: of the ranks, for `traffic`.
    """

    ordered = True

    def __init__(self, group: dist.ProcessGroup, slots_per_rank: int, nodes: Nodes) -> None:
        self.group_name, self.num_ranks, self.slots_per_rank = group.group_name, group.size(), slots_per_rank
        self.meter = TrafficMeter(group, nodes)
        # What is least is no matter here.
        self._rows = self.meter.rows(Needs(0, 0))

    @property
    def traffic(self) -> Traffic:
        return self.meter.traffic

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        slots = slot_ids.flatten()
        order = slots.argsort(stable=True)
        counts = slots.bincount(minlength=self.num_ranks * self.slots_per_rank).view(self.num_ranks, -1)
        one_each = [1] * self.num_ranks
        arrived = exchange(counts, Splits(one_each, one_each), self.group_name, tally=self.meter.metadata).wait()
        send, recv = torch.stack([counts.sum(1), arrived.sum(1)]).tolist()
        splits = Splits(send, recv)
        ids = torch.arange(self.slots_per_rank, device=x.device).repeat(self.num_ranks)
        ids = ids.repeat_interleave(arrived.flatten())[:, None]
        tokens = exchange(x[order // slot_ids.shape[1]], splits, self.group_name, tally=self._rows)

        def finish() -> Dispatched:
            ones = torch.ones(ids.shape, dtype=weights.dtype, device=x.device)
            return Dispatched(tokens.wait(), ids, ones, PlainHandle(order, splits, weights))

        return Pending(finish)

    def refuse(self, device: torch.device) -> None:
        raise NotImplementedError("a bench has no rank that cannot dispatch")

    def combine(self, y: Tensor, handle: Any) -> Pending[Tensor]:
        order, splits, weights = handle
        rows = exchange(y, splits.reversed, self.group_name, tally=self._rows)

        def finish() -> Tensor:
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            results = rows.wait()[back].view(*weights.shape, -1)
            return (results * weights[..., None]).sum(dim=1).to(y.dtype)

        return Pending(finish)
