"""Routes sorted by slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SortedRoutes", "sort_routes"]


class SortedRoutes(NamedTuple):
    """Real routes in (slot, token, k) order: `route [N]`, flat index `u * K + k`; `counts [P/R]`, routes per slot."""

    route: Tensor
    counts: Tensor


def sort_routes(slot_ids: Tensor, num_slots: int) -> SortedRoutes:
    """Sort the routes of `slot_ids [U, K]` by slot, stably; `-1` is left out. One device-to-host copy."""
    slots = slot_ids.flatten()
    route = (slots >= 0).nonzero().squeeze(1)
    route = route[slots[route].argsort(stable=True)]
    counts = torch.zeros(num_slots, dtype=torch.int64, device=slots.device)
    return SortedRoutes(route, counts.scatter_add_(0, slots[route], torch.ones_like(route)))
