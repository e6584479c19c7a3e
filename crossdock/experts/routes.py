"""Routes sorted by slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SortedRoutes", "count_routes", "sort_routes"]


class SortedRoutes(NamedTuple):
    """Routes in (slot, token, k) order.

    Attributes:
        route: `[N]`, flat indices `u * K + k`: the real routes, or all `U K` with those that are none at the end.
        counts: `[P/R]`, real routes per slot.
    """

    route: Tensor
    counts: Tensor


def sort_routes(slot_ids: Tensor, num_slots: int, *, static: bool = False) -> SortedRoutes:
    """Sort the routes of `slot_ids [U, K]` by slot, stably; `-1` is no route.

    Args:
        static: keep all routes, so that no shape depends on the ids, without a sync. Otherwise what is no route is left
            out, which takes one device-to-host copy.
    """
    slots = slot_ids.flatten()
    if static:
        slots = torch.where(slots < 0, num_slots, slots)
        route = slots.argsort(stable=True)
        return SortedRoutes(route, count_routes(slot_ids, num_slots))
    route = (slots >= 0).nonzero().squeeze(1)
    route = route[slots[route].argsort(stable=True)]
    return SortedRoutes(route, count_routes(slot_ids, num_slots))


def count_routes(slot_ids: Tensor, num_slots: int) -> Tensor:
    """Routes per slot `[P/R]` int64 of `slot_ids [U, K]`; `-1` is not counted."""
    slots = torch.where(slot_ids < 0, num_slots, slot_ids).flatten()
    return slots.new_zeros(num_slots + 1).scatter_add_(0, slots, torch.ones_like(slots))[:num_slots]
