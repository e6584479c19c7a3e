"""Counts and placements that tests of plans draw."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from crossdock.placement import PLANNERS, PlanningSituation


class Case(NamedTuple):
    """`counts [R, E]` of a step, and the `slots [R, S]` that are held; an expert may have several, some are empty."""

    counts: Tensor
    slots: Tensor


@st.composite
def cases(draw: st.DrawFn, most: int = 400, distinct: bool = True) -> Case:
    """Every kind of load: even, skewed, a few experts alone, none; every kind of placement.

    Args:
        most: routes of one expert from one rank.
        distinct: whether no rank holds an expert twice.
    """
    num_ranks = draw(st.integers(1, 6))
    held = draw(st.integers(1, 5))
    num_experts = draw(st.integers(1, num_ranks * held))
    random = draw(st.randoms(use_true_random=False))
    places = [(rank, local) for rank in range(num_ranks) for local in range(held)]
    random.shuffle(places)
    slots = [[-1] * held for _ in range(num_ranks)]
    copies = draw(st.floats(0, 1))
    for number, (rank, local) in enumerate(places):
        if number < num_experts:
            slots[rank][local] = number
        elif random.random() < copies:
            expert = random.randrange(num_experts)
            if not distinct or expert not in slots[rank]:
                slots[rank][local] = expert
    kind = draw(st.sampled_from(["even", "skewed", "few", "none"]))
    skew = draw(st.floats(0.5, 3))
    share = {
        "even": [1.0] * num_experts,
        "skewed": [(1 + expert) ** -skew for expert in range(num_experts)],
        "few": [float(random.random() < 0.2) for _ in range(num_experts)],
        "none": [0.0] * num_experts,
    }[kind]
    random.shuffle(share)
    counts = [[int(random.random() * most * part) for part in share] for _ in range(num_ranks)]
    return Case(torch.tensor(counts), torch.tensor(slots))


def zipf(num_experts: int, exponent: float, generator: torch.Generator) -> Tensor:
    """`[E]` float64 shares that fall with a shuffled rank of popularity."""
    share = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -exponent
    return share[torch.randperm(num_experts, generator=generator)] / share.sum()


def drawn_counts(share: Tensor, routes: int, num_ranks: int, generator: torch.Generator) -> Tensor:
    """`[R, E]` int64: so many routes in all, drawn one by one, each rank as many."""
    drawn = torch.multinomial(share.expand(num_ranks, -1), routes // num_ranks, replacement=True, generator=generator)
    return torch.zeros(num_ranks, len(share), dtype=torch.int64).scatter_add_(1, drawn, torch.ones_like(drawn))


def planned_on(popular: Tensor, num_ranks: int, slots_per_rank: int) -> Tensor:
    """Slots `[R, S]` by the published method, on loads `[E]`."""
    return PLANNERS["deepseek"](popular[None], PlanningSituation(num_ranks, slots_per_rank))[0]
