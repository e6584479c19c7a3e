"""Which slot on which rank holds which logical expert."""

from __future__ import annotations

import dataclasses

import pytest

from crossdock.placement import EMPTY, Placement

SIZES = [(8, 1), (8, 2), (8, 8), (9, 4), (1, 1), (3, 4), (1, 8), (10, 3), (2048, 64), (257, 48)]


@pytest.mark.parametrize(("num_experts", "num_ranks"), SIZES)
def test_contiguous_gives_rank_g_its_experts_in_order(num_experts: int, num_ranks: int) -> None:
    placement = Placement.contiguous(num_experts, num_ranks)
    assert placement.slots_per_rank == -(-num_experts // num_ranks)
    assert placement.num_slots == placement.slots_per_rank * num_ranks == len(placement.slot_to_expert)
    for rank in range(num_ranks):
        slots = placement.experts_on(rank)
        assert len(slots) == placement.slots_per_rank
        experts = range(rank * num_experts // num_ranks, (rank + 1) * num_experts // num_ranks)
        assert [expert for expert in slots if expert != EMPTY] == list(experts)


@pytest.mark.parametrize(("num_experts", "num_ranks"), SIZES)
def test_expert_to_slot_is_the_inverse(num_experts: int, num_ranks: int) -> None:
    placement = Placement.contiguous(num_experts, num_ranks)
    assert len(placement.expert_to_slot) == num_experts
    assert [placement.slot_to_expert[slot] for slot in placement.expert_to_slot] == list(range(num_experts))
    by_rank = [expert for rank in range(num_ranks) for expert in placement.experts_on(rank)]
    assert tuple(by_rank) == placement.slot_to_expert


def test_nine_experts_on_four_ranks() -> None:
    placement = Placement.contiguous(9, 4)
    held = [[expert for expert in placement.experts_on(rank) if expert != EMPTY] for rank in range(4)]
    assert held == [[0, 1], [2, 3], [4, 5], [6, 7, 8]]
    assert placement.slots_per_rank == 3
    assert placement.slot_to_expert.count(EMPTY) == 3


def test_fewer_experts_than_ranks_leave_ranks_empty() -> None:
    placement = Placement.contiguous(3, 4)
    assert [placement.experts_on(rank) for rank in range(4)] == [(EMPTY,), (0,), (1,), (2,)]


def test_any_order_copies_and_empty_slots_are_allowed() -> None:
    placement = Placement(3, 2, (2, 1, 0, EMPTY, 0, EMPTY, 2, EMPTY), copies_per_rank=2)
    assert (placement.slots_per_rank, placement.rows_per_rank, placement.num_rows) == (4, 2, 4)
    assert [placement.experts_on(rank) for rank in range(2)] == [(2, 1), (0, EMPTY)]
    assert placement.slots_of(1) == (0, EMPTY, 2, EMPTY)
    assert placement.row_to_expert == (2, 1, 0, EMPTY)
    assert placement.expert_to_row == (2, 1, 0)
    assert placement.expert_to_slot == (4, 1, 0)


def test_more_slots_leave_rows_where_they_are() -> None:
    placement = Placement(3, 2, (2, 1, 0, 0, EMPTY, 2), copies_per_rank=1).with_more_slots(2)
    assert placement.slot_to_expert == (2, 1, 0, EMPTY, EMPTY, 0, EMPTY, 2, EMPTY, EMPTY)
    assert placement.row_to_expert == (2, 1, 0, EMPTY)
    assert Placement.contiguous(5, 2).with_more_slots(1) == Placement.contiguous(5, 2, copies_per_rank=1)


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "slots", "reason"),
    [
        (4, 2, (0, 1, 2), "3 slots do not divide evenly over 2 ranks"),
        (4, 2, (0, 1, 2, EMPTY), r"0\.\.3.*\[3\]"),
        (4, 2, (0, 1, 2, 3, 4, EMPTY), r"0\.\.3.*\[4\]"),
        (4, 2, (0, 1, 2, 3, -2, EMPTY), r"0\.\.3.*\[-2\]"),
        (0, 2, (), r"num_experts \(0\)"),
        (4, 0, (0, 1, 2, 3), r"num_ranks \(0\)"),
        (2, 2, (0, EMPTY, 0, 1), r"primary, once; not so: \[0\]"),
    ],
)
def test_an_impossible_map_is_refused(num_experts: int, num_ranks: int, slots: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Placement(num_experts, num_ranks, slots)


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(0, 2), (4, 0), (-1, 1)])
def test_contiguous_refuses_sizes_that_are_not_positive(num_experts: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Placement.contiguous(num_experts, num_ranks)


def test_every_expert_has_one_primary() -> None:
    with pytest.raises(ValueError, match=r"one of the first 1 slots of a rank, its primary, once; not so: \[0, 1\]"):
        Placement(2, 2, (0, 1, 0, 1), copies_per_rank=1)
    with pytest.raises(ValueError, match=r"copies_per_rank \(3\) must be 0 to 2"):
        Placement(2, 2, (0, 1, 0, 1), copies_per_rank=3)


def test_is_an_immutable_value() -> None:
    placement = Placement.contiguous(9, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        placement.num_experts = 8  # pyright: ignore[reportAttributeAccessIssue]
    assert placement == Placement.contiguous(9, 4)
    assert hash(placement) == hash(Placement.contiguous(9, 4))
    assert placement != Placement.contiguous(9, 3)
