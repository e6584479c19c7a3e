"""The contract of every dispatcher (docs/design.md, contract 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from crossdock.comm import Pending
from crossdock.dispatch.traffic import Traffic

__all__ = ["Dispatched", "Dispatcher"]


@dataclass(frozen=True)
class Dispatched:
    """What arrived at this rank.

    Attributes:
        tokens: `[U, H]`, one row per token and source rank, in (source rank, position) order where `ordered`.
        slot_ids: `[U, K']` int64, the rank's own slots `0 .. P/R - 1`; `-1` is no route.
        weights: `[U, K']` fp32 (float64 in a float64 model), `0` where there is no route.
        handle: what `combine` needs; tensors and ints only.
        scales: `[U, H / 128]` where tokens are quantised, else `None`.
        tokens_per_slot: `[P/R]` where the dispatcher knows them.
        grouped: `K' = 1` and rows arrive sorted by slot.
    """

    tokens: Tensor
    slot_ids: Tensor
    weights: Tensor
    handle: Any
    scales: Tensor | None = None
    tokens_per_slot: Tensor | None = None
    grouped: bool = False


class Dispatcher(Protocol):
    """Moves tokens to the ranks that own their slots, and results back. Knows nothing of what experts compute."""

    ordered: bool

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent since the dispatcher was made, and the least for that. May wait for the GPU."""
        ...

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        """Send `x` `[T, H]` to the ranks of its `slot_ids` `[T, K]` (global, `-1` is no route) with `weights` `[T, K]`.

        A token crosses to a rank once, however many of its experts live there. Differentiable in `x` and `weights`.

        Raises:
            ValueError: for a wrong shape, dtype, device or (on a CPU, or with `debug_checks`) id; names the argument.
            RankFailure: where another rank has raised, or refused; here or when the value is waited for.
            RankMismatch: a ValueError, where tensors of the ranks do not go together.
        """
        ...

    def refuse(self, device: torch.device) -> None:
        """In place of `dispatch`, tell the other ranks that this one cannot: theirs raises. The caller raises then.

        Args:
            device: where tokens would have been.
        """
        ...

    def combine(self, y: Tensor, handle: Any) -> Pending[Tensor]:
        """Send `y` `[U, H]` back and sum per token, in rank order and in fp32, rounded once: `[T, H]`.

        Raises:
            ValueError: for a wrong shape or dtype of `y`. The other ranks do not learn of it: they wait until the
                process group's time-out.
        """
        ...
