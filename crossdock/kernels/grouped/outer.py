"""`L^T R` over each slot's rows: the gradients of the slots' matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.kernels.grouped.launch import persistent
from crossdock.kernels.grouped.rows import SlotRows
from crossdock.kernels.runtime import buffer_dtype, cdiv, device_of, jit, tl
from crossdock.kernels.tiles import Tiles

__all__ = ["RowValues", "outer", "outer_reference"]


class RowValues(NamedTuple):
    """A value per row.

    Attributes:
        values: `[M, C]`; where `gather`, `[U, C]`.
        gather: whether a row's values are its token's, taken along the reduction, or its own.
    """

    values: Tensor
    gather: bool = False


def outer(left: RowValues, right: RowValues, rows: SlotRows, tiles: Tiles) -> Tensor:
    """The sum of `left[m] right[m]^T` over each slot's rows `m`.

    Args:
        left: `[M, C]`.
        right: `[M, D]`, in the dtype of `left`.
        rows: of `M` routes.
        tiles: `rows` of `C`, `columns` of `D`, `depth` rows of a slot at a time.

    Returns:
        `[S, C, D]` in the same dtype, summed in fp32; 0 for a slot without rows.
    """
    height, width, num_slots = left.values.shape[1], right.values.shape[1], len(rows.ends)
    dtype, device = left.values.dtype, left.values.device
    out = torch.empty(num_slots, height, width, dtype=buffer_dtype(dtype), device=device)
    if out.numel():
        tiles = tiles.fitted(width, tiles.depth, rows=height)
        blocks = cdiv(height, tiles.rows) * cdiv(width, tiles.columns)
        grid, constants = persistent(tiles, num_slots * blocks, device)
        with device_of(out):
            _outer_kernel[grid](
                *(left.values.contiguous(), right.values.contiguous(), rows.order, rows.ends, out),
                *(num_slots, height, width),
                TOP_K=rows.top_k,
                GATHER_LEFT=left.gather,
                GATHER_RIGHT=right.gather,
                **constants,
            )
    return out.to(dtype)


def outer_reference(left: RowValues, right: RowValues, rows: SlotRows) -> Tensor:
    """What `outer` computes, slot by slot."""
    of_left, of_right = (side.values[rows.tokens] if side.gather else side.values for side in (left, right))
    products = [of_left[own].t() @ of_right[own] for _, own in rows.of_slots()]
    return torch.stack(products) if products else of_left.new_zeros(0, of_left.shape[1], of_right.shape[1])


@jit
def _outer_kernel(
    left_ptr,  # [M or U, height]
    right_ptr,  # [M or U, width]
    order_ptr,  # [M]
    ends_ptr,  # [S]
    out_ptr,  # [S, height, width]
    num_slots,
    height,
    width,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_blocks, column_blocks = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), num_slots * row_blocks * column_blocks, tl.num_programs(0)):
        # All of a slot before the next one's: its rows are then in the L2 cache.
        slot, block = tile // (row_blocks * column_blocks), tile % (row_blocks * column_blocks)
        i = (block // column_blocks) * ROWS + tl.arange(0, ROWS)
        j = (block % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
        start, end = tl.load(ends_ptr + slot - 1, mask=slot > 0, other=0), tl.load(ends_ptr + slot)
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(start, end, DEPTH):
            row = first + tl.arange(0, DEPTH)
            is_own = row < end
            row = row.to(tl.int64)
            token = row
            if GATHER_LEFT or GATHER_RIGHT:
                token = tl.load(order_ptr + row, mask=is_own, other=0) // TOP_K
            left_row = (token if GATHER_LEFT else row) * height
            right_row = (token if GATHER_RIGHT else row) * width
            # 0 past the end: there may be another slot's rows, or what nobody wrote.
            left = tl.load(
                left_ptr + left_row[:, None] + i[None, :], mask=is_own[:, None] & (i < height)[None, :], other=0
            )
            right = tl.load(
                right_ptr + right_row[:, None] + j[None, :], mask=is_own[:, None] & (j < width)[None, :], other=0
            )
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left.T, right, total, input_precision="ieee")
        at = out_ptr + (slot.to(tl.int64) * height + i[:, None]) * width + j[None, :]
        tl.store(at, total, mask=(i < height)[:, None] & (j < width)[None, :])
