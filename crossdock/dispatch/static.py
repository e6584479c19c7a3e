"""Worst-case buffers: shapes that depend on no routing, and no host sync."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from crossdock.comm import UNTOUCHED, Pending, Wire
from crossdock.dispatch.allgather import AllGatherDispatcher
from crossdock.dispatch.checks import check_inputs
from crossdock.dispatch.dispatcher import Dispatched
from crossdock.dispatch.nodes import Nodes

__all__ = ["StaticDispatcher"]


class StaticDispatcher(AllGatherDispatcher):
    """Every rank gets room for every rank's tokens; what has no token is padding, with ids `-1` and weights 0.

    A rank may need all tokens, so that the worst case of an all-to-all is an all-gather. The first call exchanges
    counts; from then on every rank pads to the most tokens that any had. What only one rank does wrong after that, the
    others learn at the process group's time-out, unless `debug_checks` has counts exchanged in every call.

    Args:
        group: the expert-parallel ranks.
        slots_per_rank: `P/R`.
        nodes: of the ranks, for `traffic`; one if `None`.
        wire: what rows look like while they travel.
        chunks: parts that a rank's tokens are dispatched in, each by a call.
        debug_checks: exchange counts and look at ids in every call, which costs a sync.

    Attributes:
        max_tokens: tokens of each rank, padding included; `None` until the first call.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        slots_per_rank: int,
        nodes: Nodes | None = None,
        *,
        wire: Wire = UNTOUCHED,
        chunks: int = 1,
        debug_checks: bool = False,
    ) -> None:
        super().__init__(group, slots_per_rank, nodes, wire=wire, chunks=chunks, debug_checks=debug_checks)
        self.debug_checks = debug_checks
        self.max_tokens: int | None = None

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        if self._exchanges_counts():
            self.agreement.check(x, slot_ids, weights)
            # A recompute of the first call finds the size agreed on and exchanges no counts. Selective recompute, which
            # hands out what it saved in the order of the calls, must not have seen them then.
            with nullcontext() if self.debug_checks else _disable_current_modes():
                most = max(self._counts(x, slot_ids, weights))
        else:
            check_inputs(x, slot_ids, weights, None)
            most = len(x)
        if self.max_tokens is None:
            self.max_tokens = most
        if most > self.max_tokens:
            raise ValueError(
                f"{most} tokens are more than the {self.max_tokens} that static_shapes has room for, the most of any "
                "rank in the first call; begin with the largest batch, or set static_shapes = false"
            )
        missing = self.max_tokens - len(x)
        padding = (0, 0, 0, missing)
        arriving = self._gather(
            F.pad(x, padding),
            F.pad(slot_ids, padding, value=-1),
            F.pad(weights, padding),
            [self.max_tokens] * self.num_ranks,
        )

        def finish() -> Dispatched:
            arrived = arriving.wait()
            handle = arrived.handle._replace(num_tokens=len(x))
            return Dispatched(arrived.tokens, arrived.slot_ids, arrived.weights, handle)

        return Pending(finish)

    def refuse(self, device: torch.device) -> None:
        if self._exchanges_counts():
            super().refuse(device)

    def combine(self, y: Tensor, handle: Any) -> Pending[Tensor]:
        returning = super().combine(y, handle)
        return Pending(lambda: returning.wait()[: handle.num_tokens])

    def _exchanges_counts(self) -> bool:
        return self.max_tokens is None or self.debug_checks
