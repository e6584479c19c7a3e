"""Which copy of its expert a route takes, without an exchange."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.balance import CopyRule, choose, copy_table
from crossdock.balance.choice import running_index
from tests.balance.loads import Case, cases

# Four ranks, two per node: expert 0 everywhere but on rank 3, expert 1 on node 0, expert 2 on rank 3 alone.
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
    table = copy_table(SLOTS, 3 if 9 in candidates[2] else 2, rank, rule, ranks_per_node=2)
    slots = [row[:number] for row, number in zip(table.candidates.tolist(), table.number.tolist(), strict=True)]
    local = {0: 0, 4: 4, 6: 6, 1: 1, 3: 3, 9: 9}
    assert [[local[slot] for slot in row] for row in slots] == candidates


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
            number = int(table.number[expert])
            assert slot == table.candidates[expert, (turns[expert] + rank) % number]
            turns[expert] += 1


def test_remainders_are_spread_by_the_ranks_numbers() -> None:
    slots = torch.tensor([[0], [0], [0], [0]])
    taken = [choose(torch.zeros(1, 1, dtype=torch.int64), copy_table(slots, 1, rank), rank).item() for rank in range(4)]
    assert sorted(taken) == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(0, 4), (5, 0)])
def test_no_routes(shape: tuple[int, int]) -> None:
    ids = torch.empty(shape, dtype=torch.int64)
    assert choose(ids, copy_table(SLOTS, 2, 0), 0).shape == shape


def test_an_expert_that_does_not_exist_raises_on_a_cpu() -> None:
    for slots in (SLOTS, SLOTS[[0, 3]].clone().fill_(-1).index_put((torch.tensor([0]),), torch.tensor([0, 1]))):
        with pytest.raises(IndexError):
            choose(torch.tensor([[3]]), copy_table(slots, 2, 0), 0)


@given(ids=st.lists(st.integers(-1, 4), max_size=40))
def test_running_index_counts_earlier_routes(ids: list[int]) -> None:
    index = running_index(torch.tensor(ids, dtype=torch.int64).view(-1, 1), 5).flatten().tolist()
    for place, expert in enumerate(ids):
        assert expert < 0 or index[place] == ids[:place].count(expert)


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
