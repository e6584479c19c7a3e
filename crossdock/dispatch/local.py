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
    """All slots are this rank's own (`ep = 1`): rows, ids and weights pass through."""

    ordered = True

    def __init__(self) -> None:
        self.traffic = Traffic()

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        check_inputs(x, slot_ids, weights, None)
        dispatched = Dispatched(x, slot_ids, weights, handle=())
        return Pending(lambda: dispatched)

    def refuse(self, device: torch.device) -> None:
        pass

    def combine(self, y: Tensor, handle: object) -> Pending[Tensor]:
        return Pending(lambda: y)
