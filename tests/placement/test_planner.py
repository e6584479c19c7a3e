"""Both planners: what any plan promises, what ours promises besides."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock.placement import PLANNERS, PlanningSituation, max_mean, rank_loads
from tests.placement.exhaustive import least_maximum
from tests.placement.loads import KINDS, corpus, draw_loads, has_copies_on_one_rank

OURS = PLANNERS["exchange"]
PUBLISHED = PLANNERS["deepseek"]


def situation_and_loads(draw: st.DrawFn) -> tuple[PlanningSituation, Tensor]:
    """Ranks, some of them gone, slots that suffice, nodes, groups, a rule; loads of two layers."""
    num_nodes = draw(st.sampled_from([1, 1, 2, 3]))
    num_ranks = num_nodes * draw(st.integers(1, 4))
    ranks_out = draw(st.sets(st.integers(0, num_ranks - 1), max_size=min(2, num_ranks - 1)))
    num_groups = draw(st.sampled_from([1, 1, 2, 4]))
    num_experts = num_groups * draw(st.sampled_from([1, 2, 5, 8, 9, 10]))
    least = -(-num_experts // (num_ranks - len(ranks_out)))
    situation = PlanningSituation(
        num_ranks,
        draw(st.integers(least, least + 2)),
        num_nodes,
        num_groups,
        tuple(sorted(ranks_out)),
        draw(st.sampled_from(["even", "nearest", "least_load"])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    kinds = draw(st.lists(st.sampled_from([*KINDS, "zero"]), min_size=2, max_size=2))
    loads = [torch.zeros(num_experts) if kind == "zero" else draw_loads(kind, num_experts, generator) for kind in kinds]
    return situation, torch.stack([each.double() for each in loads])


situations = st.composite(situation_and_loads)()


def check_plan(plan: Tensor, loads: Tensor, situation: PlanningSituation) -> None:
    assert plan.dtype == torch.int64
    assert plan.shape == (len(loads), situation.num_ranks, situation.slots_per_rank)
    assert (plan[:, list(situation.ranks_out)] == -1).all()
    for layer in plan:
        assert set(layer.flatten().tolist()) - {-1} == set(range(loads.shape[1]))


@pytest.mark.parametrize("name", PLANNERS)
@settings(max_examples=8, deadline=None)
@given(case=situations)
def test_every_expert_has_a_slot_and_planning_again_changes_nothing(
    name: str, case: tuple[PlanningSituation, Tensor]
) -> None:
    situation, loads = case
    plan = PLANNERS[name](loads, situation)
    check_plan(plan, loads, situation)
    assert torch.equal(PLANNERS[name](loads, situation, plan), plan)
    assert torch.equal(PLANNERS[name](loads, dataclasses.replace(situation, move_cost=0.1), plan), plan)


@settings(max_examples=8, deadline=None)
@given(case=situations)
def test_ours_never_puts_two_copies_on_a_rank_and_fills_every_slot_it_can(
    case: tuple[PlanningSituation, Tensor],
) -> None:
    situation, loads = case
    plan = OURS(loads, situation)
    assert not has_copies_on_one_rank(plan).any()
    filled = len(situation.living) * min(situation.slots_per_rank, loads.shape[1])
    assert ((plan != -1).flatten(1).sum(1) == filled).all()


@pytest.mark.parametrize("name", PLANNERS)
@settings(max_examples=8, deadline=None)
@given(case=situations, seed=st.integers(0, 100))
def test_a_higher_cost_never_moves_more_and_no_plan_costs_more_than_to_stay(
    name: str, case: tuple[PlanningSituation, Tensor], seed: int
) -> None:
    situation, loads = case
    current = OURS(loads, situation)
    loads = loads * (1 + torch.rand(loads.shape, generator=torch.Generator().manual_seed(seed)))
    before = None
    for move_cost in (0.0, 0.05, 0.5, 100.0):
        plan = PLANNERS[name](loads, dataclasses.replace(situation, move_cost=move_cost), current)
        check_plan(plan, loads, situation)
        moves = moved(plan, current)
        assert before is None or (moves <= before).all()
        before = moves
    assert before is not None
    if name == "exchange":
        assert (before == 0).all()


def test_moves_pay_for_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    loads = torch.stack([draw_loads("zipf1", 64, generator) for _ in range(4)])
    situation = PlanningSituation(8, 9, move_cost=1.0)
    current = OURS(loads, situation)
    drifted = loads * (0.3 * torch.randn(loads.shape, generator=generator)).exp()
    plan, free = (
        OURS(drifted, dataclasses.replace(situation, move_cost=move_cost), current) for move_cost in (1.0, 0.0)
    )
    gain = max_mean(drifted, current, situation) - max_mean(drifted, plan, situation)
    assert (moved(plan, current) > 0).any()
    assert (gain >= moved(plan, current) / 72).all()
    # The last moves towards the best balance would not have paid.
    assert (moved(plan, current) < moved(free, current)).all()
    further = max_mean(drifted, plan, situation) - max_mean(drifted, free, situation)
    assert (further < (moved(free, current) - moved(plan, current)) / 72).all()


def test_an_expert_that_stays_keeps_its_slot() -> None:
    generator = torch.Generator().manual_seed(1)
    loads = torch.stack([draw_loads("log-normal", 32, generator) for _ in range(3)])
    situation = PlanningSituation(4, 10)
    current = OURS(loads, situation)
    plan = OURS(loads.flip(1), dataclasses.replace(situation, move_cost=0.3), current)
    stays = (plan[..., None] == current[..., None, :]).any(3)
    assert (plan == current)[stays].all()
    assert not stays.all()


def test_layers_are_planned_for_on_their_own() -> None:
    for num_experts, num_ranks, slots_per_rank in ((64, 8, 9), (8, 4, 3)):
        generator = torch.Generator().manual_seed(2)
        loads = torch.stack([draw_loads(kind, num_experts, generator) for kind in KINDS])
        situation = PlanningSituation(num_ranks, slots_per_rank)
        whole = OURS(loads, situation)
        for layer in (0, 3, 7):
            assert torch.equal(OURS(loads[layer : layer + 1], situation), whole[layer : layer + 1])


def test_ranks_that_go_leave_their_experts_to_others_that_keep_theirs() -> None:
    generator = torch.Generator().manual_seed(3)
    loads = torch.stack([draw_loads("zipf1", 64, generator) for _ in range(2)])
    current = OURS(loads, PlanningSituation(8, 11))
    situation = PlanningSituation(8, 11, ranks_out=(2, 5), move_cost=1.0)
    plan = OURS(loads, situation, current)
    check_plan(plan, loads, situation)
    assert not has_copies_on_one_rank(plan).any()
    assert (moved(plan, current) <= 22).all()
    assert (max_mean(loads, plan, situation) < 1.25).all()
    assert (
        max_mean(loads, OURS(loads, dataclasses.replace(situation, move_cost=0.0), current), situation) < 1.02
    ).all()


def test_copies_of_an_expert_lie_on_different_nodes_where_tokens_choose_the_nearest() -> None:
    generator = torch.Generator().manual_seed(4)
    loads = torch.stack([draw_loads("zipf1", 64, generator) for _ in range(4)])
    situation = PlanningSituation(16, 5, num_nodes=4, copy_choice="nearest")
    even = OURS(loads, dataclasses.replace(situation, copy_choice="even"))
    plan = OURS(loads, situation)
    assert (between_nodes(loads, plan, 4) < 0.85 * between_nodes(loads, even, 4)).all()
    assert (max_mean(loads, plan, situation) < 1.06).all()
    assert (max_mean(loads, plan, situation) < max_mean(loads, even, situation)).all()


def test_experts_of_a_group_share_a_node_without_loss_of_balance() -> None:
    generator = torch.Generator().manual_seed(5)
    loads = torch.stack([draw_loads("zipf0.5", 64, generator) for _ in range(4)])
    situation = PlanningSituation(16, 5, num_nodes=4, num_groups=8)
    alike = OURS(loads, dataclasses.replace(situation, num_groups=1))
    plan = OURS(loads, situation)
    assert (max_mean(loads, plan, situation) <= max_mean(loads, alike, situation) + 0.01).all()
    assert (scattered(loads, plan) < 0.85 * scattered(loads, alike)).all()


def test_ours_is_never_worse_than_the_published_method_without_its_double_copies() -> None:
    compare_with_published(corpus(num_shapes=30, layers=10, seed=0))


@pytest.mark.slow
def test_ours_is_never_worse_over_many_matrices() -> None:
    compare_with_published(corpus(num_shapes=250, layers=10, seed=1))


def compare_with_published(cases: Any) -> None:
    """Ours at most the published method's max/mean; where that has two copies on a rank, the worst is told."""
    worst = (0.0, 0, 0, 0)
    for loads, num_ranks, slots_per_rank in cases:
        situation = PlanningSituation(num_ranks, slots_per_rank)
        ours, theirs = OURS(loads, situation), PUBLISHED(loads, situation)
        check_plan(ours, loads, situation)
        assert not has_copies_on_one_rank(ours).any()
        ratio = max_mean(loads, ours, situation) / max_mean(loads, theirs, situation)
        twice = has_copies_on_one_rank(theirs)
        assert (ratio[~twice] <= 1 + 1e-12).all()
        worst = max(worst, (ratio.max().item(), loads.shape[1], num_ranks, slots_per_rank))
    print(f"worst ratio, with two copies on a rank: {worst[0]:.4f} (E, R, S = {worst[1:]})")
    assert worst[0] < 1.25


def test_the_case_in_which_greedy_placement_is_far_from_the_best() -> None:
    loads, situation = [600.0, 560, 120, 120, 20, 10, 10, 10], PlanningSituation(8, 2)
    best = least_maximum(loads, 8, 2, below=232)
    assert best == pytest.approx(196.6667, abs=1e-3)
    assert rank_loads(torch.tensor([loads]), OURS(torch.tensor([loads]), situation), situation).max() == pytest.approx(
        best
    )


SMALL = [(8, 8, 2), (4, 2, 3), (4, 4, 2), (6, 3, 3), (6, 4, 2), (7, 3, 3), (9, 3, 3), (10, 2, 5), (10, 5, 2), (3, 3, 2)]


@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_small_plans_are_within_two_percent_of_the_best(sizes: tuple[int, int, int]) -> None:
    compare_with_best(*sizes, KINDS, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [*SMALL, (8, 4, 3), (5, 5, 3), (6, 6, 2), (8, 4, 2), (6, 4, 3), (5, 4, 4), (10, 4, 3)], ids=str
)
def test_many_small_plans_are_within_two_percent_of_the_best(sizes: tuple[int, int, int]) -> None:
    compare_with_best(*sizes, KINDS * 3, seed=1)


def compare_with_best(num_experts: int, num_ranks: int, slots_per_rank: int, kinds: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loads = torch.stack([draw_loads(kind, num_experts, generator) for kind in kinds])
    situation = PlanningSituation(num_ranks, slots_per_rank)
    top = rank_loads(loads, OURS(loads, situation), situation).amax(1).tolist()
    for weight, ours in zip(loads.tolist(), top, strict=True):
        below = ours / 1.02
        assert least_maximum(weight, num_ranks, slots_per_rank, below) == below


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize(
    ("loads", "sizes", "filled"),
    [
        ([[5.0]], (1, 1), [[[0]]]),
        ([[1.0, 2.0, 3.0]], (1, 3), [[[0, 1, 2]]]),
        ([[0.0, 0.0]], (2, 1), [[[0], [1]]]),
    ],
)
def test_trivial_plans(name: str, loads: list[list[float]], sizes: tuple[int, int], filled: Any) -> None:
    plan = PLANNERS[name](torch.tensor(loads), PlanningSituation(*sizes))
    assert plan.sort(dim=2).values.sort(dim=1).values.tolist() == filled


def test_more_slots_than_experts_leave_the_surplus_empty() -> None:
    situation = PlanningSituation(2, 4)
    loads = torch.tensor([[3, 1, 2]])
    for more in range(4, 8):
        check_plan(OURS(loads, PlanningSituation(2, more)), loads, PlanningSituation(2, more))
    plan = OURS(loads, situation)
    assert plan.tolist() == [[[*sorted(row[:3], key=row.index), -1] for row in plan[0].tolist()]]
    assert [sorted(row) for row in plan[0].tolist()] == [[-1, 0, 1, 2]] * 2
    assert torch.equal(OURS(loads, situation, plan), plan)


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool])
def test_loads_of_any_real_dtype(name: str, dtype: torch.dtype) -> None:
    loads = torch.tensor([[3, 1, 2, 0]]).to(dtype)
    situation = PlanningSituation(2, 3)
    assert torch.equal(PLANNERS[name](loads, situation), PLANNERS[name](loads.double(), situation))


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize(
    ("loads", "situation", "reason"),
    [
        ([[1.0, float("nan")]], PlanningSituation(1, 2), r"loads\[0, 1\] = nan: NaN"),
        ([[float("inf"), 1.0]], PlanningSituation(1, 2), r"loads\[0, 0\] = inf: infinite"),
        ([[1.0, -1.0]], PlanningSituation(1, 2), r"loads\[0, 1\] = -1.*: negative"),
        ([[1.0, 1.0, 1.0]], PlanningSituation(2, 1), "slots_per_rank = 1: 3 experts on 2 ranks need at least 2"),
        ([[1.0, 1.0, 1.0]], PlanningSituation(2, 2, ranks_out=(0,)), "3 experts on 1 ranks need at least 3"),
        ([[1.0, 1.0, 1.0]], PlanningSituation(2, 2, num_groups=2), "num_groups = 2: must divide the 3 experts"),
        ([1.0, 2.0], PlanningSituation(2, 2), r"loads of shape \(2,\)"),
        ([[]], PlanningSituation(2, 2), r"loads of shape \(1, 0\): must be \[layers, experts\]"),
    ],
)
def test_what_cannot_be_planned_for_is_refused(
    name: str, loads: Any, situation: PlanningSituation, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        PLANNERS[name](torch.tensor(loads), situation)


@pytest.mark.parametrize(
    ("current", "reason"),
    [
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"current of shape \(1, 2, 3\): must be \(1, 2, 2\)"),
        (torch.full((1, 2, 2), 7), r"current: must hold experts of 0\.\.2 and -1"),
    ],
)
def test_a_current_plan_of_another_form_is_refused(current: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        OURS(torch.ones(1, 3), PlanningSituation(2, 2), current)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_ranks": 0}, "num_ranks = 0: must be at least 1"),
        ({"slots_per_rank": -1}, "slots_per_rank = -1"),
        ({"num_nodes": 3}, "num_nodes = 3: must divide num_ranks = 4"),
        ({"num_groups": 0}, "num_groups = 0"),
        ({"ranks_out": (4,)}, r"ranks_out = \(4,\): must be different ranks of 0\.\.3"),
        ({"ranks_out": (1, 1)}, r"ranks_out = \(1, 1\)"),
        ({"ranks_out": (0, 1, 2, 3)}, "must leave a rank of 4"),
        ({"copy_choice": "far"}, "copy_choice = 'far': must be one of even, nearest, least_load"),
        ({"move_cost": -1.0}, "move_cost = -1.0"),
        ({"move_cost": float("nan")}, "move_cost = nan"),
        ({"primary_rows": 3}, "primary_rows = 3: must be 0 to slots_per_rank = 2"),
    ],
)
def test_a_situation_that_cannot_be_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(PlanningSituation(4, 2), **fields)


def moved(plan: Tensor, current: Tensor) -> Tensor:
    """Slots of each layer whose expert their rank does not hold in `current`."""
    return torch.tensor(
        [
            sum(len(set(new) - set(old) - {-1}) for new, old in zip(layer, before, strict=True))
            for layer, before in zip(plan.tolist(), current.tolist(), strict=True)
        ]
    )


def between_nodes(loads: Tensor, plan: Tensor, num_nodes: int) -> Tensor:
    """The part of each layer's load whose tokens, spread evenly over nodes, lie on one without a copy."""
    away = torch.zeros(len(loads), dtype=torch.float64)
    for layer, ranks in enumerate(plan):
        for node in ranks.view(num_nodes, -1):
            held = set(node.tolist())
            away[layer] += sum(load for expert, load in enumerate(loads[layer].tolist()) if expert not in held)
    return away / num_nodes / loads.sum(1)


def scattered(loads: Tensor, plan: Tensor) -> Tensor:
    """The chance that two tokens of one of 8 groups, drawn by load, are computed on different ones of 4 nodes."""
    result = []
    for weight, layer in zip(loads.tolist(), plan.view(len(plan), 4, -1).tolist(), strict=True):
        copies = [sum(node.count(expert) for node in layer) for expert in range(64)]
        of = torch.zeros(8, 4, dtype=torch.float64)
        for number, node in enumerate(layer):
            for expert in node:
                of[expert // 8, number] += weight[expert] / copies[expert]
        of_group = of.sum(1)
        result.append((of_group / of_group.sum() * (1 - ((of / of_group[:, None]) ** 2).sum(1))).sum())
    return torch.stack(result)
