"""Dispatchers: how tokens travel to their experts and back, all to one contract."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.distributed as dist

from crossdock.dispatch.allgather import AllGatherDispatcher
from crossdock.dispatch.alltoall import AllToAllDispatcher
from crossdock.dispatch.deepep import DEEPEP_OPS, DeepEPDispatcher
from crossdock.dispatch.deepep_api import DeepEPOptions
from crossdock.dispatch.deepep_buffers import choose_deepep_api, free_deepep_buffers, load_deepep
from crossdock.dispatch.dispatcher import Dispatched, Dispatcher
from crossdock.dispatch.hierarchical import HierarchicalDispatcher
from crossdock.dispatch.local import LocalDispatcher
from crossdock.dispatch.traffic import Traffic, least_traffic

__all__ = [
    "DEEPEP_OPS",
    "DISPATCHERS",
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "DeepEPDispatcher",
    "DeepEPOptions",
    "Dispatched",
    "Dispatcher",
    "HierarchicalDispatcher",
    "LocalDispatcher",
    "Traffic",
    "build_dispatcher",
    "choose_deepep_api",
    "free_deepep_buffers",
    "least_traffic",
    "load_deepep",
    "node_size",
]


def _hierarchical(group: dist.ProcessGroup, slots_per_rank: int, ranks_per_node: int) -> Dispatcher:
    if group.size() % ranks_per_node:
        raise ValueError(
            f"ranks_per_node = {ranks_per_node} must divide the {group.size()} ranks that hold the experts, for "
            "dispatcher 'hierarchical'; use 'alltoall'"
        )
    if ranks_per_node in (1, group.size()):
        return AllToAllDispatcher(group, slots_per_rank, ranks_per_node)
    return HierarchicalDispatcher(group, slots_per_rank, ranks_per_node)


# Name -> builder(process group of the expert-parallel ranks, slots per rank, ranks per node).
DISPATCHERS: Mapping[str, Callable[[dist.ProcessGroup, int, int], Dispatcher]] = MappingProxyType(
    {
        "allgather": AllGatherDispatcher,
        "alltoall": AllToAllDispatcher,
        "deepep": DeepEPDispatcher,
        "hierarchical": _hierarchical,
    }
)


def build_dispatcher(
    name: str,
    group: dist.ProcessGroup,
    slots_per_rank: int,
    ranks_per_node: int = 0,
    deepep: DeepEPOptions | None = None,
) -> Dispatcher:
    """The dispatcher `name` for the ranks of `group`; with one rank it is `local`, whatever the name.

    Args:
        name: of `DISPATCHERS`.
        group: the expert-parallel ranks.
        slots_per_rank: `P/R`.
        ranks_per_node: consecutive ranks of the group that make a node; 0: one per GPU of this machine, all of them
            where there is none. More than the group has: all of them.
        deepep: options of `deepep`.

    Raises:
        ValueError: for an unknown name, where nodes that do not divide the group matter, or where `deepep` lacks its
            library.
    """
    if name not in DISPATCHERS:
        raise ValueError(f"dispatcher {name!r} is unknown; valid: {', '.join(sorted(DISPATCHERS))}")
    if group.size() == 1:
        return LocalDispatcher()
    if name == "deepep" and deepep is not None:
        return DeepEPDispatcher(group, slots_per_rank, node_size(group.size(), ranks_per_node), deepep)
    return DISPATCHERS[name](group, slots_per_rank, node_size(group.size(), ranks_per_node))


def node_size(num_ranks: int, ranks_per_node: int) -> int:
    """Of `num_ranks` expert-parallel ranks, how many make a node (`build_dispatcher`)."""
    return min(ranks_per_node or torch.cuda.device_count() or num_ranks, num_ranks)
