"""What the kernels of `rows.py` compute, in torch's own operations on all ranks' buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossdock.kernels.quantize import FP8_GROUP, dequantize_fp8, quantize_fp8_reference
from crossdock.kernels.runtime import cdiv
from crossdock.kernels.symmetric.memory import Ring, RowLayout

__all__ = ["offer_rows_reference", "pull_rows_reference", "push_rows_reference", "take_rows_reference"]


def push_rows_reference(
    x: Tensor, row: Tensor, buffers: Sequence[Tensor], rank: int, ring: Ring, layout: RowLayout, ticket: int
) -> None:
    """What `push_rows` of `rank` writes to all ranks' `buffers [bytes]`, in torch's own operations."""
    for peer, buffer in enumerate(buffers):
        needs = row[:, peer] >= 0
        rows = _rows(buffer, ring, layout, ticket)[rank]
        for first, encoded in _encode(x, layout):
            rows[row[needs, peer].long(), first : first + encoded.shape[1]] = encoded[needs]


def take_rows_reference(
    buffer: Tensor,
    ring: Ring,
    layout: RowLayout,
    ticket: int,
    segments: Tensor,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """What `take_rows` returns of a rank's `buffer [bytes]`."""
    values = torch.zeros(num_rows, layout.hidden_size, dtype=dtype, device=buffer.device)
    rows = _rows(buffer, ring, layout, ticket)
    for source, (start, count) in enumerate(segments.t().tolist()):
        values[start : start + count] = _decode(rows[source, :count], layout, dtype)
    return values


def offer_rows_reference(
    y: Tensor, buffer: Tensor, ring: Ring, layout: RowLayout, ticket: int, segments: Tensor
) -> None:
    """What `offer_rows` writes to a rank's `buffer [bytes]`."""
    rows = _rows(buffer, ring, layout, ticket)
    for source, (start, count) in enumerate(segments.t().tolist()):
        for first, encoded in _encode(y, layout):
            rows[source, :count, first : first + encoded.shape[1]] = encoded[start : start + count]


def pull_rows_reference(
    row: Tensor,
    buffers: Sequence[Tensor],
    rank: int,
    ring: Ring,
    layout: RowLayout,
    ticket: int,
    dtype: torch.dtype,
) -> Tensor:
    """What `pull_rows` of `rank` returns of all ranks' `buffers [bytes]`."""
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(len(row), layout.hidden_size, dtype=wide, device=row.device)
    for peer, buffer in enumerate(buffers):
        needs = row[:, peer] >= 0
        read = _rows(buffer, ring, layout, ticket)[rank, row[needs, peer].long()]
        total[needs] += _decode(read, layout, dtype).to(wide)
    return total.to(dtype)


def _rows(buffer: Tensor, ring: Ring, layout: RowLayout, ticket: int) -> Tensor:
    """A slot's rows, `[R, capacity, row_bytes]` uint8."""
    first = ring.slot_of(ticket)
    shape = layout.num_ranks, layout.capacity, layout.row_bytes
    return buffer[first : first + layout.num_rows * layout.row_bytes].view(shape)


def _encode(rows: Tensor, layout: RowLayout) -> list[tuple[int, Tensor]]:
    """`rows [S, H]` as bytes `[S, ...]`, each with where in a row they begin."""
    if not layout.is_fp8:
        return [(0, rows.to(layout.wire).contiguous().view(torch.uint8))]
    values, scales = quantize_fp8_reference(rows)
    return [(0, values.view(torch.uint8)), (layout.scales_byte, scales.view(torch.uint8))]


def _decode(rows: Tensor, layout: RowLayout, dtype: torch.dtype) -> Tensor:
    used = rows[:, : layout.hidden_size * layout.wire.itemsize].contiguous().view(layout.wire)
    if not layout.is_fp8:
        return used.to(dtype)
    scales = rows[:, layout.scales_byte : layout.scales_byte + 4 * cdiv(layout.hidden_size, FP8_GROUP)]
    return dequantize_fp8(used, scales.contiguous().view(torch.float32), dtype)
