"""Routes poured over the copies of their experts so as to level the ranks (`copy_choice = least_load`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossdock.balance.pieces import Pieces, even_pieces, holders_of

__all__ = ["level"]

# Loads settle like heat along chains of ranks that share experts: what is left after so many rounds is cut off.
_ROUNDS = 30


def level(counts: Tensor, slots: Tensor) -> Pieces:
    """Split each expert's routes over its slots so that the busiest rank has few: near the least possible.

    From the even split on, one expert after another is taken off its ranks and poured back like water into vessels:
    up to one level where it reaches. Each such step makes the sum of the ranks' squared loads smaller, or leaves
    it, as it is. That sum is convex and each expert's split is bounded by itself alone, so in real numbers the steps
    converge to its least value; and splits that reach it have the least possible maximum too (the loads that splits
    can reach are the bases of a polymatroid: Fujishige 1980). Routes are whole, so a chain of ranks that share
    experts two by two may stay uneven by one route per link, and rounds are limited.

    Args:
        counts: `[R, E]` int64, routes of this step by source rank and logical expert, on the CPU.
        slots: `[R, S]` int64, the logical expert of each slot that is held, `-1` for none.

    Returns:
        Pieces over the `S` held slots of each rank.

    Raises:
        ValueError: where an expert with routes has no slot.
    """
    even = even_pieces(counts, slots)
    totals: list[int] = counts.sum(dim=0).tolist()
    amounts: list[list[int]] = even.amounts.tolist()
    loads: list[int] = even.per_rank.tolist()
    holders = holders_of(slots.tolist(), len(totals))
    several = [expert for expert, held in enumerate(holders) if len(held) > 1 and totals[expert]]
    several.sort(key=lambda expert: -totals[expert])
    least = -(-sum(totals) // len(loads))
    for _ in range(_ROUNDS):
        if max(loads) <= least:
            break
        moved = 0
        for expert in several:
            held = holders[expert]
            own = [amounts[rank][local] for rank, local in held]
            for (rank, _), amount in zip(held, own, strict=True):
                loads[rank] -= amount
            others = [loads[rank] for rank, _ in held]
            poured = _pour(totals[expert], others)
            for (rank, local), amount, before in zip(held, poured, own, strict=True):
                amounts[rank][local] = amount
                loads[rank] += amount
                moved += abs(amount - before)
        if not moved:
            break
    return Pieces(slots, torch.tensor(amounts))


def _pour(amount: int, levels: Sequence[int]) -> list[int]:
    """How much each vessel takes so that the lowest ones come up to one level; what does not divide, the first."""
    order = sorted(range(len(levels)), key=levels.__getitem__)
    below, wet = 0, 0
    for wet, vessel in enumerate(order, 1):
        below += levels[vessel]
        if wet == len(order) or amount + below <= wet * levels[order[wet]]:
            break
    surface, left = divmod(amount + below, wet)
    poured = [0] * len(levels)
    for place, vessel in enumerate(order[:wet]):
        poured[vessel] = surface - levels[vessel] + (place < left)
    return poured
