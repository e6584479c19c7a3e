"""Every rank owns the same number of primaries, whatever the plan."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock.placement import PLANNERS, PlanningSituation, max_mean, plan_with_primaries, with_primaries
from tests.placement.loads import KINDS, draw_loads, has_copies_on_one_rank


def check_primaries(plan: Tensor, num_experts: int, rows_per_rank: int) -> None:
    for layer in plan:
        primaries = [expert for expert in layer[:, :rows_per_rank].flatten().tolist() if expert != -1]
        assert sorted(primaries) == list(range(num_experts))


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("kind", KINDS)
def test_256_experts_and_32_copies_on_8_ranks_of_36_slots(name: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    loads = torch.stack([draw_loads(kind, 256, generator) for _ in range(3)])
    situation = PlanningSituation(8, 36)
    plan = plan_with_primaries(PLANNERS[name], loads, situation)
    check_primaries(plan, 256, 32)
    assert (plan != -1).all()
    if name == "exchange":
        assert not has_copies_on_one_rank(plan).any()
    drifted = loads * (0.3 * torch.randn(loads.shape, generator=generator)).exp()
    check_primaries(plan_with_primaries(PLANNERS[name], drifted, situation, plan), 256, 32)


@pytest.mark.parametrize(("num_ranks", "num_experts"), [(8, 64), (32, 256)])
def test_one_copy_per_rank_levels_zipf_loads_to_one_percent(num_ranks: int, num_experts: int) -> None:
    generator = torch.Generator().manual_seed(num_ranks)
    loads = torch.stack([draw_loads("zipf1", num_experts, generator) for _ in range(8)])
    situation = PlanningSituation(num_ranks, num_experts // num_ranks + 1)
    plan = plan_with_primaries(PLANNERS["exchange"], loads, situation)
    check_primaries(plan, num_experts, num_experts // num_ranks)
    assert (max_mean(loads, plan, situation) <= 1.01).all()


@pytest.mark.parametrize("name", PLANNERS)
@settings(max_examples=12, deadline=None)
@given(
    num_ranks=st.integers(1, 6),
    num_experts=st.integers(1, 40),
    copies=st.integers(0, 3),
    kind=st.sampled_from(KINDS),
    out=st.booleans(),
)
def test_any_sizes_and_planning_again_changes_nothing(
    name: str, num_ranks: int, num_experts: int, copies: int, kind: str, out: bool
) -> None:
    ranks_out = (num_ranks - 1,) if out and num_ranks > 1 else ()
    living = num_ranks - len(ranks_out)
    rows = -(-num_experts // living)
    situation = PlanningSituation(num_ranks, rows + copies, ranks_out=ranks_out)
    loads = draw_loads(kind, num_experts, torch.Generator().manual_seed(num_experts))[None]
    plan = plan_with_primaries(PLANNERS[name], loads, situation)
    assert plan.shape == (1, num_ranks, rows + copies)
    check_primaries(plan, num_experts, rows)
    assert (plan[:, list(ranks_out)] == -1).all()
    if name == "exchange":
        assert torch.equal(plan_with_primaries(PLANNERS[name], loads, situation, plan), plan)


@pytest.mark.parametrize(
    "plan",
    [
        [[0, 1, 2, 3], [4, 5, 4, 5]],  # four experts without a second copy on a rank of three rows
        [[0, 0, 0, 1], [2, 3, 4, 5]],  # copies on one rank, so that the other has too many
        [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [8, 4, 5, 6]],
    ],
)
def test_a_plan_that_admits_no_matching_is_repaired(plan: list[list[int]]) -> None:
    num_experts = max(map(max, plan)) + 1
    rows = -(-num_experts // len(plan))
    result = with_primaries(torch.tensor([plan]), num_experts, rows)
    check_primaries(result, num_experts, rows)
    assert result.shape == (1, len(plan), 4)
    assert not (torch.equal(result.sort(dim=2).values, torch.tensor([plan]).sort(dim=2).values))


def test_a_repair_costs_little_balance() -> None:
    generator = torch.Generator().manual_seed(1)
    loads = torch.stack([draw_loads("zipf1", 256, generator) for _ in range(8)])
    situation = PlanningSituation(32, 9)
    published = PLANNERS["deepseek"](loads, situation)
    plan = with_primaries(published, 256, 8, None, loads)
    check_primaries(plan, 256, 8)
    assert not torch.equal(plan.sort(dim=2).values, published.sort(dim=2).values)
    assert (max_mean(loads, plan, situation) < max_mean(loads, published, situation) + 0.1).all()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_as_many_primaries_stay_on_their_ranks_as_any_matching_allows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_experts, num_ranks, rows = 10, 5, 2
    situation = PlanningSituation(num_ranks, 4)
    current, plan = (
        plan_with_primaries(PLANNERS["deepseek"], draw_loads("zipf0.5", num_experts, generator)[None], situation)
        for _ in range(2)
    )
    result = with_primaries(plan, num_experts, rows, current)
    check_primaries(result, num_experts, rows)
    assert torch.equal(result.sort(dim=2).values, plan.sort(dim=2).values)
    before = {expert: rank for rank in range(num_ranks) for expert in current[0, rank, :rows].tolist()}
    stayed = sum(before[expert] == rank for rank in range(num_ranks) for expert in result[0, rank, :rows].tolist())
    held = [[rank for rank in range(num_ranks) if expert in plan[0, rank]] for expert in range(num_experts)]
    most = max(
        sum(before[expert] == rank for expert, rank in enumerate(owners))
        for owners in itertools.product(*held)
        if all(owners.count(rank) == rows for rank in range(num_ranks))
    )
    assert stayed == most


def test_primaries_and_copies_that_stay_keep_their_slots() -> None:
    generator = torch.Generator().manual_seed(2)
    loads = torch.stack([draw_loads("zipf1", 64, generator) for _ in range(4)])
    situation = PlanningSituation(8, 10, move_cost=0.05)
    current = plan_with_primaries(PLANNERS["exchange"], loads, situation)
    drifted = loads * (0.4 * torch.randn(loads.shape, generator=generator)).exp()
    plan = plan_with_primaries(PLANNERS["exchange"], drifted, situation, current)
    for part in (slice(8), slice(8, None)):
        stays = (plan[..., part, None] == current[..., None, part]).any(3)
        assert (plan[..., part] == current[..., part])[stays].all()
        assert stays.any()
    assert not torch.equal(plan, current)


def test_moving_a_copy_is_free_and_moving_a_primary_is_not() -> None:
    generator = torch.Generator().manual_seed(3)
    loads = torch.stack([draw_loads("zipf1", 64, generator) for _ in range(4)])
    situation = PlanningSituation(8, 10, move_cost=1000.0)
    current = plan_with_primaries(PLANNERS["exchange"], loads, situation)
    plan = plan_with_primaries(PLANNERS["exchange"], loads.flip(1), situation, current)
    assert torch.equal(plan[..., :8], current[..., :8])
    assert not torch.equal(plan[..., 8:], current[..., 8:])
    before, after = (max_mean(loads.flip(1), each, situation) for each in (current, plan))
    assert (after < before).all()


def test_rows_and_slots_that_do_not_fit_are_refused() -> None:
    plan = torch.tensor([[[0, 1], [2, 3]]])
    with pytest.raises(ValueError, match="rows_per_rank = 1: 4 experts on 2 ranks of 2 slots need 2 to 2"):
        with_primaries(plan, 4, 1)
    with pytest.raises(ValueError, match=r"experts \[4\] have no slot"):
        with_primaries(torch.tensor([[[0, 1, 1], [2, 3, -1]]]), 5, 3)
    with pytest.raises(ValueError, match=r"current of shape \(1, 2, 3\)"):
        with_primaries(plan, 4, 2, torch.zeros(1, 2, 3, dtype=torch.int64))
