"""The dispatcher of a name, for a group of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.distributed as dist

from crossdock.dispatch.allgather import AllGatherDispatcher
from crossdock.dispatch.alltoall import AllToAllDispatcher
from crossdock.dispatch.deepep import DeepEPDispatcher
from crossdock.dispatch.dispatcher import Dispatcher
from crossdock.dispatch.hierarchical import HierarchicalDispatcher
from crossdock.dispatch.local import LocalDispatcher
from crossdock.dispatch.options import DispatchOptions
from crossdock.dispatch.static import StaticDispatcher

__all__ = ["DISPATCHERS", "STATIC_DISPATCHERS", "build_dispatcher", "node_size"]

# Process group of the expert-parallel ranks, slots per rank, ranks per node (a size of the group at most), options.
DispatcherBuilder = Callable[[dist.ProcessGroup, int, int, DispatchOptions], Dispatcher]


def _local(group: dist.ProcessGroup, slots: int, node: int, options: DispatchOptions) -> Dispatcher:
    if group.size() > 1:
        raise ValueError(
            f"dispatcher 'local' is for one rank that holds all experts, not for {group.size()}; use 'auto' or "
            "'alltoall'"
        )
    return LocalDispatcher(slots, debug_checks=options.debug_checks)


def _allgather(group: dist.ProcessGroup, slots: int, node: int, options: DispatchOptions) -> Dispatcher:
    kind = StaticDispatcher if options.static_shapes else AllGatherDispatcher
    return kind(group, slots, node, wire=options.wire, chunks=options.overlap_chunks, debug_checks=options.debug_checks)


def _alltoall(group: dist.ProcessGroup, slots: int, node: int, options: DispatchOptions) -> Dispatcher:
    if options.static_shapes:
        return _allgather(group, slots, node, options)
    return AllToAllDispatcher(
        group, slots, node, wire=options.wire, chunks=options.overlap_chunks, debug_checks=options.debug_checks
    )


def _hierarchical(group: dist.ProcessGroup, slots: int, node: int, options: DispatchOptions) -> Dispatcher:
    if group.size() % node:
        raise ValueError(
            f"ranks_per_node = {node} must divide the {group.size()} ranks that hold the experts, for dispatcher "
            "'hierarchical'; use 'alltoall'"
        )
    if node in (1, group.size()):
        return _alltoall(group, slots, node, options)
    return HierarchicalDispatcher(
        group, slots, node, wire=options.wire, chunks=options.overlap_chunks, debug_checks=options.debug_checks
    )


def _deepep(group: dist.ProcessGroup, slots: int, node: int, options: DispatchOptions) -> Dispatcher:
    if options.wire.dtype != "same":
        raise ValueError(
            f"dispatcher 'deepep' has no wire_dtype = {options.wire.dtype!r}; deepep_fp8_dispatch = true sends tokens "
            "in fp8"
        )
    return DeepEPDispatcher(
        group, slots, node, options.deepep, chunks=options.overlap_chunks, debug_checks=options.debug_checks
    )


DISPATCHERS: Mapping[str, DispatcherBuilder] = MappingProxyType(
    {
        "allgather": _allgather,
        "alltoall": _alltoall,
        "deepep": _deepep,
        "hierarchical": _hierarchical,
        "local": _local,
    }
)

STATIC_DISPATCHERS = ("allgather", "alltoall")
"""Those of `DISPATCHERS` that `static_shapes` goes with; with worst-case buffers they are one."""


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
        ValueError: for an unknown name, `local` with several ranks, options that it does not have, where nodes that do
            not divide the group matter, or where `deepep` lacks its library.
    """
    options = options or DispatchOptions()
    if name not in DISPATCHERS:
        raise ValueError(f"dispatcher {name!r} is unknown; valid: {', '.join(sorted(DISPATCHERS))}")
    if options.static_shapes and name not in (*STATIC_DISPATCHERS, "local"):
        raise ValueError(f"static_shapes needs dispatcher {' or '.join(STATIC_DISPATCHERS)}, not {name}")
    if group.size() == 1:
        name = "local"
    return DISPATCHERS[name](group, slots_per_rank, node_size(group.size(), options.ranks_per_node), options)


def node_size(num_ranks: int, ranks_per_node: int) -> int:
    """Of `num_ranks` expert-parallel ranks, how many make a node; `ranks_per_node` as in `DispatchOptions`."""
    return min(ranks_per_node or torch.cuda.device_count() or num_ranks, num_ranks)
