"""How tokens travel, beside the dispatcher's name."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossdock.comm import UNTOUCHED, Wire
from crossdock.dispatch.deepep_api import DeepEPOptions

__all__ = ["DispatchOptions"]


@dataclass(frozen=True)
class DispatchOptions:
    """Options of all dispatchers; the same on all ranks.

    Attributes:
        ranks_per_node: consecutive ranks of the group that make a node; 0: as they were launched (`find_nodes`). More
            than the group has: all of them.
        wire: what rows look like while they travel; `deepep` has options of its own.
        static_shapes: worst-case buffers and no host sync, for `allgather` and `alltoall` (`StaticDispatcher`), and
            `symmetric`.
        debug_checks: look at ids on a GPU too, where it costs a sync.
        deepep: of dispatcher `deepep`.
        overlap_chunks: parts that a rank's tokens are dispatched in, on which all ranks must agree.
    """

    ranks_per_node: int = 0
    wire: Wire = UNTOUCHED
    static_shapes: bool = False
    debug_checks: bool = False
    deepep: DeepEPOptions = field(default_factory=DeepEPOptions)
    overlap_chunks: int = 1
