"""DeepSeek's published method, tie by tie."""

from __future__ import annotations

import pytest
import torch

from crossdock.placement import eplb
from tests.placement.loads import KINDS, draw_loads, published_by_loops

PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_published_example() -> None:
    plan = eplb(torch.tensor(PUBLISHED), num_slots=16, num_groups=4, num_nodes=2, num_ranks=8)
    assert plan.physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert plan.copies.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert plan.logical_to_physical.shape == (2, 12, 2)


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "num_groups", "num_nodes", "num_ranks"),
    [
        (8, 16, 1, 1, 8),
        (8, 8, 1, 1, 8),
        (64, 72, 1, 1, 8),
        (60, 64, 3, 2, 16),  # groups that do not divide over nodes: global
        (64, 80, 8, 2, 8),
        (64, 64, 8, 4, 8),
        (32, 48, 8, 8, 8),
        (256, 320, 8, 8, 64),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_plan_is_that_of_the_published_loops(
    kind: str, num_experts: int, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> None:
    generator = torch.Generator().manual_seed(num_slots)
    loads = torch.stack([draw_loads(kind, num_experts, generator) for _ in range(2)])
    plan = eplb(loads, num_slots, num_groups, num_nodes, num_ranks)
    for layer, weight in enumerate(loads.tolist()):
        slots, copies = published_by_loops(weight, num_slots, num_groups, num_nodes, num_ranks)
        assert plan.physical_to_logical[layer].tolist() == slots
        assert plan.copies[layer].tolist() == copies


@pytest.mark.parametrize(
    ("num_slots", "num_ranks", "num_groups", "num_nodes"), [(14, 8, 4, 2), (13, 4, 1, 1), (16, 8, 4, 2)]
)
def test_maps_are_inverse_and_surplus_slots_empty(
    num_slots: int, num_ranks: int, num_groups: int, num_nodes: int
) -> None:
    plan = eplb(torch.tensor(PUBLISHED), num_slots, num_groups, num_nodes, num_ranks)
    assert plan.physical_to_logical.shape == (2, -(-num_slots // num_ranks) * num_ranks)
    assert ((plan.physical_to_logical == -1).sum(1) == plan.physical_to_logical.shape[1] - num_slots).all()
    assert (plan.copies.sum(1) == num_slots).all()
    for layer in range(2):
        for expert in range(12):
            slots = [slot for slot in plan.logical_to_physical[layer, expert].tolist() if slot >= 0]
            assert len(slots) == plan.copies[layer, expert]
            assert sorted(slots) == (plan.physical_to_logical[layer] == expert).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((11, 1, 1, 8), "num_slots = 11: must be at least 12"),
        ((15, 4, 2, 8), "num_slots = 15: must be a multiple of num_nodes = 2"),
        ((16, 5, 1, 8), "the experts = 12: must be a multiple of num_groups = 5"),
        ((16, 4, 2, 7), "num_ranks = 7: must be a multiple of num_nodes = 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        eplb(torch.tensor(PUBLISHED), *sizes)
