"""Assumed counts in the place of those that dispatchers read, so that a layer runs with fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.comm import Splits, exchange
from crossdock.dispatch import Agreement, AllGatherDispatcher, AllToAllDispatcher, HierarchicalDispatcher
from crossdock.routed_experts import RoutedExperts
from crossdock.tools.plan.routes import RankRoutes

__all__ = ["Assumed", "assume_counts"]

_MOST_PARTS = 32


class Assumed(NamedTuple):
    """What one exchange of one chunk moves: rows to each rank of the group, and from each."""

    send: list[int]
    recv: list[int]


class AssumedAgreement(Agreement):
    """An `Agreement` that sends what the real one sends, and takes counts that it was given.

    Args:
        real: in whose place it is.
        chunks: of each chunk, over and over.
    """

    def __init__(self, real: Agreement, chunks: Sequence[Assumed]) -> None:
        self.__dict__.update(real.__dict__)
        self._chunks, self._calls = chunks, 0

    def check(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> None:
        pass

    def pairs(self, needed: Tensor) -> tuple[Tensor, Tensor]:
        count = sum(self._chunks[self._calls % len(self._chunks)].send)
        pairs = torch.empty(count, 2, dtype=torch.int64, device=needed.device)
        destination, token = pairs.unbind(1)
        return destination, token

    def parts(self, rows_per_rank: list[int]) -> list[int]:
        # The same bytes in fewer operations, where there are many ranks.
        size = -(-len(rows_per_rank) // _MOST_PARTS)
        return [sum(rows_per_rank[first : first + size]) for first in range(0, len(rows_per_rank), size)]

    def exchange_counts(
        self, send_counts: Tensor, x: Tensor, slot_ids: Tensor, weights: Tensor
    ) -> tuple[Splits, list[int]]:
        # Counts and three facts of 8 bytes to each rank.
        sent = torch.stack([send_counts, *(torch.zeros_like(send_counts) for _ in range(3))], dim=1)
        one_each = [1] * len(sent)
        exchange(sent, Splits(one_each, one_each), self.group_name, tally=self.tally).wait()
        send, recv = self._chunks[self._calls % len(self._chunks)]
        self._calls += 1
        return Splits(send, recv), [len(x)] * self.num_ranks


def assume_counts(layer: RoutedExperts, chunks: Sequence[RankRoutes]) -> None:
    """Have a layer's dispatcher take these counts, every rank's being alike.

    Args:
        layer: spread over ranks.
        chunks: of each chunk of a rank's tokens.

    Raises:
        ValueError: for a dispatcher that there is no dry run of.
    """
    dispatcher, own = layer.dispatcher, layer.ep_rank
    if isinstance(dispatcher, HierarchicalDispatcher):
        size, nodes = dispatcher.within.num_ranks, dispatcher.between.num_ranks
        node, place = divmod(own, size)
        between, within = [], []
        for chunk in chunks:
            of_nodes = list(chunk.node_rows(size))
            between.append(Assumed(of_nodes, [of_nodes[node]] * nodes))
            here = [rows * nodes for rows in chunk.rows[node * size : (node + 1) * size]]
            within.append(Assumed(here, [here[place]] * size))
        dispatcher.between.agreement = AssumedAgreement(dispatcher.between.agreement, between)
        dispatcher.within.agreement = AssumedAgreement(dispatcher.within.agreement, within)
    elif isinstance(dispatcher, (AllToAllDispatcher, AllGatherDispatcher)):
        counts = [Assumed(list(chunk.rows), [chunk.rows[own]] * chunk.num_ranks) for chunk in chunks]
        dispatcher.agreement = AssumedAgreement(dispatcher.agreement, counts)
    elif layer.ep_world_size > 1:
        raise ValueError(f"there is no dry run of {type(dispatcher).__name__}")
