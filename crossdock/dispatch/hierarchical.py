"""Two hops: between nodes first, once per token and node, then within the node."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.comm import UNTOUCHED, Pending, Wire
from crossdock.dispatch.agreement import RankFailure
from crossdock.dispatch.alltoall import AllToAllDispatcher, AllToAllHandle
from crossdock.dispatch.dispatcher import Dispatched
from crossdock.dispatch.nodes import Nodes
from crossdock.dispatch.traffic import Traffic

__all__ = ["HierarchicalDispatcher", "HierarchicalHandle"]


class HierarchicalHandle(NamedTuple):
    """Of the hop between nodes, and of the hop within the node."""

    between: AllToAllHandle
    within: AllToAllHandle


class HierarchicalDispatcher:
    """A token travels to the rank of its own place in each node that holds any of its slots, and on from there.

    Each hop is a plain all-to-all, over the ranks of one place in all nodes and over those of a node. Results come back
    the same way: what a node computed for a token is summed before it leaves, in fp32, and rounded to the activations'
    dtype or the wire's, so a result is rounded once per hop. The hop between nodes overlaps with other work, the hop
    within does not. Rows are in (place of the source rank, its node, position) order.

    Args:
        group: the expert-parallel ranks; node `n` has the places `n * ranks_per_node` and on.
        slots_per_rank: `P/R`.
        ranks_per_node: a proper divisor of the group's size.
        wire: what rows look like while they travel, on both hops.
        chunks: parts that a rank's tokens are dispatched in, each by a call.
        debug_checks: look at ids on a GPU too, where it costs a sync.
    """

    ordered = False

    def __init__(
        self,
        group: dist.ProcessGroup,
        slots_per_rank: int,
        ranks_per_node: int,
        *,
        wire: Wire = UNTOUCHED,
        chunks: int = 1,
        debug_checks: bool = False,
    ) -> None:
        between, within = _groups(group, ranks_per_node)
        nodes, self.node = Nodes.consecutive(between.size(), 1), between.rank()
        self.between = AllToAllDispatcher(
            between,
            slots_per_rank * ranks_per_node,
            nodes,
            wire=wire,
            chunks=chunks,
            debug_checks=debug_checks,
            whole=group,
        )
        self.within = AllToAllDispatcher(within, slots_per_rank, wire=wire, chunks=chunks, whole=group)

    @property
    def traffic(self) -> Traffic:
        """Of both hops since they were made."""
        return self.between.traffic + self.within.traffic

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        try:
            arriving = self.between.dispatch(x, slot_ids, weights)
        except (ValueError, RankFailure) as error:
            # Those of this node may know of nothing yet: they wait for the second hop.
            self.within.refuse(slot_ids.device, cause=error)
            raise

        def finish() -> Dispatched:
            entered = arriving.wait()
            from_nodes = entered.handle.splits.recv
            first = sum(from_nodes[: self.node])
            own = slice(first, first + from_nodes[self.node])
            arriving_there = self.within.dispatch(entered.tokens, entered.slot_ids, entered.weights, own)
            arrived = arriving_there.wait()
            handle = HierarchicalHandle(entered.handle, arrived.handle)
            return Dispatched(arrived.tokens, arrived.slot_ids, arrived.weights, handle)

        return Pending(finish)

    def refuse(self, device: torch.device) -> None:
        self.between.refuse(device)
        self.within.refuse(device)

    def combine(self, y: Tensor, handle: Any) -> Pending[Tensor]:
        return self.between.combine(self.within.combine(y, handle.within).wait(), handle.between)


# One pair for all layers, for as long as the group lives: a pair that outlives it would keep its threads.
_PAIRS: WeakKeyDictionary[dist.ProcessGroup, dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]]]
_PAIRS = WeakKeyDictionary()


def _groups(group: dist.ProcessGroup, ranks_per_node: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks of this rank's place in all nodes, and those of its node."""
    pairs = _PAIRS.setdefault(group, {})
    if ranks_per_node not in pairs:
        pairs[ranks_per_node] = _make_groups(group, ranks_per_node)
    return pairs[ranks_per_node]


def _make_groups(group: dist.ProcessGroup, ranks_per_node: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    ranks, own = dist.get_process_group_ranks(group), group.rank()
    node, place = divmod(own, ranks_per_node)
    # Theirs would be torch's default, whatever the group's is.
    device = next(iter(group._device_types))
    options = group._get_backend(device).options
    timeout = None if options is None else options._timeout  # a group of a dry run has none

    def make(members: list[int]) -> dist.ProcessGroup:
        made = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        return made

    return make(ranks[place::ranks_per_node]), make(ranks[node * ranks_per_node : (node + 1) * ranks_per_node])
