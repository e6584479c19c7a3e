"""A plan to start from: copies for the heaviest experts, dealt in rounds."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fresh_start"]


def fresh_start(loads: Tensor, num_ranks: int, slots_per_rank: int) -> Tensor:
    """A plan `[L, R, S]` of loads `[L, E]` without two copies of an expert on one rank; needs `E <= R S <= E R`."""
    return _deal(loads, _replicate(loads, num_ranks * slots_per_rank, num_ranks), num_ranks, slots_per_rank)


def _replicate(loads: Tensor, num_slots: int, most: int) -> Tensor:
    """Copies of each expert `[L, E]`, `most` at most: each further one goes to the expert with most load per copy."""
    copies = torch.ones_like(loads)
    share = loads.clone() if most > 1 else torch.full_like(loads, -torch.inf)
    for _ in range(loads.shape[1], num_slots):
        heaviest = share.argmax(1, keepdim=True)
        number = copies.gather(1, heaviest) + 1
        copies.scatter_(1, heaviest, number)
        following = (loads.gather(1, heaviest) / number).masked_fill_(number >= most, -torch.inf)
        share.scatter_(1, heaviest, following)
    return copies.long()


def _deal(loads: Tensor, copies: Tensor, num_ranks: int, slots_per_rank: int) -> Tensor:
    """Copies in rounds of one per rank, the heaviest first, in each round the heaviest to the lightest rank.

    The copies of an expert follow one another, so at most the last expert of a round goes on in the next: what is left
    of it is dealt first there, to ranks without it. So no rank gets it twice.
    """
    num_layers = len(loads)
    share = loads / copies
    order = share.argsort(dim=1, descending=True, stable=True)
    ends = copies.gather(1, order).cumsum(1)
    numbers = torch.arange(num_ranks * slots_per_rank).expand(num_layers, -1).contiguous()
    expert = order.gather(1, torch.searchsorted(ends, numbers, right=True))
    share = share.gather(1, expert)
    plan = torch.empty(num_layers, num_ranks, slots_per_rank, dtype=torch.int64)
    total = loads.new_zeros(num_layers, num_ranks)
    dealt, ranks = expert[:, :0], numbers[:, :num_ranks]
    for slot in range(slots_per_rank):
        now = expert[:, slot * num_ranks : (slot + 1) * num_ranks]
        if slot:
            goes_on = dealt[:, -1:]
            number_left = (now == goes_on).sum(1, keepdim=True)
            holds = torch.zeros(num_layers, num_ranks, dtype=torch.bool).scatter_(1, ranks, dealt == goes_on)
            # The lightest ranks without it come first, then the others by load.
            place = total.masked_fill(holds, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
            ranks = total.masked_fill(place < number_left, -1.0).argsort(dim=1, stable=True)
        plan[:, :, slot].scatter_(1, ranks, now)
        total.scatter_add_(1, ranks, share[:, slot * num_ranks : (slot + 1) * num_ranks])
        dealt = now
    return plan
