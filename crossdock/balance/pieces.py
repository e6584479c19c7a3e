"""How many routes each slot computes in a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Pieces", "even_pieces", "holders_of"]


class Pieces(NamedTuple):
    """Routes of all ranks, in pieces: a slot computes so many routes of the expert whose weights it has.

    The pieces of an expert add up to its routes. `P` slots per rank: held ones, then borrowed ones where there are
    any. On the CPU; the same on all ranks.

    Attributes:
        experts: `[R, P]` int64, the logical expert of each slot, `-1` for none.
        amounts: `[R, P]` int64, routes; 0 where there is no expert.
    """

    experts: Tensor
    amounts: Tensor

    @property
    def per_rank(self) -> Tensor:
        """`[R]` int64, the routes that each rank computes."""
        return self.amounts.sum(dim=1)


def even_pieces(counts: Tensor, slots: Tensor) -> Pieces:
    """Each expert's routes split evenly over its slots; the first ones take what is left over.

    Args:
        counts: `[R, E]` int64, routes of this step by source rank and logical expert, on the CPU.
        slots: `[R, S]` int64, the logical expert of each slot that is held, `-1` for none.

    Raises:
        ValueError: where an expert with routes has no slot.
    """
    totals = counts.sum(dim=0)
    experts = slots.flatten()
    real = experts >= 0
    number = torch.zeros_like(totals).scatter_add_(0, experts.clamp_min(0), real.long())
    _refuse_homeless(totals, number)
    # How many slots of the same expert come before each.
    by_expert = experts.argsort(stable=True)
    first = number.cumsum(0) - number + (len(experts) - real.sum())
    position = torch.arange(len(experts))
    turn = torch.empty_like(experts).scatter_(0, by_expert, position - first[experts[by_expert]])
    share, left = totals // number.clamp_min(1), totals % number.clamp_min(1)
    amounts = torch.where(real, share[experts] + (turn < left[experts]), 0)
    return Pieces(slots, amounts.view_as(slots))


def _refuse_homeless(totals: Tensor, number: Tensor) -> None:
    homeless = ((totals > 0) & (number == 0)).nonzero().flatten().tolist()
    if homeless:
        raise ValueError(f"experts with routes need a slot; without one: {homeless}")


def holders_of(slots: list[list[int]], num_experts: int) -> list[list[tuple[int, int]]]:
    """Of each expert, `(rank, local slot)` of its slots, in that order."""
    holders: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for rank, experts in enumerate(slots):
        for local, expert in enumerate(experts):
            if expert >= 0:
                holders[expert].append((rank, local))
    return holders
