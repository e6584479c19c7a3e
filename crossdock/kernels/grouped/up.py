"""The experts' first product with what comes before and after it: rows from tokens, activation, routing weight."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.kernels.gating import Gating, gated
from crossdock.kernels.grouped.launch import persistent
from crossdock.kernels.grouped.matrices import SlotMatrices, load_block
from crossdock.kernels.grouped.rows import RowTiles, SlotRows
from crossdock.kernels.runtime import buffer_dtype, cdiv, device_of, jit, tl
from crossdock.kernels.tiles import Tiles

__all__ = ["up_projection", "up_projection_reference"]


def up_projection(
    tokens: Tensor,
    matrices: SlotMatrices,
    bias: Tensor | None,
    weights: Tensor | None,
    rows: SlotRows,
    gating: Gating,
    tiles: Tiles,
    row_tiles: RowTiles,
    *,
    gather: bool,
) -> tuple[Tensor, Tensor]:
    """`pre = x W + b` and `h = p a(pre)` of each row, with `x` the row's token.

    Args:
        tokens: `[U, H]`; without `gather` `[M, H]`, rows as they are.
        matrices: `[S, H, 2I]`, gate first (ungated `[S, H, I]`).
        bias: `[S, 2I]` (`[S, I]`).
        weights: `[U, K]` fp32, contiguous, the routing weights `p`; 1 without them.
        rows: of `M` routes.
        gating: the activation.
        tiles: `columns` of `I`.
        row_tiles: of `tiles.rows` rows.
        gather: whether a row's `x` is its token's, or its own.

    Returns:
        `pre [M, 2I]` and `h [M, I]` in the dtype of `tokens`; rows past the last slot's end are not written.
    """
    hidden, width = tokens.shape[1], matrices.columns
    inner = width // 2 if gating.gated else width
    dtype, device = buffer_dtype(tokens.dtype), tokens.device
    pre = torch.empty(len(rows.order), width, dtype=dtype, device=device)
    h = torch.empty(len(rows.order), inner, dtype=dtype, device=device)
    if pre.numel():
        tiles = tiles.fitted(inner, hidden)
        grid, constants = persistent(tiles, row_tiles.max_tiles * cdiv(inner, tiles.columns), device)
        with device_of(tokens):
            _up_kernel[grid](
                *(tokens.contiguous(), matrices.blocks(tiles.depth, tiles.columns)),
                *(None if bias is None else bias.contiguous(), weights),
                *(rows.order, rows.ends, row_tiles.slot, row_tiles.row, row_tiles.num_tiles, pre, h),
                *(hidden, inner),
                TOP_K=rows.top_k,
                GATHER=gather,
                TRANSPOSED=matrices.transposed,
                **gating.constants(),
                FLATTEN=bool(tiles.flatten),
                **constants,
            )
    return pre.to(tokens.dtype), h.to(tokens.dtype)


def up_projection_reference(
    tokens: Tensor,
    matrices: SlotMatrices,
    bias: Tensor | None,
    weights: Tensor | None,
    rows: SlotRows,
    gating: Gating,
    *,
    gather: bool,
) -> tuple[Tensor, Tensor]:
    """What `up_projection` computes, slot by slot, SwiGLU and quick-GEGLU alone; rows of no slot are 0."""
    x = tokens[rows.tokens] if gather else tokens
    pre = tokens.new_zeros(len(x), matrices.columns)
    for slot, own in rows.of_slots():
        pre[own] = x[own] @ matrices.matrices[slot] + (0 if bias is None else bias[slot])
    wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
    gate, up = wide.chunk(2, dim=1) if gating.gated else (wide, None)
    if gating.limit is not None:
        gate = gate.clamp(max=gating.limit)
        up = None if up is None else up.clamp(-gating.limit, gating.limit)
    h = gate * torch.sigmoid({"silu": 1.0, "quick_gelu": 1.702}[gating.activation] * gate)
    h = h if up is None else h * (up + gating.up_offset)
    if weights is not None:
        h = h * weights.flatten()[rows.order.clamp(min=0), None]
    return pre, h.to(tokens.dtype)


@jit
def _up_kernel(
    tokens_ptr,  # [U, hidden], or [M, hidden] without GATHER
    blocks,  # of [S, hidden, 2 inner]
    bias_ptr,  # [S, 2 inner] or None
    weights_ptr,  # [U K] or None
    order_ptr,  # [M]
    ends_ptr,  # [S]
    tile_slot_ptr,  # [max_tiles]
    tile_row_ptr,  # [max_tiles]
    tile_count_ptr,  # [1]
    pre_ptr,  # [M, 2 inner]
    h_ptr,  # [M, inner]
    hidden,
    inner,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
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
    width = inner * 2 if GATED else inner
    for tile in tl.range(
        tl.program_id(0), tl.load(tile_count_ptr) * column_blocks, tl.num_programs(0), flatten=FLATTEN
    ):
        # Neighbours share a slot's rows, which the L2 cache then has.
        row_tile, first_column = tile // column_blocks, (tile % column_blocks) * COLUMNS
        slot = tl.load(tile_slot_ptr + row_tile)
        row = tl.load(tile_row_ptr + row_tile) + tl.arange(0, ROWS)
        is_own = row < tl.load(ends_ptr + slot)
        row = row.to(tl.int64)
        route = tl.load(order_ptr + row, mask=is_own, other=0)
        source = (route // TOP_K if GATHER else row) * hidden
        gate = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        up = gate
        for first in range(0, hidden, DEPTH):
            k = first + tl.arange(0, DEPTH)
            x = tl.load(
                tokens_ptr + source[:, None] + k[None, :], mask=is_own[:, None] & (k < hidden)[None, :], other=0
            )
            w = load_block(blocks, slot, first, first_column, DEPTH, COLUMNS, TRANSPOSED)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            gate = tl.dot(x, w, gate, input_precision="ieee")
            if GATED:
                w = load_block(blocks, slot, first, inner + first_column, DEPTH, COLUMNS, TRANSPOSED)
                if UPCAST:
                    w = w.to(tl.float32)
                up = tl.dot(x, w, up, input_precision="ieee")
        column = first_column + tl.arange(0, COLUMNS)
        mask = is_own[:, None] & (column < inner)[None, :]
        if bias_ptr is not None:
            bias = bias_ptr + slot.to(tl.int64) * width + column
            gate += tl.load(bias, mask=column < inner, other=0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(bias + inner, mask=column < inner, other=0).to(tl.float32)[None, :]
        pre = pre_ptr + row[:, None] * width + column[None, :]
        tl.store(pre, gate, mask=mask)
        if GATED:
            tl.store(pre + inner, up, mask=mask)
        h = gated(gate, up, ACTIVATION, LIMIT, OFFSET, GATED)
        if weights_ptr is not None:
            h *= tl.load(weights_ptr + route, mask=is_own, other=0).to(tl.float32)[:, None]
        tl.store(h_ptr + row[:, None] * inner + column[None, :], h, mask=mask)
