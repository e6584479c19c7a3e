"""What a dispatcher sends, and the least that any could."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.comm import Tally
from crossdock.dispatch.nodes import Nodes

__all__ = ["Needs", "Traffic", "TrafficMeter"]


@dataclass
class Traffic:
    """Bytes that this rank sent to other ranks, forward and backward; to itself nothing counts.

    What really travelled: a forward pass that activation checkpointing runs again counts again as far as it sends
    again, which a selective one does not. The least counts with it, exchange by exchange, each in the size that its
    rows have on the wire: tokens, results, and the gradients of both.

    The least: a token crosses once to every other node that holds one of its slots, and once to every further rank
    that does, from a rank of the same node; and so back. No dispatcher sends fewer rows between nodes, or fewer in all.
    Fewer within nodes are possible, for more between them. It counts where the tokens are, though others send a part:
    compare sums over the ranks.

    Attributes:
        within: rows to ranks of the same node.
        between: rows to ranks of other nodes.
        metadata: to all other ranks: counts, ids and weights of routes, gradients of weights.
        least_within, least_between: of rows.
    """

    within: int = 0
    between: int = 0
    metadata: int = 0
    least_within: int = 0
    least_between: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))


class Needs(NamedTuple):
    """Rows that tokens need at least, in one direction: in all, and those of them between nodes.

    Where the host does not know them, tensors of no dimension on the tokens' device.
    """

    rows: int | Tensor
    between: int | Tensor


class TrafficMeter:
    """Counts what one rank sends.

    Args:
        group: the ranks that it sends to.
        nodes: of the group's ranks; one if `None`.
    """

    def __init__(self, group: dist.ProcessGroup, nodes: Nodes | None = None) -> None:
        self._begin(group.rank(), nodes or Nodes.consecutive(group.size(), group.size()))

    @classmethod
    def of_rank(cls, rank: int, nodes: Nodes) -> TrafficMeter:
        """For a rank that is in no process group."""
        meter = cls.__new__(cls)
        meter._begin(rank, nodes)
        return meter

    def _begin(self, rank: int, nodes: Nodes) -> None:
        self.rank, self.nodes = rank, nodes
        self._sent = Traffic()
        self._least = Needs(0, 0)
        # Of rows that the host has not counted, by the bytes of each and of its metadata.
        self._rows_on_device: dict[tuple[int, int], Tensor] = {}

    @property
    def traffic(self) -> Traffic:
        """So far. May wait for the GPU."""
        rows, between = (int(of_bytes) for of_bytes in self._least)
        total = self._sent + Traffic(least_within=rows - between, least_between=between)
        for (row_bytes, metadata_bytes), of_size in self._rows_on_device.items():
            sent = int(of_size)
            total += Traffic(sent * row_bytes, 0, sent * metadata_bytes, sent * row_bytes)
        return total

    def needs(self, needed: Tensor, rows: int | Tensor | None = None) -> Needs:
        """What tokens need. No sync.

        Args:
            needed: `[T, R]` bool, whether a token needs a rank.
            rows: of them, to other ranks; where the caller knows.
        """
        if rows is None:
            rows = needed.count_nonzero() - needed[:, self.rank].count_nonzero()
        if self.nodes.count == 1:
            return Needs(rows, 0)
        if self.nodes.size == 1:
            return Needs(rows, rows)
        own = self.nodes.of_ranks[self.rank]
        if self.nodes.size:
            by_node = needed.unflatten(1, (-1, self.nodes.size)).any(dim=2)
        else:
            ranks = range(len(self.nodes.of_ranks))
            of_nodes = [
                [rank for rank in ranks if self.nodes.of_ranks[rank] == node] for node in range(self.nodes.count)
            ]
            by_node = torch.stack([needed[:, members].any(dim=1) for members in of_nodes], dim=1)
        return Needs(rows, by_node.count_nonzero() - by_node[:, own].count_nonzero())

    def rows(self, needs: Needs) -> Tally:
        """What counts the rows of tokens, results or gradients that need so many."""

        def count(per_rank: Sequence[int], row_bytes: int) -> None:
            self._count(per_rank, row_bytes)
            self._least = Needs(*map(lambda total, more: _plus(total, more, row_bytes), self._least, needs))

        return count

    def metadata(self, per_rank: Sequence[int], row_bytes: int) -> None:
        """Count what goes along with rows: a `Tally`."""
        self._sent.metadata += (sum(per_rank) - per_rank[self.rank]) * row_bytes

    def rows_within(self, counts: Tensor, row_bytes: int, metadata_bytes: int) -> None:
        """Count rows to ranks of one node, each as little as could be, of which the host knows no number. No sync.

        Added up in place: what a CUDA graph replays counts again.

        Args:
            counts: `[R]` int64, to each rank, this one included.
            row_bytes: of a row.
            metadata_bytes: that go along with each.
        """
        total = self._rows_on_device.get((row_bytes, metadata_bytes))
        if total is None:
            total = self._rows_on_device[row_bytes, metadata_bytes] = counts.new_zeros(())
        total += counts.sum() - counts[self.rank]

    def _count(self, per_rank: Sequence[int], row_bytes: int) -> None:
        node = self.nodes.of_ranks[self.rank]
        in_all = sum(per_rank) - per_rank[self.rank]
        here = sum(rows for rows, other in zip(per_rank, self.nodes.of_ranks, strict=True) if other == node)
        within = here - per_rank[self.rank]
        self._sent.within += within * row_bytes
        self._sent.between += (in_all - within) * row_bytes


def _plus(total: int | Tensor, more: int | Tensor, times: int) -> int | Tensor:
    """`total + more * times`, of tensors in one kernel."""
    if isinstance(total, Tensor) and isinstance(more, Tensor):
        return torch.add(total, more, alpha=times)
    return total + more * times
