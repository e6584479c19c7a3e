"""Rows that are written straight into peers' buffers, and rows that are read and summed there.

`push_rows` and `pull_rows` cross between ranks, `take_rows` and `offer_rows` copy between a rank's own buffer and its
tensors: a slot is used again long before a backward pass wants what came in it. With a wire of `float8_e4m3fn` values
are quantised as they are written and come back as they are read. `rows_reference.py` has all four in torch's own
operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.kernels.quantize import (
    FP8_GROUP,
    FP8_LIMITS,
)
from crossdock.kernels.runtime import buffer_dtype, cdiv, device_of, jit, tl
from crossdock.kernels.symmetric.memory import (
    Ring,
    RowLayout,
    Status,
    Window,
    as_words,
    next_power_of_two,
    triton_dtype,
)
from crossdock.kernels.symmetric.tiles import (
    encode_tile,
    load_tile,
    peer_slot,
    row_in_slot,
    slot_begin,
    store_tile,
)

__all__ = ["offer_rows", "pull_rows", "push_rows", "take_rows"]

_NUM_WARPS, _TILE, _MOST_COLUMNS, _MOST_ROWS = 4, 4096, 1024, 64


def push_rows(
    x: Tensor, row: Tensor, window: Window, ring: Ring, layout: RowLayout, ticket: Tensor, status: Status
) -> None:
    """Write each of the tokens `x [T, H]` to the buffers of the ranks that need it, once each.

    Args:
        row: `[T, R]` int32, the place of a token's row among this rank's, `-1` where a rank does not need it.
        ticket: `[1]` int64, of the exchange whose slot is written.
    """
    if not x.numel():
        return
    values, element = _to_write(x, layout)
    with device_of(x):
        _push_kernel[_grid(len(x), layout)](
            *(values, row, window.addresses, ticket, status.on_device),
            *(len(x), layout.hidden_size, window.rank, window.rank * layout.capacity),
            *_strides(ring, layout),
            NUM_RANKS=ring.num_ranks,
            **FP8_LIMITS,
            **_constants(element, ring, layout),
        )


def take_rows(
    window: Window,
    ring: Ring,
    layout: RowLayout,
    ticket: Tensor,
    segments: Tensor,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """Copy what has come out of this rank's slot: `[num_rows, H]` in `dtype`, 0 in rows that no token has.

    Args:
        segments: `[2, R]` int64, the first row of each source, and how many it has sent.
    """
    element = _element_to_read(layout, dtype)
    values = torch.empty(num_rows, layout.hidden_size, dtype=buffer_dtype(dtype), device=ticket.device)
    if layout.wire == dtype:
        values = as_words(values.to(dtype))
    if values.numel():
        with device_of(values):
            _take_kernel[_grid(num_rows, layout)](
                *(window.own, segments, ticket, values),
                *(num_rows, layout.hidden_size, layout.capacity),
                *_strides(ring, layout),
                NUM_RANKS=ring.num_ranks,
                BLOCK_RANKS=next_power_of_two(ring.num_ranks),
                LARGEST=_largest(dtype),
                CONVERT=layout.wire != dtype,
                **_constants(element, ring, layout),
            )
    return values.view(dtype) if layout.wire == dtype else values.to(dtype)


def offer_rows(
    y: Tensor, window: Window, ring: Ring, layout: RowLayout, ticket: Tensor, segments: Tensor, status: Status
) -> None:
    """Copy `y [U, H]`, rows as `take_rows` gave them, to this rank's slot, where their sources can read them.

    Args:
        segments: as in `take_rows`; rows that no token has stay away.
    """
    if not y.numel():
        return
    values, element = _to_write(y, layout)
    with device_of(y):
        _offer_kernel[_grid(len(y), layout)](
            *(values, window.own, segments, ticket, status.on_device),
            *(len(y), layout.hidden_size, layout.capacity),
            *_strides(ring, layout),
            NUM_RANKS=ring.num_ranks,
            BLOCK_RANKS=next_power_of_two(ring.num_ranks),
            **FP8_LIMITS,
            **_constants(element, ring, layout),
        )


def pull_rows(
    row: Tensor,
    window: Window,
    ring: Ring,
    layout: RowLayout,
    ticket: Tensor,
    status: Status,
    dtype: torch.dtype,
) -> Tensor:
    """Read each token's rows from the buffers of its ranks and sum them: `[T, H]` in `dtype`.

    In rank order, in fp32 (float64 where `dtype` is), rounded once. A token that needs no rank gets 0. After a wait in
    vain everything is NaN.

    Args:
        row: `[T, R]` int32 as in `push_rows`.
    """
    out = torch.empty(len(row), layout.hidden_size, dtype=buffer_dtype(dtype), device=row.device)
    if out.numel():
        element = tl.uint8 if layout.is_fp8 else triton_dtype(layout.wire)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        with device_of(out):
            _pull_kernel[_grid(len(row), layout)](
                *(row, window.addresses, ticket, status.on_device, out),
                *(len(row), layout.hidden_size, window.rank * layout.capacity),
                *_strides(ring, layout),
                NUM_RANKS=ring.num_ranks,
                SUM=triton_dtype(wide),
                LARGEST=_largest(dtype),
                **_constants(element, ring, layout),
            )
    return out.to(dtype)


def _grid(num_rows: int, layout: RowLayout) -> tuple[int, int]:
    rows, columns = _tile(layout)
    return cdiv(num_rows, rows), cdiv(layout.hidden_size, columns)


def _tile(layout: RowLayout) -> tuple[int, int]:
    # With FP8 a program has one scale for each of its rows.
    columns = FP8_GROUP if layout.is_fp8 else min(next_power_of_two(layout.hidden_size), _MOST_COLUMNS)
    return min(_TILE // columns, _MOST_ROWS), columns


def _constants(element, ring: Ring, layout: RowLayout) -> dict[str, object]:
    rows, columns = _tile(layout)
    return {
        "NUM_SLOTS": ring.num_slots,
        "ELEMENT": element,
        "FP8": layout.is_fp8,
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": columns,
        "num_warps": _NUM_WARPS,
    }


def _strides(ring: Ring, layout: RowLayout) -> tuple[int, ...]:
    """Where slots begin and how long they are, in bytes; a row in values, and in scales, and its first scale."""
    row_bytes = layout.row_bytes
    return ring.first_byte, ring.slot_bytes, row_bytes // layout.wire.itemsize, row_bytes // 4, layout.scales_byte // 4


def _to_write(rows: Tensor, layout: RowLayout):
    """What a kernel reads of `rows`, and what it stores values as."""
    if layout.is_fp8:
        narrow = rows.to(torch.float32) if rows.dtype == torch.float64 else rows
        return narrow.contiguous(), tl.uint8
    words = as_words(rows.to(layout.wire).contiguous())
    return words, triton_dtype(words.dtype)


def _element_to_read(layout: RowLayout, dtype: torch.dtype):
    """What a kernel loads values as that are wanted in `dtype`: the same bits where nothing is to be converted."""
    if layout.is_fp8:
        return tl.uint8
    return triton_dtype(as_words(torch.empty(0, dtype=dtype)).dtype if layout.wire == dtype else layout.wire)


def _largest(dtype: torch.dtype) -> float:
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


@jit
def _push_kernel(
    x_ptr,  # [num_tokens, hidden]
    row_ptr,  # [num_tokens, NUM_RANKS]
    addresses_ptr,  # [NUM_RANKS]
    ticket_ptr,  # [1]
    status_ptr,  # [1]
    num_tokens,
    hidden,
    rank,
    first_row,
    first_byte,
    slot_bytes,
    row_stride,
    scale_stride,
    first_scale,
    NUM_RANKS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    ELEMENT: tl.constexpr,
    FP8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    LARGEST_FINITE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    mask = (token < num_tokens)[:, None] & (column < hidden)
    values = tl.load(x_ptr + token[:, None] * hidden + column, mask=mask, other=0)
    values, scale = encode_tile(values, LARGEST, SMALLEST_SCALE, LARGEST_FINITE, FP8, BLOCK_ROWS, BLOCK_COLUMNS)
    slot = slot_begin(ticket_ptr, first_byte, slot_bytes, NUM_SLOTS)
    writes = (token < num_tokens) & (tl.load(status_ptr) == 0)
    for step in tl.static_range(NUM_RANKS):  # pyright: ignore[reportGeneralTypeIssues]
        # Every rank begins with itself, so that they do not all write to one at a time.
        peer = (rank + step) % NUM_RANKS
        row = tl.load(row_ptr + token * NUM_RANKS + peer, mask=writes, other=-1).to(tl.int64)
        row = tl.where(row >= 0, first_row + row, -1)
        slot_ptr = peer_slot(addresses_ptr, peer, slot)
        store_tile(slot_ptr, row, column, values, scale, mask, row_stride, scale_stride, first_scale, ELEMENT, FP8)


@jit
def _take_kernel(
    own_ptr,  # [bytes]
    segments_ptr,  # [2, NUM_RANKS]
    ticket_ptr,  # [1]
    values_ptr,  # [num_rows, hidden]
    num_rows,
    hidden,
    capacity,
    first_byte,
    slot_bytes,
    row_stride,
    scale_stride,
    first_scale,
    NUM_RANKS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    ELEMENT: tl.constexpr,
    FP8: tl.constexpr,
    LARGEST: tl.constexpr,
    CONVERT: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    in_slot = row_in_slot(row, num_rows, segments_ptr, capacity, NUM_RANKS, BLOCK_RANKS)
    mask = column < hidden
    slot_ptr = own_ptr + tl.multiple_of(slot_begin(ticket_ptr, first_byte, slot_bytes, NUM_SLOTS), 16)
    values = load_tile(slot_ptr, in_slot, column, mask, row_stride, scale_stride, first_scale, ELEMENT, FP8, LARGEST)
    if CONVERT:
        values = values.to(tl.float32)
    tl.store(values_ptr + row[:, None] * hidden + column, values, mask=(row < num_rows)[:, None] & mask)


@jit
def _offer_kernel(
    y_ptr,  # [num_rows, hidden]
    own_ptr,  # [bytes]
    segments_ptr,  # [2, NUM_RANKS]
    ticket_ptr,  # [1]
    status_ptr,  # [1]
    num_rows,
    hidden,
    capacity,
    first_byte,
    slot_bytes,
    row_stride,
    scale_stride,
    first_scale,
    NUM_RANKS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    ELEMENT: tl.constexpr,
    FP8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    LARGEST_FINITE: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    in_slot = row_in_slot(row, num_rows, segments_ptr, capacity, NUM_RANKS, BLOCK_RANKS)
    in_slot = tl.where(tl.load(status_ptr) == 0, in_slot, -1)
    mask = column < hidden
    values = tl.load(y_ptr + row[:, None] * hidden + column, mask=(in_slot >= 0)[:, None] & mask, other=0)
    values, scale = encode_tile(values, LARGEST, SMALLEST_SCALE, LARGEST_FINITE, FP8, BLOCK_ROWS, BLOCK_COLUMNS)
    slot_ptr = own_ptr + tl.multiple_of(slot_begin(ticket_ptr, first_byte, slot_bytes, NUM_SLOTS), 16)
    store_tile(slot_ptr, in_slot, column, values, scale, mask, row_stride, scale_stride, first_scale, ELEMENT, FP8)


@jit
def _pull_kernel(
    row_ptr,  # [num_tokens, NUM_RANKS]
    addresses_ptr,  # [NUM_RANKS]
    ticket_ptr,  # [1]
    status_ptr,  # [1]
    out_ptr,  # [num_tokens, hidden]
    num_tokens,
    hidden,
    first_row,
    first_byte,
    slot_bytes,
    row_stride,
    scale_stride,
    first_scale,
    NUM_RANKS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    ELEMENT: tl.constexpr,
    SUM: tl.constexpr,
    FP8: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    mask = column < hidden
    slot = slot_begin(ticket_ptr, first_byte, slot_bytes, NUM_SLOTS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=SUM)
    for peer in tl.static_range(NUM_RANKS):
        row = tl.load(row_ptr + token * NUM_RANKS + peer, mask=token < num_tokens, other=-1).to(tl.int64)
        row = tl.where(row >= 0, first_row + row, -1)
        slot_ptr = peer_slot(addresses_ptr, peer, slot)
        total += load_tile(
            slot_ptr, row, column, mask, row_stride, scale_stride, first_scale, ELEMENT, FP8, LARGEST
        ).to(SUM)
    total = tl.where(tl.load(status_ptr) == 0, total, float("nan"))
    tl.store(out_ptr + token[:, None] * hidden + column, total, mask=(token < num_tokens)[:, None] & mask)
