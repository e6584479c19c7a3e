"""Routes sorted by slot: a stable counting sort in three passes.

Blocks of routes are counted (`histogram [S, B]`, slots times blocks). A running sum over it, slot by slot and within
one block by block, tells where each block's routes of each slot begin; a second pass over the routes puts them there. A
route's rank among the equal ones of its block comes from comparing them all: no atomics, so the order is the same in
every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.kernels.runtime import cdiv, device_of, jit, runs, tl

__all__ = ["RouteOrder", "counting_sort", "counting_sort_reference", "invert_order", "invert_order_reference"]

_BLOCK, _NUM_WARPS = 128, 8


class RouteOrder(NamedTuple):
    """`M = U K` routes by slot, for `slot_ids [U, K]`; all int64.

    Attributes:
        order: `[M]`: the flat indices `u * K + k` of the real routes in (slot, token, k) order, then `-1`.
        counts: `[S]`: real routes per slot.
        row_of_route: `[U, K]`: where in `order` each route is, `-1` where there is none.
    """

    order: Tensor
    counts: Tensor
    row_of_route: Tensor


def counting_sort(slot_ids: Tensor, num_slots: int) -> RouteOrder:
    """Sort the routes of `slot_ids [U, K]` (integers) by slot, stably, without a copy to the host.

    An id outside `0 .. num_slots - 1` is no route. `order[order >= 0]` and `counts` are what
    `sort_routes` of crossdock/experts gives; shapes do not depend on the ids.
    """
    if not runs(slot_ids):
        return counting_sort_reference(slot_ids, num_slots)
    slots = slot_ids.contiguous()
    num_routes, device = slots.numel(), slots.device
    num_blocks = cdiv(num_routes, _BLOCK)
    order = torch.full((num_routes,), -1, dtype=torch.int64, device=device)
    row_of_route = torch.empty(slots.shape, dtype=torch.int64, device=device)
    histogram = torch.zeros(num_slots, num_blocks, dtype=torch.int64, device=device)
    if num_routes:
        sizes = (num_routes, num_blocks, num_slots)
        with device_of(slots):
            _count_kernel[(num_blocks,)](slots, histogram, *sizes, BLOCK=_BLOCK, num_warps=_NUM_WARPS)
            first = histogram.flatten().cumsum(0) - histogram.flatten()
            _scatter_kernel[(num_blocks,)](
                slots, first, order, row_of_route, *sizes, BLOCK=_BLOCK, num_warps=_NUM_WARPS
            )
    return RouteOrder(order, histogram.sum(1), row_of_route)


def counting_sort_reference(slot_ids: Tensor, num_slots: int) -> RouteOrder:
    """What `counting_sort` computes, in torch's own operations; no copy to the host either."""
    slots = slot_ids.flatten().long()
    real = (slots >= 0) & (slots < num_slots)
    key = torch.where(real, slots, num_slots)
    by_slot = key.argsort(stable=True)
    counts = torch.zeros(num_slots + 1, dtype=torch.int64, device=slots.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    row = torch.empty_like(by_slot).scatter_(0, by_slot, torch.arange(len(by_slot), device=slots.device))
    return RouteOrder(
        torch.where(real[by_slot], by_slot, -1), counts[:num_slots], torch.where(real, row, -1).view(slot_ids.shape)
    )


def invert_order(order: Tensor, num_routes: int) -> Tensor:
    """`row_of_route [num_routes]` of `order [M]`: each route's row, `-1` for one that has none."""
    if not runs(order):
        return invert_order_reference(order, num_routes)
    row_of_route = torch.full((num_routes,), -1, dtype=torch.int64, device=order.device)
    if len(order):
        with device_of(order):
            _invert_kernel[(cdiv(len(order), 1024),)](order.contiguous(), row_of_route, len(order), BLOCK=1024)
    return row_of_route


def invert_order_reference(order: Tensor, num_routes: int) -> Tensor:
    """What `invert_order` computes, in torch's own operations; no copy to the host either."""
    row_of_route = order.new_full((num_routes + 1,), -1)
    # Rows without a route all write to the place that is cut off.
    place = torch.where(order < 0, num_routes, order)
    return row_of_route.scatter_(0, place, torch.arange(len(order), device=order.device))[:num_routes]


@jit
def _invert_kernel(order_ptr, row_of_route_ptr, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    route = tl.load(order_ptr + row, mask=row < num_rows, other=-1)
    tl.store(row_of_route_ptr + route, row, mask=route >= 0)


@jit
def _load_block(slots_ptr, num_routes, num_slots, BLOCK: tl.constexpr):
    """The block's flat indices and slots (-1: none); for every two of its routes: are they equal, is one earlier."""
    place = tl.arange(0, BLOCK)
    index = tl.program_id(0).to(tl.int64) * BLOCK + place
    slot = tl.load(slots_ptr + index, mask=index < num_routes, other=-1)
    slot = tl.where((slot >= 0) & (slot < num_slots), slot, -1).to(tl.int32)
    equal = slot[:, None] == slot[None, :]
    return index, slot, equal, place[:, None] > place[None, :]


@jit
def _count_kernel(
    slots_ptr,  # [num_routes]
    histogram_ptr,  # [num_slots, num_blocks], zeros
    num_routes,
    num_blocks,
    num_slots,
    BLOCK: tl.constexpr,
):
    _, slot, equal, is_earlier = _load_block(slots_ptr, num_routes, num_slots, BLOCK)
    # Two sums in one: equal routes in the low half of 32 bits, earlier ones of them in the high half.
    sums = tl.sum(tl.where(equal, tl.where(is_earlier, 0x10001, 1), 0), axis=1)
    cell = slot.to(tl.int64) * num_blocks + tl.program_id(0)
    # The first of each slot's routes writes how many there are.
    tl.store(histogram_ptr + cell, sums & 0xFFFF, mask=(slot >= 0) & (sums >> 16 == 0))


@jit
def _scatter_kernel(
    slots_ptr,  # [num_routes]
    first_ptr,  # [num_slots, num_blocks]: the row of each block's first route of each slot
    order_ptr,  # [num_routes], -1
    row_of_route_ptr,  # [num_routes]
    num_routes,
    num_blocks,
    num_slots,
    BLOCK: tl.constexpr,
):
    index, slot, equal, is_earlier = _load_block(slots_ptr, num_routes, num_slots, BLOCK)
    rank = tl.sum((equal & is_earlier).to(tl.int32), axis=1)
    cell = slot.to(tl.int64) * num_blocks + tl.program_id(0)
    row = tl.load(first_ptr + cell, mask=slot >= 0, other=0) + rank
    tl.store(order_ptr + row, index, mask=slot >= 0)
    tl.store(row_of_route_ptr + index, tl.where(slot >= 0, row, -1), mask=index < num_routes)
