"""Popularity that shifts each step: relief within the step against a placement planned on the step before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossdock.balance import SpillLimits, assign, assignment, borrowed_slots_needed, even_pieces, spill
from crossdock.routing import count_experts, draw_zipf
from tests.balance.loads import drawn_counts, planned_on, zipf

LIMITS = {"eps": 0.02, "memory_bound": True}


def _imbalance(loads: Tensor) -> float:
    return float(loads.max() / loads.double().mean())


def test_token_by_token_on_8_ranks() -> None:
    """512,000 routes a step: what every rank computes, counted from the slots that each route takes."""
    num_ranks, num_experts, top_k, tokens = 8, 64, 8, 8000
    slots_per_rank = num_experts // num_ranks + 1
    limits = SpillLimits(borrowed_slots_needed(slots_per_rank, num_ranks), **LIMITS)
    popular = torch.zeros(num_experts)
    for step in range(3):
        ids = draw_zipf(num_ranks * tokens, num_experts, top_k, 1.0, step, torch.device("cpu")).view(
            num_ranks, tokens, top_k
        )
        counts = count_experts(ids, num_experts)
        if step:
            slots = planned_on(popular, num_ranks, slots_per_rank)
            stale = even_pieces(counts, slots)
            plan = spill(counts, slots, stale, limits)
            width = plan.pieces.experts.shape[1]
            taken = torch.cat([assign(own, assignment(counts, plan.pieces, rank)) for rank, own in enumerate(ids)])
            computed = (taken // width).flatten().bincount(minlength=num_ranks)
            assert _imbalance(stale.per_rank) >= 1.5
            assert _imbalance(computed) <= 1.02
        popular = counts.sum(dim=0)


@pytest.mark.parametrize(("num_ranks", "num_experts", "routes"), [(8, 64, 500_000), (32, 256, 5_000_000)])
def test_drawn_counts(num_ranks: int, num_experts: int, routes: int) -> None:
    slots_per_rank = num_experts // num_ranks + 1
    limits = SpillLimits(borrowed_slots_needed(slots_per_rank, num_ranks), **LIMITS)
    generator = torch.Generator().manual_seed(0)
    popular = torch.zeros(num_experts)
    for step in range(4):
        counts = drawn_counts(zipf(num_experts, 1.0, generator), routes, num_ranks, generator)
        if step:
            slots = planned_on(popular, num_ranks, slots_per_rank)
            stale = even_pieces(counts, slots)
            assert _imbalance(stale.per_rank) >= 1.5
            assert _imbalance(spill(counts, slots, stale, limits).after) <= 1.02
        popular = counts.sum(dim=0)


def test_the_plan_that_is_stale_was_good() -> None:
    """On the counts that it was made for: what makes it bad is the shift alone."""
    counts = drawn_counts(zipf(64, 1.0, torch.Generator().manual_seed(0)), 500_000, 8, torch.Generator().manual_seed(0))
    assert _imbalance(even_pieces(counts, planned_on(counts.sum(dim=0), 8, 9)).per_rank) <= 1.05
