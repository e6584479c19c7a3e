"""Where tokens go: the row of each (token, rank) pair in that rank's buffer, counted in the order of the tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.kernels.runtime import cdiv, device_of, jit, runs, tl
from crossdock.kernels.symmetric.memory import next_power_of_two

__all__ = ["Places", "place_tokens", "place_tokens_reference"]

_BLOCK, _NUM_WARPS = 64, 4


class Places(NamedTuple):
    """Of `T` tokens among `R` ranks.

    Attributes:
        row: `[T, R]` int32, the place of a token among those that need a rank, `-1` where it does not.
        counts: `[R]` int64, how many do.
    """

    row: Tensor
    counts: Tensor


def place_tokens(slot_ids: Tensor, slots_per_rank: int, num_ranks: int) -> Places:
    """One row per rank that owns any of a token's `slot_ids [T, K]` (int64, global, `-1` is no route). No sync."""
    if not runs(slot_ids):
        return place_tokens_reference(slot_ids, slots_per_rank, num_ranks)
    slots = slot_ids.contiguous()
    (num_tokens, top_k), device = slots.shape, slots.device
    num_blocks = cdiv(num_tokens, _BLOCK)
    row = torch.empty(num_tokens, num_ranks, dtype=torch.int32, device=device)
    per_block = torch.zeros(num_blocks, num_ranks, dtype=torch.int32, device=device)
    if not num_blocks:
        return Places(row, torch.zeros(num_ranks, dtype=torch.int64, device=device))
    arguments = (num_tokens, slots_per_rank, num_ranks)
    constants = {"TOP_K": top_k, "BLOCK_RANKS": next_power_of_two(num_ranks), "BLOCK": _BLOCK, "num_warps": _NUM_WARPS}
    with device_of(slots):
        _count_kernel[(num_blocks,)](slots, per_block, *arguments, **constants)
        until = per_block.cumsum(0)
        _place_kernel[(num_blocks,)](slots, until, per_block, row, *arguments, **constants)
    return Places(row, until[-1])


def place_tokens_reference(slot_ids: Tensor, slots_per_rank: int, num_ranks: int) -> Places:
    """What `place_tokens` computes, in torch's own operations."""
    ranks = torch.where(slot_ids < 0, num_ranks, slot_ids // slots_per_rank)
    needed = torch.zeros(len(slot_ids), num_ranks + 1, dtype=torch.int64, device=slot_ids.device)
    needed = needed.scatter_(1, ranks, 1)[:, :num_ranks]
    row = torch.where(needed > 0, needed.cumsum(0) - 1, -1)
    return Places(row.to(torch.int32), needed.sum(0))


@jit
def _needed(slots_ptr, num_tokens, slots_per_rank, TOP_K: tl.constexpr, BLOCK_RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """The block's tokens, and `[BLOCK, BLOCK_RANKS]` int32: 1 where a token needs a rank."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, BLOCK_RANKS)[None, :]
    needed = tl.zeros([BLOCK, BLOCK_RANKS], dtype=tl.int32)
    for k in tl.static_range(TOP_K):
        slot = tl.load(slots_ptr + token * TOP_K + k, mask=token < num_tokens, other=-1)
        # Division rounds to zero when compiled: -1 would be a slot of the first rank.
        owner = tl.where(slot < 0, -1, slot // slots_per_rank)
        needed = needed | (owner[:, None] == rank).to(tl.int32)
    return token, needed


@jit
def _count_kernel(
    slots_ptr,  # [num_tokens, TOP_K]
    per_block_ptr,  # [blocks, num_ranks]
    num_tokens,
    slots_per_rank,
    num_ranks,
    TOP_K: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, needed = _needed(slots_ptr, num_tokens, slots_per_rank, TOP_K, BLOCK_RANKS, BLOCK)
    rank = tl.arange(0, BLOCK_RANKS)
    tl.store(per_block_ptr + tl.program_id(0) * num_ranks + rank, tl.sum(needed, axis=0), mask=rank < num_ranks)


@jit
def _place_kernel(
    slots_ptr,  # [num_tokens, TOP_K]
    until_ptr,  # [blocks, num_ranks] int64: tokens that need a rank up to and with a block
    per_block_ptr,  # [blocks, num_ranks]
    row_ptr,  # [num_tokens, num_ranks]
    num_tokens,
    slots_per_rank,
    num_ranks,
    TOP_K: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, needed = _needed(slots_ptr, num_tokens, slots_per_rank, TOP_K, BLOCK_RANKS, BLOCK)
    rank = tl.arange(0, BLOCK_RANKS)
    of_block = tl.program_id(0) * num_ranks + rank
    until = tl.load(until_ptr + of_block, mask=rank < num_ranks, other=0).to(tl.int32)
    before = until - tl.load(per_block_ptr + of_block, mask=rank < num_ranks, other=0)
    row = tl.where(needed > 0, before[None, :] + tl.cumsum(needed, axis=0) - 1, -1)
    mask = (token < num_tokens)[:, None] & (rank < num_ranks)[None, :]
    tl.store(row_ptr + token[:, None] * num_ranks + rank[None, :], row, mask=mask)
