"""Popularity that stays: experts placed by the loads of the past, with one copy per rank, on routes to come."""

from __future__ import annotations

import torch

from crossdock.balance import choose, copy_table
from crossdock.placement import PLANNERS, PlanningSituation
from crossdock.routing import count_experts, draw_zipf
from tests.balance.loads import drawn_counts, zipf


def test_token_by_token_on_8_ranks() -> None:
    """1,000,000 routes: what every rank computes, counted from the slots that each route takes."""
    num_ranks, num_experts, top_k, tokens = 8, 64, 8, 16_000
    situation = PlanningSituation(num_ranks, num_experts // num_ranks + 1)
    # One popularity, other draws.
    past, coming = (
        draw_zipf(num_ranks * tokens * 2, num_experts, top_k, 1.0, 0, torch.device("cpu"))
        .view(2, num_ranks, tokens, top_k)
        .unbind()
    )
    loads = count_experts(past, num_experts).sum(dim=0)
    slots = PLANNERS["exchange"](loads[None], situation)[0]
    computed = torch.zeros(num_ranks, dtype=torch.int64)
    for rank, ids in enumerate(coming):
        taken = choose(ids, copy_table(slots, slots.shape[1], rank), rank)
        computed += (taken // slots.shape[1]).flatten().bincount(minlength=num_ranks)
    assert computed.sum() >= 500_000
    assert computed.max() / computed.double().mean() <= 1.01


def test_drawn_counts_on_32_ranks() -> None:
    """5,000,000 routes; each rank deals an expert's routes out to its copies in turn."""
    num_ranks, num_experts = 32, 256
    generator = torch.Generator().manual_seed(0)
    share = zipf(num_experts, 1.0, generator)
    past, coming = (drawn_counts(share, 5_000_000, num_ranks, generator) for _ in range(2))
    slots = PLANNERS["exchange"](past.sum(dim=0)[None], PlanningSituation(num_ranks, num_experts // num_ranks + 1))[0]
    computed = torch.zeros(num_ranks, dtype=torch.int64)
    for rank, counts in enumerate(coming):
        table = copy_table(slots, slots.shape[1], rank)
        ids = torch.arange(num_experts).repeat_interleave(counts)[:, None]
        computed += (choose(ids, table, rank) // slots.shape[1]).flatten().bincount(minlength=num_ranks)
    assert computed.sum() >= 4_990_000
    assert computed.max() / computed.double().mean() <= 1.01
