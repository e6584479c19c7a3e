"""The second product's gradient with all that hangs on it elementwise: one pass over the kept first product.

With `dA = dy Wd^T` of a row, `h = a(pre)` and its slopes, the weight's gradient is `<dA, h>`, so that the second
product is neither kept nor computed again; the first product's gradient is `p dA` times the slopes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.kernels.gating import Gating, gated_slopes
from crossdock.kernels.grouped.launch import persistent
from crossdock.kernels.grouped.matrices import SlotMatrices, load_block
from crossdock.kernels.grouped.rows import RowTiles, SlotRows
from crossdock.kernels.grouped.up import up_projection_reference
from crossdock.kernels.runtime import blocks_of, buffer_dtype, cdiv, device_of, jit, tl
from crossdock.kernels.tiles import Tiles

__all__ = ["DownGradients", "down_gradient", "down_gradient_reference"]


class DownGradients(NamedTuple):
    """Of `M` rows; those past the last slot's end are not written.

    Attributes:
        pre: `[M, 2I]` (ungated `[M, I]`), the gradient of the first product.
        h: `[M, I]`, times the routing weight: what the second product's weights' gradient needs.
        weights: `[M]` fp32, the gradient of the routing weight, but for what a bias adds.
    """

    pre: Tensor
    h: Tensor
    weights: Tensor


def down_gradient(
    grad_y: Tensor,
    matrices: SlotMatrices,
    weights: Tensor | None,
    pre: Tensor,
    rows: SlotRows,
    gating: Gating,
    tiles: Tiles,
    row_tiles: RowTiles,
) -> DownGradients:
    """The gradients of what the second product multiplies.

    Args:
        grad_y: `[U, H]`.
        matrices: `[S, H, I]`: the down projections the other way round.
        weights: `[U, K]` fp32, contiguous, the routing weights on the output; 1 without them.
        pre: `[M, 2I]` (ungated `[M, I]`) of the forward pass.
        rows: of `M` routes.
        gating: the activation.
        tiles: `columns` of `I`.
        row_tiles: of `tiles.rows` rows.
    """
    hidden, inner, device = grad_y.shape[1], matrices.columns, grad_y.device
    tiles = tiles.fitted(inner, hidden)
    column_blocks = cdiv(inner, tiles.columns)
    dtype = buffer_dtype(pre.dtype)
    grad_pre = torch.empty(pre.shape, dtype=dtype, device=device)
    h = torch.empty(len(pre), inner, dtype=dtype, device=device)
    # A sum per block of columns, added up in one order afterwards: no atomics.
    of_weights = torch.empty(column_blocks, len(pre), device=device)
    if pre.numel():
        grid, constants = persistent(tiles, row_tiles.max_tiles * column_blocks, device)
        with device_of(grad_y):
            _down_grad_kernel[grid](
                *(grad_y.contiguous(), matrices.blocks(tiles.depth, tiles.columns), weights),
                blocks_of(pre, [tiles.rows, tiles.columns // 2]),
                *(rows.order, rows.ends, row_tiles.slot, row_tiles.row, row_tiles.num_tiles, grad_pre, h, of_weights),
                *(len(pre), hidden, inner),
                TOP_K=rows.top_k,
                TRANSPOSED=matrices.transposed,
                **gating.constants(),
                FLATTEN=bool(tiles.flatten),
                **constants,
            )
    return DownGradients(grad_pre.to(pre.dtype), h.to(pre.dtype), of_weights.sum(dim=0))


def down_gradient_reference(
    grad_y: Tensor, matrices: SlotMatrices, weights: Tensor | None, pre: Tensor, rows: SlotRows, gating: Gating
) -> DownGradients:
    """What `down_gradient` computes, by autograd; rows of no slot are 0."""
    grad_h = grad_y.new_zeros(len(pre), matrices.columns)
    for slot, own in rows.of_slots():
        grad_h[own] = grad_y[rows.tokens[own]] @ matrices.matrices[slot]
    end = int(rows.ends[-1]) if len(rows.ends) else 0
    p = None if weights is None else weights.flatten()[rows.order.clamp(min=0), None]
    with torch.enable_grad():
        kept = pre.detach().requires_grad_()
        identity = torch.eye(pre.shape[1], dtype=pre.dtype, device=pre.device)[None]
        every_row = SlotRows(rows.order, torch.tensor([len(pre)], dtype=torch.int32), rows.top_k)
        given = (kept, SlotMatrices(identity, False), None, None, every_row, gating)
        h = up_projection_reference(*given, gather=False)[1]
        (grad_pre,) = torch.autograd.grad(h, kept, grad_h if p is None else (p * grad_h).to(h.dtype))
    of_weights = (h.detach() * grad_h).sum(dim=1)
    h = h.detach() if p is None else (h.detach() * p).to(h.dtype)
    real = torch.arange(len(pre), device=pre.device) < end
    return DownGradients(grad_pre * real[:, None], h * real[:, None], of_weights * real)


@jit
def _down_grad_kernel(
    grad_y_ptr,  # [U, hidden]
    blocks,  # of [S, hidden, inner]
    weights_ptr,  # [U K] or None
    pre,  # blocks of [M, 2 inner]
    order_ptr,  # [M]
    ends_ptr,  # [S]
    tile_slot_ptr,  # [max_tiles]
    tile_row_ptr,  # [max_tiles]
    tile_count_ptr,  # [1]
    grad_pre_ptr,  # [M, 2 inner]
    h_ptr,  # [M, inner]
    grad_weights_ptr,  # [column blocks, M]
    num_rows,
    hidden,
    inner,
    TOP_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FLATTEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    column_blocks = tl.cdiv(inner, COLUMNS)
    for tile in tl.range(
        tl.program_id(0), tl.load(tile_count_ptr) * column_blocks, tl.num_programs(0), flatten=FLATTEN
    ):
        row_tile, column_block = tile // column_blocks, tile % column_blocks
        first_column = column_block * COLUMNS
        slot = tl.load(tile_slot_ptr + row_tile)
        first_row = tl.load(tile_row_ptr + row_tile)
        row = first_row + tl.arange(0, ROWS)
        is_own = row < tl.load(ends_ptr + slot)
        row = row.to(tl.int64)
        route = tl.load(order_ptr + row, mask=is_own, other=0)
        source = route // TOP_K * hidden
        grad_h = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(0, hidden, DEPTH):
            k = first + tl.arange(0, DEPTH)
            dy = tl.load(
                grad_y_ptr + source[:, None] + k[None, :], mask=is_own[:, None] & (k < hidden)[None, :], other=0
            )
            w = load_block(blocks, slot, first, first_column, DEPTH, COLUMNS, TRANSPOSED)
            if UPCAST:
                dy, w = dy.to(tl.float32), w.to(tl.float32)
            grad_h = tl.dot(dy, w, grad_h, input_precision="ieee")
        weight = None
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + route, mask=is_own, other=0).to(tl.float32)[:, None]
        # In two halves: all of what is elementwise at once does not fit a thread's registers.
        left, right = tl.split(grad_h.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
        out = (pre, first_row, row, is_own, weight, grad_pre_ptr, h_ptr, inner)
        of_weights = _finish(left, first_column, *out, ACTIVATION, LIMIT, OFFSET, GATED, ROWS, COLUMNS // 2)
        right_column = first_column + COLUMNS // 2
        of_weights += _finish(right, right_column, *out, ACTIVATION, LIMIT, OFFSET, GATED, ROWS, COLUMNS // 2)
        tl.store(grad_weights_ptr + column_block.to(tl.int64) * num_rows + row, of_weights, mask=is_own)


@jit
def _finish(
    grad_h,  # [ROWS, COLUMNS]
    first_column,
    pre,
    first_row,
    row,
    is_own,
    weight,
    grad_pre_ptr,
    h_ptr,
    inner,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What follows from some columns of `grad_h`; returns their part of the routing weight's gradient."""
    width = inner * 2 if GATED else inner
    column = first_column + tl.arange(0, COLUMNS)
    mask = is_own[:, None] & (column < inner)[None, :]
    # A tile's end may be of the next slot, or of what nobody wrote: it is not stored.
    gate = pre.load([first_row, first_column]).to(tl.float32)
    up = gate
    if GATED:
        up = pre.load([first_row, inner + first_column]).to(tl.float32)
    h, gate_slope, up_slope = gated_slopes(gate, up, ACTIVATION, LIMIT, OFFSET, GATED)
    of_weights = tl.sum(tl.where(mask, h * grad_h, 0), axis=1)
    if weight is not None:
        h *= weight
        grad_h *= weight
    tl.store(h_ptr + row[:, None] * inner + column[None, :], h, mask=mask)
    at = row[:, None] * width + column[None, :]
    tl.store(grad_pre_ptr + at, grad_h * gate_slope, mask=mask)
    if GATED:
        tl.store(grad_pre_ptr + at + inner, grad_h * up_slope, mask=mask)
    return of_weights
