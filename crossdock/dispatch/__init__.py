"""Dispatchers: how tokens travel to their experts and back, all to one contract."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.distributed as dist

from crossdock.dispatch.alltoall import AllToAllDispatcher
from crossdock.dispatch.dispatcher import Dispatched, Dispatcher
from crossdock.dispatch.local import LocalDispatcher

__all__ = ["DISPATCHERS", "AllToAllDispatcher", "Dispatched", "Dispatcher", "LocalDispatcher", "build_dispatcher"]

# Name -> builder(process group of the expert-parallel ranks, slots per rank).
DISPATCHERS: Mapping[str, Callable[[dist.ProcessGroup, int], Dispatcher]] = MappingProxyType(
    {"alltoall": AllToAllDispatcher}
)


def build_dispatcher(name: str, group: dist.ProcessGroup, slots_per_rank: int) -> Dispatcher:
    """The dispatcher `name` for the ranks of `group`; with one rank it is `local`, whatever the name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in DISPATCHERS:
        raise ValueError(f"dispatcher {name!r} is unknown; valid: {', '.join(sorted(DISPATCHERS))}")
    if group.size() == 1:
        return LocalDispatcher()
    return DISPATCHERS[name](group, slots_per_rank)
