"""The dispatcher of a name, for a group of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.distributed as dist

from crossdock.dispatch.allgather import AllGatherDispatcher
from crossdock.dispatch.alltoall import AllToAllDispatcher
from crossdock.dispatch.deepep import DeepEPDispatcher
from crossdock.dispatch.dispatcher import Dispatcher
from crossdock.dispatch.hierarchical import HierarchicalDispatcher
from crossdock.dispatch.local import LocalDispatcher
from crossdock.dispatch.nodes import Nodes, find_nodes
from crossdock.dispatch.options import DispatchOptions
from crossdock.dispatch.static import StaticDispatcher
from crossdock.dispatch.symmetric import SymmetricDispatcher

__all__ = ["DISPATCHERS", "STATIC_DISPATCHERS", "build_dispatcher"]

# Process group of the expert-parallel ranks, slots per rank, their nodes, options.
DispatcherBuilder = Callable[[dist.ProcessGroup, int, Nodes, DispatchOptions], Dispatcher]


def _local(group: dist.ProcessGroup, slots: int, nodes: Nodes, options: DispatchOptions) -> Dispatcher:
    if group.size() > 1:
        raise ValueError(
            f"dispatcher 'local' is for one rank that holds all experts, not for {group.size()}; use 'auto' or "
            "'alltoall'"
        )
    return LocalDispatcher(slots, debug_checks=options.debug_checks)


def _allgather(group: dist.ProcessGroup, slots: int, nodes: Nodes, options: DispatchOptions) -> Dispatcher:
    kind = StaticDispatcher if options.static_shapes else AllGatherDispatcher
    return kind(
        group, slots, nodes, wire=options.wire, chunks=options.overlap_chunks, debug_checks=options.debug_checks
    )


def _alltoall(group: dist.ProcessGroup, slots: int, nodes: Nodes, options: DispatchOptions) -> Dispatcher:
    if options.static_shapes:
        return _allgather(group, slots, nodes, options)
    return AllToAllDispatcher(
        group, slots, nodes, wire=options.wire, chunks=options.overlap_chunks, debug_checks=options.debug_checks
    )


def _hierarchical(group: dist.ProcessGroup, slots: int, nodes: Nodes, options: DispatchOptions) -> Dispatcher:
    if nodes.size is None:
        raise ValueError(
            f"dispatcher 'hierarchical' with ranks_per_node = {options.ranks_per_node} needs nodes of as many "
            f"consecutive ranks each; the {group.size()} ranks that hold the experts are on nodes {nodes}; use "
            "'alltoall'"
        )
    if nodes.size in (1, group.size()):
        return _alltoall(group, slots, nodes, options)
    return HierarchicalDispatcher(
        group, slots, nodes.size, wire=options.wire, chunks=options.overlap_chunks, debug_checks=options.debug_checks
    )


def _deepep(group: dist.ProcessGroup, slots: int, nodes: Nodes, options: DispatchOptions) -> Dispatcher:
    if options.wire.dtype != "same":
        raise ValueError(
            f"dispatcher 'deepep' has no wire_dtype = {options.wire.dtype!r}; deepep_fp8_dispatch = true sends tokens "
            "in fp8"
        )
    return DeepEPDispatcher(
        group, slots, nodes, options.deepep, chunks=options.overlap_chunks, debug_checks=options.debug_checks
    )


def _symmetric(group: dist.ProcessGroup, slots: int, nodes: Nodes, options: DispatchOptions) -> Dispatcher:
    return SymmetricDispatcher.of_group(
        group,
        slots,
        nodes,
        wire=options.wire,
        chunks=options.overlap_chunks,
        static_shapes=options.static_shapes,
        debug_checks=options.debug_checks,
    )


DISPATCHERS: Mapping[str, DispatcherBuilder] = MappingProxyType(
    {
        "allgather": _allgather,
        "alltoall": _alltoall,
        "deepep": _deepep,
        "hierarchical": _hierarchical,
        "local": _local,
        "symmetric": _symmetric,
    }
)
"""What builds each dispatcher, by the name that a user gives."""

STATIC_DISPATCHERS = ("allgather", "alltoall", "symmetric")
"""Those of `DISPATCHERS` that `static_shapes` goes with; with worst-case buffers the first two are one."""


def build_dispatcher(
    name: str, group: dist.ProcessGroup, slots_per_rank: int, options: DispatchOptions | None = None
) -> Dispatcher:
    """The dispatcher `name` for the ranks of `group`; with one rank it is `local`, whatever the name.

    Args:
        name: of `DISPATCHERS`.
        group: the expert-parallel ranks.
        slots_per_rank: `P/R`.
        options: the same on all ranks.

    Raises:
        ValueError: for an unknown name, `local` with several ranks, options that it does not have, where nodes that are
            not alike matter, or where `deepep` lacks its library or `symmetric` cannot run.
    """
    options = options or DispatchOptions()
    if name not in DISPATCHERS:
        raise ValueError(f"dispatcher {name!r} is unknown; valid: {', '.join(sorted(DISPATCHERS))}")
    if options.static_shapes and name not in (*STATIC_DISPATCHERS, "local"):
        raise ValueError(f"static_shapes needs dispatcher {' or '.join(STATIC_DISPATCHERS)}, not {name}")
    if group.size() == 1:
        name = "local"
    nodes = find_nodes(dist.get_process_group_ranks(group), options.ranks_per_node)
    return DISPATCHERS[name](group, slots_per_rank, nodes, options)
