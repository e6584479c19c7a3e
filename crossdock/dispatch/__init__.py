"""Dispatchers: how tokens travel to their experts and back, all to one contract."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
import torch.distributed as dist

from crossdock.comm import UNTOUCHED, Wire
from crossdock.dispatch.agreement import RankFailure, RankMismatch
from crossdock.dispatch.allgather import AllGatherDispatcher
from crossdock.dispatch.alltoall import AllToAllDispatcher
from crossdock.dispatch.dispatcher import Dispatched, Dispatcher
from crossdock.dispatch.hierarchical import HierarchicalDispatcher
from crossdock.dispatch.local import LocalDispatcher
from crossdock.dispatch.static import StaticDispatcher
from crossdock.dispatch.traffic import Traffic, least_traffic

__all__ = [
    "DISPATCHERS",
    "STATIC_DISPATCHERS",
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "Dispatched",
    "Dispatcher",
    "DispatcherBuilder",
    "HierarchicalDispatcher",
    "LocalDispatcher",
    "RankFailure",
    "RankMismatch",
    "StaticDispatcher",
    "Traffic",
    "build_dispatcher",
    "least_traffic",
    "node_size",
]


class DispatcherBuilder(Protocol):
    """What `DISPATCHERS` holds."""

    def __call__(
        self, group: dist.ProcessGroup, slots_per_rank: int, ranks_per_node: int, *, wire: Wire, debug_checks: bool
    ) -> Dispatcher: ...


def _hierarchical(
    group: dist.ProcessGroup, slots_per_rank: int, ranks_per_node: int, *, wire: Wire, debug_checks: bool
) -> Dispatcher:
    if group.size() % ranks_per_node:
        raise ValueError(
            f"ranks_per_node = {ranks_per_node} must divide the {group.size()} ranks that hold the experts, for "
            "dispatcher 'hierarchical'; use 'alltoall'"
        )
    if ranks_per_node in (1, group.size()):
        return AllToAllDispatcher(group, slots_per_rank, ranks_per_node, wire=wire, debug_checks=debug_checks)
    return HierarchicalDispatcher(group, slots_per_rank, ranks_per_node, wire=wire, debug_checks=debug_checks)


DISPATCHERS: Mapping[str, DispatcherBuilder] = MappingProxyType(
    {"allgather": AllGatherDispatcher, "alltoall": AllToAllDispatcher, "hierarchical": _hierarchical}
)

STATIC_DISPATCHERS = ("allgather", "alltoall")
"""Those of `DISPATCHERS` that `static_shapes` goes with; with worst-case buffers they are one."""


def build_dispatcher(
    name: str,
    group: dist.ProcessGroup,
    slots_per_rank: int,
    ranks_per_node: int = 0,
    *,
    wire: Wire = UNTOUCHED,
    debug_checks: bool = False,
    static_shapes: bool = False,
) -> Dispatcher:
    """The dispatcher `name` for the ranks of `group`; with one rank it is `local`, whatever the name.

    Args:
        name: of `DISPATCHERS`.
        group: the expert-parallel ranks.
        slots_per_rank: `P/R`.
        ranks_per_node: consecutive ranks of the group that make a node; 0: one per GPU of this machine, all of them
            where there is none. More than the group has: all of them.
        wire: what rows look like while they travel.
        debug_checks: look at ids on a GPU too, where it costs a sync.
        static_shapes: worst-case buffers and no host sync, for `allgather` and `alltoall` (`StaticDispatcher`).

    Raises:
        ValueError: for an unknown name, for one without static shapes, or where nodes that do not divide the group
            matter.
    """
    if name not in DISPATCHERS:
        raise ValueError(f"dispatcher {name!r} is unknown; valid: {', '.join(sorted(DISPATCHERS))}")
    if static_shapes and name not in STATIC_DISPATCHERS:
        raise ValueError(f"static_shapes needs dispatcher {' or '.join(STATIC_DISPATCHERS)}, not {name}")
    if group.size() == 1:
        return LocalDispatcher()
    if static_shapes:
        nodes = node_size(group.size(), ranks_per_node)
        return StaticDispatcher(group, slots_per_rank, nodes, wire=wire, debug_checks=debug_checks)
    return DISPATCHERS[name](
        group, slots_per_rank, node_size(group.size(), ranks_per_node), wire=wire, debug_checks=debug_checks
    )


def node_size(num_ranks: int, ranks_per_node: int) -> int:
    """Of `num_ranks` expert-parallel ranks, how many make a node (`build_dispatcher`)."""
    return min(ranks_per_node or torch.cuda.device_count() or num_ranks, num_ranks)
