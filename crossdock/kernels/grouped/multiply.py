"""Rows times the matrix of their slot: the second product forward, and the first one's gradient backward."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.kernels.grouped.launch import persistent
from crossdock.kernels.grouped.matrices import SlotMatrices, load_block
from crossdock.kernels.grouped.rows import RowTiles, SlotRows
from crossdock.kernels.runtime import blocks_of, buffer_dtype, cdiv, device_of, jit, tl
from crossdock.kernels.tiles import Tiles

__all__ = ["multiply", "multiply_reference"]


def multiply(
    values: Tensor,
    matrices: SlotMatrices,
    bias: Tensor | None,
    weights: Tensor | None,
    rows: SlotRows,
    tiles: Tiles,
    row_tiles: RowTiles,
) -> Tensor:
    """`v W + p b` of each row.

    Args:
        values: `[M, C]`, contiguous.
        matrices: `[S, C, D]`.
        bias: `[S, D]`.
        weights: `[U, K]` fp32, contiguous, the routing weights `p` that `bias` is multiplied by; 1 without them.
        rows: of `M` routes.
        tiles: `columns` of `D`.
        row_tiles: of `tiles.rows` rows.

    Returns:
        `[M, D]` in the dtype of `values`; rows past the last slot's end are not written.
    """
    depth, width = values.shape[1], matrices.columns
    out = torch.empty(len(values), width, dtype=buffer_dtype(values.dtype), device=values.device)
    if out.numel():
        tiles = tiles.fitted(width, depth)
        grid, constants = persistent(tiles, row_tiles.max_tiles * cdiv(width, tiles.columns), values.device)
        with device_of(values):
            _multiply_kernel[grid](
                *(blocks_of(values, [tiles.rows, tiles.depth]), matrices.blocks(tiles.depth, tiles.columns)),
                *(
                    None if bias is None else bias.contiguous(),
                    weights,
                    rows.order,
                    rows.ends,
                    row_tiles.slot,
                    row_tiles.row,
                    row_tiles.num_tiles,
                    out,
                ),
                *(depth, width),
                TRANSPOSED=matrices.transposed,
                FLATTEN=bool(tiles.flatten),
                **constants,
            )
    return out.to(values.dtype)


def multiply_reference(
    values: Tensor, matrices: SlotMatrices, bias: Tensor | None, weights: Tensor | None, rows: SlotRows
) -> Tensor:
    """What `multiply` computes, slot by slot; rows of no slot are 0."""
    out = values.new_zeros(len(values), matrices.columns)
    for slot, own in rows.of_slots():
        out[own] = values[own] @ matrices.matrices[slot]
        if bias is not None:
            out[own] += bias[slot] * (1 if weights is None else weights.flatten()[rows.order[own], None])
    return out


@jit
def _multiply_kernel(
    values,  # blocks of [M, depth]
    blocks,  # of [S, depth, width]
    bias_ptr,  # [S, width] or None
    weights_ptr,  # [U K] or None
    order_ptr,  # [M]
    ends_ptr,  # [S]
    tile_slot_ptr,  # [max_tiles]
    tile_row_ptr,  # [max_tiles]
    tile_count_ptr,  # [1]
    out_ptr,  # [M, width]
    depth,
    width,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FLATTEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    column_blocks = tl.cdiv(width, COLUMNS)
    for tile in tl.range(
        tl.program_id(0), tl.load(tile_count_ptr) * column_blocks, tl.num_programs(0), flatten=FLATTEN
    ):
        row_tile, first_column = tile // column_blocks, (tile % column_blocks) * COLUMNS
        slot = tl.load(tile_slot_ptr + row_tile)
        first_row = tl.load(tile_row_ptr + row_tile)
        row = first_row + tl.arange(0, ROWS)
        is_own = row < tl.load(ends_ptr + slot)
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(0, depth, DEPTH):
            # A tile's end may lie in the next slot's rows, or in rows that nobody wrote: they are not stored.
            v = values.load([first_row, first])
            w = load_block(blocks, slot, first, first_column, DEPTH, COLUMNS, TRANSPOSED)
            if UPCAST:
                v, w = v.to(tl.float32), w.to(tl.float32)
            total = tl.dot(v, w, total, input_precision="ieee")
        column = first_column + tl.arange(0, COLUMNS)
        row = row.to(tl.int64)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + slot.to(tl.int64) * width + column, mask=column < width, other=0).to(tl.float32)
            if weights_ptr is not None:
                route = tl.load(order_ptr + row, mask=is_own, other=0)
                weight = tl.load(weights_ptr + route, mask=is_own, other=0).to(tl.float32)
                total += weight[:, None] * bias[None, :]
            else:
                total += bias[None, :]
        tl.store(
            out_ptr + row[:, None] * width + column[None, :], total, mask=is_own[:, None] & (column < width)[None, :]
        )
