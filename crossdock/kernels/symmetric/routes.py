"""Ids and weights of routes that travel with rows, and the weights' gradients that travel back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossdock.kernels.runtime import cdiv, device_of, jit, tl
from crossdock.kernels.symmetric.memory import (
    Ring,
    RowLayout,
    Status,
    Window,
    as_pointer,
    next_power_of_two,
    triton_dtype,
)
from crossdock.kernels.symmetric.tiles import row_in_slot, slot_begin

__all__ = [
    "offer_weights",
    "offer_weights_reference",
    "pull_weights",
    "pull_weights_reference",
    "push_routes",
    "push_routes_reference",
    "take_routes",
    "take_routes_reference",
]

_BLOCK_ROWS, _NUM_WARPS = 64, 4


def push_routes(
    slot_ids: Tensor,
    weights: Tensor,
    slots_per_rank: int,
    row: Tensor,
    window: Window,
    ring: Ring,
    layout: RowLayout,
    ticket: Tensor,
    status: Status,
) -> None:
    """Write the routes of each token to the buffers of the ranks that need it: their own ids, foreign ones -1.

    Args:
        slot_ids: `[T, K]` int64, global, `-1` is no route.
        weights: `[T, K]` in the layout's dtype; those of foreign routes arrive as 0.
        row: `[T, R]` int32 as in `push_rows`.
    """
    if not slot_ids.numel():
        return
    with device_of(slot_ids):
        _push_kernel[(cdiv(len(slot_ids), _BLOCK_ROWS),)](
            *(slot_ids.contiguous(), weights.contiguous(), row, window.addresses, ticket, status.on_device),
            *(len(slot_ids), slots_per_rank, window.rank, window.rank * layout.capacity),
            *_offsets(ring, layout),
            NUM_RANKS=ring.num_ranks,
            **_constants(ring, layout),
        )


def take_routes(
    window: Window, ring: Ring, layout: RowLayout, ticket: Tensor, segments: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """The routes that have come with `take_rows`' rows: ids `[num_rows, K]` int64, weights `[num_rows, K]`.

    -1 and 0 in rows that no token has.
    """
    ids = torch.empty(num_rows, layout.top_k, dtype=torch.int64, device=ticket.device)
    weights = torch.empty(num_rows, layout.top_k, dtype=layout.weights, device=ticket.device)
    if ids.numel():
        with device_of(ids):
            _take_kernel[(cdiv(num_rows, _BLOCK_ROWS),)](
                *(window.own, segments, ticket, ids, weights, num_rows, layout.capacity),
                *_offsets(ring, layout),
                NUM_RANKS=ring.num_ranks,
                BLOCK_RANKS=next_power_of_two(ring.num_ranks),
                **_constants(ring, layout),
            )
    return ids, weights


def offer_weights(
    grads: Tensor, window: Window, ring: Ring, layout: RowLayout, ticket: Tensor, segments: Tensor, status: Status
) -> None:
    """Copy the gradients of `take_routes`' weights, `[U, K]`, to this rank's slot."""
    if not grads.numel():
        return
    with device_of(grads):
        _offer_kernel[(cdiv(len(grads), _BLOCK_ROWS),)](
            *(grads.contiguous(), window.own, segments, ticket, status.on_device, len(grads), layout.capacity),
            *_offsets(ring, layout),
            NUM_RANKS=ring.num_ranks,
            BLOCK_RANKS=next_power_of_two(ring.num_ranks),
            **_constants(ring, layout),
        )


def pull_weights(
    slot_ids: Tensor,
    slots_per_rank: int,
    row: Tensor,
    window: Window,
    ring: Ring,
    layout: RowLayout,
    ticket: Tensor,
) -> Tensor:
    """Read the gradient of each route's weight from the rank that owns its slot: `[T, K]`, 0 for no route."""
    grads = torch.empty(slot_ids.shape, dtype=layout.weights, device=slot_ids.device)
    if grads.numel():
        with device_of(grads):
            _pull_kernel[(cdiv(len(grads), _BLOCK_ROWS),)](
                *(slot_ids.contiguous(), row, window.addresses, ticket, grads),
                *(len(grads), slots_per_rank, window.rank * layout.capacity),
                *_offsets(ring, layout),
                NUM_RANKS=ring.num_ranks,
                **_constants(ring, layout),
            )
    return grads


def _constants(ring: Ring, layout: RowLayout) -> dict[str, object]:
    return {
        "NUM_SLOTS": ring.num_slots,
        "TOP_K": layout.top_k,
        "BLOCK_K": next_power_of_two(layout.top_k),
        "WEIGHT": triton_dtype(layout.weights),
        "BLOCK_ROWS": _BLOCK_ROWS,
        "num_warps": _NUM_WARPS,
    }


def _offsets(ring: Ring, layout: RowLayout) -> tuple[int, ...]:
    return ring.first_byte, ring.slot_bytes, layout.ids_byte, layout.weights_byte


def push_routes_reference(
    slot_ids: Tensor,
    weights: Tensor,
    slots_per_rank: int,
    row: Tensor,
    buffers: Sequence[Tensor],
    rank: int,
    ring: Ring,
    layout: RowLayout,
    ticket: int,
) -> None:
    """What `push_routes` of `rank` writes to all ranks' `buffers [bytes]`, in torch's own operations."""
    for peer, buffer in enumerate(buffers):
        needs = row[:, peer] >= 0
        local = slot_ids[needs] - peer * slots_per_rank
        own = (slot_ids[needs] >= 0) & (local >= 0) & (local < slots_per_rank)
        place = row[needs, peer].long()
        all_ids, all_weights = _routes(buffer, ring, layout, ticket)
        all_ids[rank, place] = local.masked_fill(~own, -1).to(torch.int32)
        all_weights[rank, place] = weights[needs].masked_fill(~own, 0)


def take_routes_reference(
    buffer: Tensor, ring: Ring, layout: RowLayout, ticket: int, segments: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """What `take_routes` returns of a rank's `buffer [bytes]`."""
    ids = torch.full((num_rows, layout.top_k), -1, dtype=torch.int64, device=buffer.device)
    weights = torch.zeros(num_rows, layout.top_k, dtype=layout.weights, device=buffer.device)
    all_ids, all_weights = _routes(buffer, ring, layout, ticket)
    for source, (start, count) in enumerate(segments.t().tolist()):
        ids[start : start + count] = all_ids[source, :count].long()
        weights[start : start + count] = all_weights[source, :count]
    return ids, weights


def offer_weights_reference(
    grads: Tensor, buffer: Tensor, ring: Ring, layout: RowLayout, ticket: int, segments: Tensor
) -> None:
    """What `offer_weights` writes to a rank's `buffer [bytes]`."""
    _, all_weights = _routes(buffer, ring, layout, ticket)
    for source, (start, count) in enumerate(segments.t().tolist()):
        all_weights[source, :count] = grads[start : start + count]


def pull_weights_reference(
    slot_ids: Tensor,
    slots_per_rank: int,
    row: Tensor,
    buffers: Sequence[Tensor],
    rank: int,
    ring: Ring,
    layout: RowLayout,
    ticket: int,
) -> Tensor:
    """What `pull_weights` of `rank` returns of all ranks' `buffers [bytes]`."""
    grads = torch.zeros(slot_ids.shape, dtype=layout.weights, device=slot_ids.device)
    for peer, buffer in enumerate(buffers):
        _, all_weights = _routes(buffer, ring, layout, ticket)
        own = (slot_ids >= 0) & (slot_ids // slots_per_rank == peer)
        read = all_weights[rank, row[:, peer].clamp(min=0).long()]
        grads = torch.where(own, read, grads)
    return grads


def _routes(buffer: Tensor, ring: Ring, layout: RowLayout, ticket: int) -> tuple[Tensor, Tensor]:
    """A slot's ids and weights, `[R, capacity, K]`."""
    shape, count = (layout.num_ranks, layout.capacity, layout.top_k), layout.num_rows * layout.top_k
    first = ring.slot_of(ticket)
    ids, weights = buffer[first + layout.ids_byte :], buffer[first + layout.weights_byte :]
    weight_bytes = layout.weights.itemsize * count
    return ids[: 4 * count].view(torch.int32).view(shape), weights[:weight_bytes].view(layout.weights).view(shape)


@jit
def _push_kernel(
    slots_ptr,  # [num_tokens, TOP_K]
    weights_ptr,  # [num_tokens, TOP_K]
    row_ptr,  # [num_tokens, NUM_RANKS]
    addresses_ptr,  # [NUM_RANKS]
    ticket_ptr,  # [1]
    status_ptr,  # [1]
    num_tokens,
    slots_per_rank,
    rank,
    first_row,
    first_byte,
    slot_bytes,
    ids_byte,
    weights_byte,
    NUM_RANKS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = (token < num_tokens)[:, None] & (k < TOP_K)
    slot_id = tl.load(slots_ptr + token[:, None] * TOP_K + k, mask=mask, other=-1)
    weight = tl.load(weights_ptr + token[:, None] * TOP_K + k, mask=mask, other=0)
    slot = slot_begin(ticket_ptr, first_byte, slot_bytes, NUM_SLOTS)
    writes = (token < num_tokens) & (tl.load(status_ptr) == 0)
    for step in tl.static_range(NUM_RANKS):  # pyright: ignore[reportGeneralTypeIssues]
        peer = (rank + step) % NUM_RANKS
        row = tl.load(row_ptr + token * NUM_RANKS + peer, mask=writes, other=-1).to(tl.int64)
        here = mask & (row >= 0)[:, None]
        place = (first_row + row)[:, None] * TOP_K + k
        local = slot_id - peer * slots_per_rank
        own = (slot_id >= 0) & (local >= 0) & (local < slots_per_rank)
        address = tl.multiple_of(tl.load(addresses_ptr + peer) + slot, 16)
        ids_ptr = as_pointer(address + ids_byte, tl.int32)
        tl.store(ids_ptr + place, tl.where(own, local, -1).to(tl.int32), mask=here)
        tl.store(as_pointer(address + weights_byte, WEIGHT) + place, tl.where(own, weight, 0.0), mask=here)


@jit
def _take_kernel(
    own_ptr,  # [bytes]
    segments_ptr,  # [2, NUM_RANKS]
    ticket_ptr,  # [1]
    ids_ptr,  # [num_rows, TOP_K]
    weights_ptr,  # [num_rows, TOP_K]
    num_rows,
    capacity,
    first_byte,
    slot_bytes,
    ids_byte,
    weights_byte,
    NUM_RANKS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_K)[None, :]
    in_slot = row_in_slot(row, num_rows, segments_ptr, capacity, NUM_RANKS, BLOCK_RANKS)
    mask = (in_slot >= 0)[:, None] & (k < TOP_K)
    slot_ptr = own_ptr + slot_begin(ticket_ptr, first_byte, slot_bytes, NUM_SLOTS)
    place = in_slot[:, None] * TOP_K + k
    ids = tl.load(as_pointer(slot_ptr + ids_byte, tl.int32) + place, mask=mask, other=-1)
    weights = tl.load(as_pointer(slot_ptr + weights_byte, WEIGHT) + place, mask=mask, other=0)
    mask = (row < num_rows)[:, None] & (k < TOP_K)
    tl.store(ids_ptr + row[:, None] * TOP_K + k, ids.to(tl.int64), mask=mask)
    tl.store(weights_ptr + row[:, None] * TOP_K + k, weights, mask=mask)


@jit
def _offer_kernel(
    grads_ptr,  # [num_rows, TOP_K]
    own_ptr,  # [bytes]
    segments_ptr,  # [2, NUM_RANKS]
    ticket_ptr,  # [1]
    status_ptr,  # [1]
    num_rows,
    capacity,
    first_byte,
    slot_bytes,
    ids_byte,
    weights_byte,
    NUM_RANKS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_K)[None, :]
    in_slot = row_in_slot(row, num_rows, segments_ptr, capacity, NUM_RANKS, BLOCK_RANKS)
    mask = (in_slot >= 0)[:, None] & (k < TOP_K) & (tl.load(status_ptr) == 0)
    grads = tl.load(grads_ptr + row[:, None] * TOP_K + k, mask=mask, other=0)
    slot_ptr = own_ptr + slot_begin(ticket_ptr, first_byte, slot_bytes, NUM_SLOTS) + weights_byte
    tl.store(as_pointer(slot_ptr, WEIGHT) + in_slot[:, None] * TOP_K + k, grads, mask=mask)


@jit
def _pull_kernel(
    slots_ptr,  # [num_tokens, TOP_K]
    row_ptr,  # [num_tokens, NUM_RANKS]
    addresses_ptr,  # [NUM_RANKS]
    ticket_ptr,  # [1]
    grads_ptr,  # [num_tokens, TOP_K]
    num_tokens,
    slots_per_rank,
    first_row,
    first_byte,
    slot_bytes,
    ids_byte,
    weights_byte,
    NUM_RANKS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = (token < num_tokens)[:, None] & (k < TOP_K)
    slot_id = tl.load(slots_ptr + token[:, None] * TOP_K + k, mask=mask, other=-1)
    # An id beyond all slots, which nothing looks at on a GPU, must not become an address.
    real = mask & (slot_id >= 0) & (slot_id < slots_per_rank * NUM_RANKS)
    peer = tl.where(real, slot_id // slots_per_rank, 0)
    row = tl.load(row_ptr + token[:, None] * NUM_RANKS + peer, mask=real, other=0).to(tl.int64)
    address = tl.load(addresses_ptr + peer, mask=real, other=0) + weights_byte
    address += slot_begin(ticket_ptr, first_byte, slot_bytes, NUM_SLOTS)
    grad_ptr = as_pointer(address, WEIGHT) + (first_row + row) * TOP_K + k
    tl.store(grads_ptr + token[:, None] * TOP_K + k, tl.load(grad_ptr, mask=real, other=0), mask=mask)
