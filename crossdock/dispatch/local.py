"""The dispatcher of one rank: nothing travels."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.comm import Pending
from crossdock.dispatch.checks import check_inputs
from crossdock.dispatch.dispatcher import Dispatched
from crossdock.dispatch.traffic import Traffic

__all__ = ["LocalDispatcher"]


class LocalDispatcher:
    """All slots are this rank's own (`ep = 1`): rows, ids and weights pass through.

    Args:
        num_slots: `P`, which ids are checked against.
        debug_checks: look at ids on a GPU too, where it costs a sync.
    """

    ordered = True

    def __init__(self, num_slots: int, *, debug_checks: bool = False) -> None:
        self.num_slots, self.debug_checks = num_slots, debug_checks
        self.traffic = Traffic()

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        check_inputs(x, slot_ids, weights, self.num_slots if self.debug_checks or x.is_cpu else None)
        dispatched = Dispatched(x, slot_ids, weights, handle=())
        return Pending(lambda: dispatched)

    def refuse(self, device: torch.device) -> None:
        pass

    def combine(self, y: Tensor, handle: object) -> Pending[Tensor]:
        return Pending(lambda: y)
