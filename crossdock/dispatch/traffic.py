"""What a dispatcher sends, and the least that any could."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Traffic", "TrafficMeter", "least_traffic"]


@dataclass
class Traffic:
    """Bytes that this rank sent to other ranks, forward passes only; to itself nothing counts.

    A backward pass sends the tokens' bytes once more in each direction, and the weights' gradients, no ids. Under
    activation checkpointing, a forward pass that is run again counts again, though a selective one sends nothing.

    Attributes:
        within: rows of tokens and results to ranks of the same node.
        between: the same to ranks of other nodes.
        metadata: ids and weights of routes, and counts, to all other ranks.
    """

    within: int = 0
    between: int = 0
    metadata: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class TrafficMeter:
    """Counts what one rank sends.

    Args:
        group: the ranks that it sends to.
        ranks_per_node: consecutive ranks of the group that make a node; all of them if `None`.
    """

    def __init__(self, group: dist.ProcessGroup, ranks_per_node: int | None = None) -> None:
        self.rank, self.ranks_per_node = group.rank(), ranks_per_node or group.size()
        self.sent = Traffic()

    def rows(self, per_rank: list[int], row_bytes: int) -> None:
        """Count rows of `row_bytes` sent to each rank of the group."""
        for other, count in enumerate(per_rank):
            if other // self.ranks_per_node != self.rank // self.ranks_per_node:
                self.sent.between += count * row_bytes
            elif other != self.rank:
                self.sent.within += count * row_bytes

    def about_routes(self, per_rank: list[int], row_bytes: int) -> None:
        """Count `row_bytes` of metadata for each row sent, and 32 bytes of what ranks agree on for each rank."""
        others = len(per_rank) - 1
        self.sent.metadata += (sum(per_rank) - per_rank[self.rank]) * row_bytes + 32 * others


def least_traffic(slot_ids: Tensor, slots_per_rank: int, row_bytes: int, rank: int, ranks_per_node: int) -> Traffic:
    """What these tokens' rows cost at least, there and back, without metadata.

    A token must cross to every other node that holds one of its slots once; within nodes, to every rank once: to the
    other ranks of this node here, and from the rank where it enters another node to the others there. `within` counts
    both, though other ranks send the latter.

    Args:
        slot_ids: `[T, K]` global slots of this rank's tokens, `-1` is no route.
        slots_per_rank: `P/R`.
        row_bytes: of a token's row.
        rank: this rank's place in the group.
        ranks_per_node: consecutive ranks that make a node.
    """
    ranks = slot_ids.clamp_min(0) // slots_per_rank
    routed = slot_ids >= 0

    def distinct(places: Tensor, own: int) -> Tensor:
        """Of each token, how many distinct places other than `own`."""
        places = torch.where(routed, places, own)
        places = torch.cat([places, places.new_full((len(places), 1), own)], dim=1).sort(dim=1).values
        return (places[:, 1:] != places[:, :-1]).sum()

    other_nodes = distinct(ranks // ranks_per_node, rank // ranks_per_node)
    other_ranks = distinct(ranks, rank)
    within = (other_ranks - other_nodes).clamp_min(0)
    return Traffic(2 * row_bytes * int(within), 2 * row_bytes * int(other_nodes))
