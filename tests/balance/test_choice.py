"""Which copy of its expert a route takes, without an exchange."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.balance import CopyRule, choose, copy_table
from tests.balance.loads import Case, cases

# Four ranks, two per node: expert 0 everywhere but on rank 3, expert 1 on node 0, expert 2 on rank 3 alone. With a
# borrowed slot, ranks begin at the global ids 0, 3, 6, 9.
SLOTS = torch.tensor([[0, 1], [1, 0], [0, -1], [2, -1]])


@pytest.mark.parametrize(
    ("rank", "rule", "candidates"),
    [
        (0, "even", [[0, 4, 6], [1, 3], [9]]),
        (3, "even", [[0, 4, 6], [1, 3], [9]]),
        (0, "nearest", [[0], [1], [9]]),
        (1, "nearest", [[4], [3], [9]]),
        (2, "nearest", [[6], [1, 3], [9]]),
        (3, "nearest", [[6], [1, 3], [9]]),
    ],
)
def test_candidates_are_global_slots_in_order_of_rank(rank: int, rule: CopyRule, candidates: list[list[int]]) -> None:
    table = copy_table(SLOTS, 3, rank, rule, ranks_per_node=2)
    rows = zip(table.candidates.tolist(), table.number.tolist(), strict=True)
    no_route, *experts = (row[:number] for row, number in rows)
    assert no_route == [-1]
    assert experts == candidates


@settings(deadline=None, max_examples=30)
@given(case=cases(distinct=False), borrowed=st.integers(0, 3), seed=st.integers(0, 99))
def test_routes_take_the_copies_in_turn(case: Case, borrowed: int, seed: int) -> None:
    num_ranks, held = case.slots.shape
    num_experts = int(case.slots.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    for rank in range(num_ranks):
        ids = torch.randint(-1, num_experts, (17, 3), generator=generator)
        table = copy_table(case.slots, held + borrowed, rank)
        slots = choose(ids, table, rank)
        assert torch.equal(slots, choose(ids, table, rank))
        turns = [0] * num_experts
        for expert, slot in zip(ids.flatten().tolist(), slots.flatten().tolist(), strict=True):
            if expert < 0:
                assert slot == -1
                continue
            holder, local = divmod(slot, held + borrowed)
            assert case.slots[holder, local] == expert
            copies = (case.slots.flatten() == expert).nonzero().flatten().tolist()
            assert holder * held + local == copies[(turns[expert] + rank) % len(copies)]
            turns[expert] += 1


def test_remainders_are_spread_by_the_ranks_numbers() -> None:
    slots = torch.tensor([[0], [0], [0], [0]])
    taken = [choose(torch.zeros(1, 1, dtype=torch.int64), copy_table(slots, 1, rank), rank).item() for rank in range(4)]
    assert sorted(taken) == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(0, 4), (5, 0)])
def test_no_routes(shape: tuple[int, int]) -> None:
    ids = torch.empty(shape, dtype=torch.int64)
    assert choose(ids, copy_table(SLOTS, 2, 0), 0).shape == shape


@pytest.mark.parametrize("expert", [3, 4, 70_000, 2**40])
def test_an_expert_that_does_not_exist_raises_on_a_cpu(expert: int) -> None:
    with pytest.raises(IndexError):
        choose(torch.tensor([[0, -1], [expert, 1]]), copy_table(SLOTS, 2, 0), 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rule": "least"}, "'least'; valid are even, nearest"),
        ({"slots_per_rank": 1}, r"slots_per_rank \(1\) must be 2 or more"),
        ({"rank": 4}, r"rank \(4\) one of 0 to 3"),
        ({"ranks_per_node": 0}, r"ranks_per_node \(0\)"),
        ({"slots": torch.tensor([[0], [2]])}, r"without one: \[1\]"),
    ],
)
def test_an_impossible_table_is_refused(change: dict[str, object], reason: str) -> None:
    arguments = {"slots": SLOTS, "slots_per_rank": 2, "rank": 0, "rule": "even", "ranks_per_node": 2} | change
    with pytest.raises(ValueError, match=reason):
        copy_table(**arguments)  # type: ignore[arg-type]
