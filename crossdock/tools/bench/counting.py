"""Bytes that a case sends, counted from its routes, without sending any: rows by pairs of ranks, and what goes along.

The dispatchers' own counts (`Dispatcher.traffic`) are the same, which a test holds over 8 processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from crossdock.dispatch import Traffic
from crossdock.tools.bench.cases import Case
from crossdock.tools.bench.placing import Placed
from crossdock.tools.bench.workload import Workload

__all__ = ["Counts", "Hop", "count"]

# Of exchanges of counts: int64, and three facts beside each of ours.
_WORD = 8
_FACTS = 3
_WEIGHT_BYTES = 4


@dataclass(frozen=True)
class Hop:
    """One exchange of rows, in the direction of tokens.

    Attributes:
        sent, received: `[2, R]` rows of each rank to and from others, within its node and between nodes.
    """

    sent: np.ndarray
    received: np.ndarray

    @property
    def rows(self) -> tuple[int, int]:
        """Of all ranks, within nodes and between them."""
        within, between = self.sent.sum(axis=1).tolist()
        return int(within), int(between)


@dataclass(frozen=True)
class Counts:
    """What a case sends and computes in a forward and a backward pass.

    Attributes:
        hops: exchanges of rows, one after another.
        computed: `[R]`, routes that each rank computes.
        traffic: bytes of all ranks.
        row_bytes: of a token on its way there; of a result, and of gradients.
    """

    hops: tuple[Hop, ...]
    computed: np.ndarray
    traffic: Traffic
    row_bytes: tuple[int, int]


def count(case: Case, workload: Workload, placed: Placed) -> Counts:
    """Count the bytes of `case` for routes that have been `placed`."""
    num_ranks, node = workload.num_ranks, workload.ranks_per_node
    ranks = placed.ranks
    computed = np.bincount(ranks.reshape(-1), minlength=num_ranks)
    there = case.wire.row_bytes(workload.hidden_size, workload.dtype)
    back = case.wire.back.row_bytes(workload.hidden_size, workload.dtype)
    if case.dispatcher == "hierarchical":
        hops = _two_hops(ranks, num_ranks, node)
    else:
        hops = (_one_hop(_pairs(ranks, num_ranks, distinct=case.dispatcher != "plain"), node),)
    within, between = (sum(hop.rows[kind] for hop in hops) for kind in (0, 1))
    # Results travel back, and the gradients of both.
    per_row = there + 3 * back
    traffic = Traffic(within * per_row, between * per_row, _metadata(case, workload, placed.slots_per_rank, hops))
    return Counts(hops, computed, traffic, (there, back))


def _pairs(places: np.ndarray, num_places: int, *, distinct: bool) -> np.ndarray:
    """`[R, places]`: each rank's routes to each of `places` `[R, T, K]`; with `distinct`, its tokens with any."""
    in_order = np.sort(places, axis=2)
    counted = np.ones(in_order.shape, dtype=bool)
    if distinct:
        counted[..., 1:] = in_order[..., 1:] != in_order[..., :-1]
    source = np.arange(len(places))[:, None, None] * num_places
    pairs = np.bincount((in_order + source)[counted], minlength=len(places) * num_places)
    return pairs.reshape(len(places), num_places)


def _one_hop(pairs: np.ndarray, ranks_per_node: int) -> Hop:
    """Of rows `[R, R]` from rank to rank."""
    others = pairs * ~np.eye(len(pairs), dtype=bool)
    node = np.arange(len(pairs)) // ranks_per_node
    same = node[:, None] == node[None]
    kinds = [others * same, others * ~same]
    return Hop(np.stack([kind.sum(axis=1) for kind in kinds]), np.stack([kind.sum(axis=0) for kind in kinds]))


def _two_hops(ranks: np.ndarray, num_ranks: int, size: int) -> tuple[Hop, Hop]:
    """Between nodes to the rank of the source's own place, and on within the node."""
    nodes = num_ranks // size
    nothing = np.zeros(num_ranks, dtype=np.int64)
    # [node, place, other node]
    to_nodes = _pairs(ranks // size, nodes, distinct=True).reshape(nodes, size, nodes)
    to_nodes = to_nodes * ~np.eye(nodes, dtype=bool)[:, None]
    sent, received = to_nodes.sum(axis=2).reshape(-1), to_nodes.sum(axis=0).T.reshape(-1)
    between = Hop(np.stack([nothing, sent]), np.stack([nothing, received]))
    # From [place of the source], which all of its node's sources share, to [node, place].
    to_ranks = _pairs(ranks, num_ranks, distinct=True).reshape(nodes, size, nodes, size).sum(axis=0)
    to_ranks = to_ranks * ~np.eye(size, dtype=bool)[:, None]
    sent, received = to_ranks.sum(axis=2).T.reshape(-1), to_ranks.sum(axis=0).reshape(-1)
    return between, Hop(np.stack([sent, nothing]), np.stack([received, nothing]))


def _metadata(case: Case, workload: Workload, slots_per_rank: int, hops: tuple[Hop, ...]) -> int:
    """Bytes of counts, ids, weights and the gradients of weights."""
    ranks, node = workload.num_ranks, workload.ranks_per_node
    if case.dispatcher == "plain":
        return ranks * (ranks - 1) * slots_per_rank * _WORD * case.chunks
    # By hop: groups, ranks of each, and slots of one of them.
    groups = [(1, ranks, slots_per_rank)]
    if case.dispatcher == "hierarchical":
        groups = [(node, ranks // node, slots_per_rank * node), (ranks // node, node, slots_per_rank)]
    total = 0
    for (number, size, slots), hop in zip(groups, hops, strict=True):
        total += number * size * (size - 1) * (1 + _FACTS) * _WORD * case.chunks
        id_bytes = 2 if slots <= torch.iinfo(torch.int16).max else 4
        total += sum(hop.rows) * workload.top_k * (id_bytes + 2 * _WEIGHT_BYTES)
    return total
