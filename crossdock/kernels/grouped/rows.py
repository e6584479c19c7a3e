"""Rows sorted by slot, and the tiles that they are cut into without looking at them from the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.kernels.runtime import cdiv, device_of, jit, tl

__all__ = ["RowTiles", "SlotRows", "row_tiles", "row_tiles_reference"]

_CHUNK = 128


class SlotRows(NamedTuple):
    """`M` rows of routes, sorted by slot; rows at the end may be of no slot.

    Attributes:
        order: `[M]` int64: each row's flat route `u * top_k + k`; what stands past the last slot's end is not read.
        ends: `[S]` int32: where each slot's rows end, the next one's beginning.
        top_k: `K`.
    """

    order: Tensor
    ends: Tensor
    top_k: int

    def of_slots(self) -> Iterator[tuple[int, slice]]:
        """Each slot and its rows, for references: a copy to the host."""
        start = 0
        for slot, end in enumerate(self.ends.tolist()):
            yield slot, slice(start, end)
            start = end

    @property
    def tokens(self) -> Tensor:
        """The token of each row, `[M]`; of no meaning past the end."""
        return self.order.clamp(min=0) // self.top_k


class RowTiles(NamedTuple):
    """Tiles of some rows of one slot each, in order.

    Attributes:
        slot, row: `[max_tiles]` int32, each tile's slot and first row; written for those that there are.
        num_tiles: `[1]` int32, how many there are.
    """

    slot: Tensor
    row: Tensor
    num_tiles: Tensor

    @property
    def max_tiles(self) -> int:
        """As many as there can be."""
        return len(self.slot)


def row_tiles(rows: SlotRows, block_rows: int) -> RowTiles:
    """Cut `rows` into tiles of `block_rows`, a power of two; a slot's last one may be short, an idle slot has none."""
    num_slots, device = len(rows.ends), rows.ends.device
    slot, row = torch.empty(2, _max_tiles(rows, block_rows), dtype=torch.int32, device=device).unbind()
    count = torch.zeros(1, dtype=torch.int32, device=device)
    if num_slots:
        with device_of(rows.ends):
            _row_tiles_kernel[(num_slots,)](
                *(rows.ends, slot, row, count, num_slots),
                BLOCK_ROWS=block_rows,
                SLOTS=1 << max(4, (num_slots - 1).bit_length()),
                CHUNK=_CHUNK,
            )
    return RowTiles(slot, row, count)


def row_tiles_reference(rows: SlotRows, block_rows: int) -> RowTiles:
    """What `row_tiles` computes, on the host."""
    tiles = [(slot, first) for slot, own in rows.of_slots() for first in range(own.start, own.stop, block_rows)]
    slot, row = torch.zeros(2, _max_tiles(rows, block_rows), dtype=torch.int32)
    if tiles:
        slot[: len(tiles)], row[: len(tiles)] = torch.tensor(tiles, dtype=torch.int32).t()
    device = rows.ends.device
    count = torch.tensor([len(tiles)], dtype=torch.int32, device=device)
    return RowTiles(slot.to(device), row.to(device), count)


def _max_tiles(rows: SlotRows, block_rows: int) -> int:
    num_rows = len(rows.order)
    return min(num_rows, cdiv(num_rows, block_rows) + len(rows.ends))


@jit
def _row_tiles_kernel(
    ends_ptr,  # [num_slots]
    slot_ptr,  # [max_tiles]
    row_ptr,  # [max_tiles]
    count_ptr,  # [1]
    num_slots,
    BLOCK_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # A program per slot, each of which looks at all slots before its own.
    own = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    end = tl.load(ends_ptr + slot, mask=slot < num_slots, other=0)
    start = tl.load(ends_ptr + slot - 1, mask=(slot > 0) & (slot < num_slots), other=0)
    tiles = (end - start + BLOCK_ROWS - 1) // BLOCK_ROWS
    first = tl.sum(tl.where(slot < own, tiles, 0))
    own_tiles = tl.sum(tl.where(slot == own, tiles, 0))
    own_start = tl.sum(tl.where(slot == own, start, 0))
    for begun in range(0, own_tiles, CHUNK):
        tile = begun + tl.arange(0, CHUNK)
        mask = tile < own_tiles
        tl.store(slot_ptr + first + tile, tl.zeros([CHUNK], tl.int32) + own, mask=mask)
        tl.store(row_ptr + first + tile, own_start + tile * BLOCK_ROWS, mask=mask)
    if own == num_slots - 1:
        tl.store(count_ptr, first + own_tiles)
