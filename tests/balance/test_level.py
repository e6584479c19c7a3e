"""Pouring over copies gives the least possible maximum."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings

from crossdock.balance import even_pieces, level
from tests.balance.loads import Case, cases, drawn_counts, planned_on, zipf


def _least_maximum(case: Case) -> int:
    """By Hall's condition: some ranks alone hold some experts, whose routes they must share, whole routes each."""
    num_ranks = len(case.slots)
    homes = [
        set((case.slots == expert).any(dim=1).nonzero().flatten().tolist()) for expert in range(case.counts.shape[1])
    ]
    totals = case.counts.sum(dim=0).tolist()
    least = 0
    for size in range(1, num_ranks + 1):
        for ranks in itertools.combinations(range(num_ranks), size):
            confined = sum(total for total, home in zip(totals, homes, strict=True) if home <= set(ranks))
            least = max(least, -(-confined // size))
    return least


@settings(deadline=None, max_examples=250)
@given(case=cases(distinct=False))
def test_the_busiest_rank_has_the_fewest_routes_possible(case: Case) -> None:
    assert int(level(case.counts, case.slots).per_rank.max()) == _least_maximum(case)


@pytest.mark.parametrize("num_ranks", [2, 3, 40])
def test_along_a_chain_of_ranks(num_ranks: int) -> None:
    """Each rank shares one expert with the next; all routes start at one end."""
    slots = torch.tensor([[rank, rank + 1] for rank in range(num_ranks)])
    counts = torch.zeros(num_ranks, num_ranks + 1, dtype=torch.int64)
    counts[0, 0] = counts[-1, 1] = 1000
    counts[0, 2:] = 1000 // num_ranks
    case = Case(counts, slots)
    total = int(counts.sum())
    # Expert 0 has one slot: rank 0 keeps its routes, and all others spread over the rest.
    assert int(level(*case).per_rank.max()) == max(1000, -(-total // num_ranks))


def test_skewed_counts_of_32_ranks_are_closer_to_the_mean_than_even_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    share = zipf(256, 1.0, generator)
    slots = planned_on(share, 32, 9)
    counts = drawn_counts(share, 320_000, 32, generator)
    poured, even = (float(split(counts, slots).per_rank.max()) / 10_000 for split in (level, even_pieces))
    assert poured <= 1.011
    assert even >= 1.02
