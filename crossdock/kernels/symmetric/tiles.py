"""Parts of kernels: tiles of rows in a slot, and where slots and rows are."""

from __future__ import annotations

from crossdock.kernels.quantize import e4m3_values, quantize_groups
from crossdock.kernels.runtime import jit, tl
from crossdock.kernels.symmetric.memory import as_pointer

__all__ = ["encode_tile", "load_tile", "peer_slot", "row_in_slot", "slot_begin", "store_tile"]


@jit
def encode_tile(
    values,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    LARGEST_FINITE: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """What is stored of values, and the scale of each row."""
    if FP8:
        return quantize_groups(
            values.to(tl.float32), LARGEST, SMALLEST_SCALE, LARGEST_FINITE, BLOCK_ROWS, BLOCK_COLUMNS
        )
    else:
        return values, tl.zeros([BLOCK_ROWS], dtype=tl.float32)


@jit
def store_tile(
    slot_ptr,
    row,
    column,
    values,
    scale,
    mask,
    row_stride,
    scale_stride,
    first_scale,
    ELEMENT: tl.constexpr,
    FP8: tl.constexpr,
):
    """Store to the rows of a slot; `row` is -1 for none, `mask` is of the columns."""
    here = row >= 0
    values_ptr = as_pointer(slot_ptr, ELEMENT) + row[:, None] * row_stride + column
    tl.store(values_ptr, values, mask=here[:, None] & mask)
    if FP8:
        scale_ptr = as_pointer(slot_ptr, tl.float32) + row * scale_stride + first_scale
        tl.store(scale_ptr + tl.program_id(1), scale, mask=here)


@jit
def load_tile(
    slot_ptr,
    row,
    column,
    mask,
    row_stride,
    scale_stride,
    first_scale,
    ELEMENT: tl.constexpr,
    FP8: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Load from the rows of a slot: values as they are stored, of FP8 in fp32; 0 where `row` is -1."""
    here = row >= 0
    values_ptr = as_pointer(slot_ptr, ELEMENT) + row[:, None] * row_stride + column
    values = tl.load(values_ptr, mask=here[:, None] & mask, other=0)
    if FP8:
        scale_ptr = as_pointer(slot_ptr, tl.float32) + row * scale_stride + first_scale
        scale = tl.load(scale_ptr + tl.program_id(1), mask=here, other=0)
        product = e4m3_values(values) * scale[:, None]
        # NaN is neither above nor below.
        product = tl.where(product > LARGEST, LARGEST, product)
        return tl.where(product < -LARGEST, -LARGEST, product)
    else:
        return values


@jit
def slot_begin(ticket_ptr, first_byte, slot_bytes, NUM_SLOTS: tl.constexpr):
    """Where the slot of an exchange begins in every buffer."""
    return first_byte + (tl.load(ticket_ptr) % NUM_SLOTS) * slot_bytes


@jit
def peer_slot(addresses_ptr, peer, slot):
    """Where a slot of a peer's buffer begins. What is loaded is not known to be aligned, unless the pointer says so."""
    # Here and not by a function: inlining one drops what is said of its result.
    slot_ptr = (tl.load(addresses_ptr + peer) + slot).to(tl.pointer_type(tl.uint8))
    return tl.multiple_of(slot_ptr, 16)


@jit
def row_in_slot(row, num_rows, segments_ptr, capacity, NUM_RANKS: tl.constexpr, BLOCK_RANKS: tl.constexpr):
    """Where in the slot the rows that `segments` describes are, -1 for those that no token has."""
    source = tl.arange(0, BLOCK_RANKS)
    starts = tl.load(segments_ptr + source, mask=source < NUM_RANKS, other=2**62)
    # The last source that begins here or before: those without rows begin where the next one does.
    source = tl.sum((row[:, None] >= starts[None, :]).to(tl.int32), axis=1) - 1
    here = (row < num_rows) & (source >= 0)
    place = row - tl.load(segments_ptr + source, mask=here, other=0)
    here = here & (place < tl.load(segments_ptr + NUM_RANKS + source, mask=here, other=0))
    return tl.where(here, source.to(tl.int64) * capacity + place, -1)
