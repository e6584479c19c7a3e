"""Which ranks a token needs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["needed_ranks"]


def needed_ranks(slot_ids: Tensor, slots_per_rank: int, num_ranks: int) -> Tensor:
    """`[T, R]` bool: whether a rank owns any of a token's `slot_ids` `[T, K]` (global, `-1` is no route)."""
    ranks = torch.where(slot_ids < 0, num_ranks, slot_ids // slots_per_rank)
    needed = torch.zeros(len(slot_ids), num_ranks + 1, dtype=torch.bool, device=slot_ids.device)
    return needed.scatter_(1, ranks, True)[:, :num_ranks]
