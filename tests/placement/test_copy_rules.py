"""What ranks compute under each rule by which tokens choose copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossdock.placement import PLANNERS, PlanningSituation, max_mean, rank_loads
from tests.placement.loads import draw_loads

# Two copies of expert 0 on a node, one on the other; expert 2 twice on a rank; rank 3 has an empty slot.
PLAN = torch.tensor([[[0, 1, 3], [0, 2, 2], [0, 4, 3], [5, 1, -1]]])
LOADS = torch.tensor([[120.0, 40.0, 30.0, 16.0, 8.0, 4.0]])


def by_tokens(
    loads: list[float], ranks: list[list[int]], nodes: list[int], living: list[int], rule: str
) -> list[float]:
    """Every rank's tokens, an even part of each expert's load, choose among the slots of their expert."""
    totals = [0.0] * len(ranks)
    for expert, load in enumerate(loads):
        slots = [rank for rank in living for held in ranks[rank] if held == expert]
        for source in living:
            choice = slots
            if rule == "nearest":
                same_rank = [rank for rank in slots if rank == source]
                same_node = [rank for rank in slots if nodes[rank] == nodes[source]]
                choice = same_rank or same_node or slots
            for rank in choice:
                totals[rank] += load / len(living) / len(choice)
    return totals


@pytest.mark.parametrize("rule", ["even", "nearest"])
@pytest.mark.parametrize("num_nodes", [1, 2, 4])
def test_rank_loads_are_those_of_tokens_that_choose(rule: str, num_nodes: int) -> None:
    situation = PlanningSituation(4, 3, num_nodes, copy_choice=rule)  # type: ignore[arg-type]
    nodes = [rank // (4 // num_nodes) for rank in range(4)]
    expected = by_tokens(LOADS[0].tolist(), PLAN[0].tolist(), nodes, [0, 1, 2, 3], rule)
    torch.testing.assert_close(rank_loads(LOADS, PLAN, situation)[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("rule", ["even", "nearest"])
@pytest.mark.parametrize("name", PLANNERS)
def test_rank_loads_of_plans_without_some_ranks(rule: str, name: str) -> None:
    loads = torch.stack([draw_loads("zipf1", 24, torch.Generator().manual_seed(seed)) for seed in range(2)])
    situation = PlanningSituation(8, 6, 2, ranks_out=(1, 6, 7), copy_choice=rule)  # type: ignore[arg-type]
    plan = PLANNERS[name](loads, situation)
    for layer in range(2):
        living, nodes = [0, 2, 3, 4, 5], [0] * 4 + [1] * 4
        expected = by_tokens(loads[layer].tolist(), plan[layer].tolist(), nodes, living, rule)
        torch.testing.assert_close(rank_loads(loads, plan, situation)[layer], torch.tensor(expected).double())
        assert max_mean(loads, plan, situation)[layer] == pytest.approx(max(expected) / (sum(expected) / 5))


def test_with_one_node_nearest_is_even() -> None:
    loads = draw_loads("log-normal", 32, torch.Generator().manual_seed(0))[None]
    plan = PLANNERS["exchange"](loads, PlanningSituation(8, 6))
    even, nearest = (PlanningSituation(8, 6, copy_choice=rule) for rule in ("even", "nearest"))
    torch.testing.assert_close(rank_loads(loads, plan, even), rank_loads(loads, plan, nearest))


def test_least_load_pours_experts_over_their_copies_until_ranks_are_level() -> None:
    situation = PlanningSituation(3, 2, copy_choice="least_load")
    plan = torch.tensor([[[0, 1], [0, 2], [3, 2]]])
    # 0 fills up rank 0; 2 levels the other two with what 0 leaves to rank 1.
    level = rank_loads(torch.tensor([[30.0, 20, 40, 0]]), plan, situation)
    torch.testing.assert_close(level, torch.full((1, 3), 30.0, dtype=torch.float64), rtol=2e-3, atol=0)
    # What one rank alone holds stays there.
    level = rank_loads(torch.tensor([[30.0, 50, 40, 0]]), plan, situation)
    torch.testing.assert_close(level, torch.tensor([[50.0, 35, 35]]).double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["zipf1", "log-normal", "few hot"])
def test_least_load_has_the_least_maximum_that_any_division_has(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    loads = torch.stack([draw_loads(kind, 12, generator) for _ in range(4)])
    situation = PlanningSituation(6, 3, copy_choice="least_load")
    plan = PLANNERS["deepseek"](loads, situation)
    level = rank_loads(loads, plan, situation)
    torch.testing.assert_close(level.sum(1), loads.sum(1))
    for layer in range(4):
        # Hall: a set of experts can't weigh less than all of it on the ranks that hold any of them.
        bound = least_maximum_by_sets(loads[layer], plan[layer])
        assert bound * (1 - 1e-9) <= level[layer].max().item() <= bound + 1e-3 * loads[layer].sum().item() / 6


def least_maximum_by_sets(loads: Tensor, plan: Tensor) -> float:
    """Over all sets of ranks, the load that can lie nowhere else, per rank."""
    best = 0.0
    for chosen in range(1, 2 ** len(plan)):
        ranks = [rank for rank in range(len(plan)) if chosen >> rank & 1]
        outside = {expert for rank in range(len(plan)) if rank not in ranks for expert in plan[rank].tolist()}
        only_here = sum(load for expert, load in enumerate(loads.tolist()) if expert not in outside)
        best = max(best, only_here / len(ranks))
    return best


def test_no_load_is_balanced() -> None:
    plan = torch.tensor([[[0, 1], [1, 0]]])
    for rule in ("even", "nearest", "least_load"):
        assert max_mean(torch.zeros(1, 2), plan, PlanningSituation(2, 2, copy_choice=rule)).tolist() == [1.0]
