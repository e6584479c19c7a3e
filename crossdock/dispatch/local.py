"""The dispatcher of one rank: nothing travels."""

from __future__ import annotations

from torch import Tensor

from crossdock.comm import Pending
from crossdock.dispatch.dispatcher import Dispatched
from crossdock.dispatch.traffic import Traffic

__all__ = ["LocalDispatcher"]


class LocalDispatcher:
    """All slots are this rank's own (`ep = 1`): rows, ids and weights pass through."""

    ordered = True

    def __init__(self) -> None:
        self.traffic = Traffic()

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        dispatched = Dispatched(x, slot_ids, weights, handle=())
        return Pending(lambda: dispatched)

    def combine(self, y: Tensor, handle: object) -> Pending[Tensor]:
        return Pending(lambda: y)
