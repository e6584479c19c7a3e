"""What every plan keeps to, for drawn counts and placements."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock.balance import (
    Pieces,
    Rates,
    SpillCosts,
    SpillLimits,
    SpillPlan,
    assign,
    assignment,
    borrowed_slots_needed,
    even_pieces,
    level,
    spill,
)
from tests.balance.loads import Case, cases

STARTS = {"even": even_pieces, "least_load": level}


def check_pieces(case: Case, pieces: Pieces) -> None:
    """The amounts of an expert add up to its routes; none where there is no expert, none below 0."""
    experts, amounts = pieces
    assert bool((amounts >= 0).all())
    assert not amounts[experts < 0].any()
    computed = torch.zeros(case.counts.shape[1], dtype=torch.int64)
    computed.scatter_add_(0, experts.flatten().clamp_min(0), amounts.flatten())
    assert computed.tolist() == case.counts.sum(dim=0).tolist()


def check_plan(case: Case, start: Pieces, limits: SpillLimits, plan: SpillPlan) -> None:
    """All that holds whatever the limits are."""
    num_ranks, held = case.slots.shape
    check_pieces(case, plan.pieces)
    assert plan.pieces.experts[:, :held].tolist() == case.slots.tolist()
    assert plan.pieces.experts[:, held:].tolist() == plan.borrowed.tolist()
    assert plan.borrowed.shape == (num_ranks, limits.max_borrowed)
    for own, row in zip(case.slots.tolist(), plan.borrowed.tolist(), strict=True):
        borrowed = [expert for expert in row if expert >= 0]
        assert len(set(borrowed)) == len(borrowed), "an expert is borrowed once"
        assert not set(borrowed) & set(own), "what a rank holds it need not borrow"
    assert plan.before.tolist() == start.per_rank.tolist()
    assert plan.after.tolist() == plan.pieces.per_rank.tolist()
    assert int(plan.after.max()) <= max(int(plan.before.max()), plan.bound)
    assert plan.bound == math.ceil(Fraction(int(case.counts.sum()), num_ranks) * (1 + Fraction(str(limits.eps))))
    assert plan.missed == max(0, int(plan.after.max()) - plan.bound)


@settings(deadline=None, max_examples=200)
@given(case=cases(distinct=False), rule=st.sampled_from(list(STARTS)))
def test_pieces_conserve_routes(case: Case, rule: str) -> None:
    pieces = STARTS[rule](case.counts, case.slots)
    assert pieces.experts.tolist() == case.slots.tolist()
    check_pieces(case, pieces)


@settings(deadline=None, max_examples=100)
@given(case=cases(distinct=False))
def test_even_pieces_differ_by_one_route(case: Case) -> None:
    experts, amounts = even_pieces(case.counts, case.slots)
    for expert in range(case.counts.shape[1]):
        of_expert = amounts[experts == expert].tolist()
        assert max(of_expert) - min(of_expert) <= 1
        assert of_expert == sorted(of_expert, reverse=True)


@settings(deadline=None, max_examples=300)
@given(
    case=cases(distinct=False),
    rule=st.sampled_from(list(STARTS)),
    max_borrowed=st.integers(0, 6),
    eps=st.sampled_from([0.0, 0.02, 0.1, 1.0]),
    min_rows=st.sampled_from([0, 1, 30, 10**6]),
    memory_bound=st.booleans(),
    bytes_per_expert=st.sampled_from([None, 0.0, 1.0, 1e3]),
)
def test_a_plan_conserves_routes_and_keeps_its_limits(
    case: Case,
    rule: str,
    max_borrowed: int,
    eps: float,
    min_rows: int,
    memory_bound: bool,
    bytes_per_expert: float | None,
) -> None:
    start = STARTS[rule](case.counts, case.slots)
    limits = SpillLimits(max_borrowed, eps, min_rows, memory_bound)
    costs = None if bytes_per_expert is None else SpillCosts(bytes_per_expert, 1.0, Rates(1.0, 1.0, 1.0))
    plan = spill(case.counts, case.slots, start, limits, costs)
    check_plan(case, start, limits, plan)
    if not memory_bound:
        held = case.slots.shape[1]
        small = plan.pieces.amounts[:, held:][plan.borrowed >= 0] < min_rows
        assert not small.any(), "a borrowed piece has `min_rows` or more"
    again = spill(case.counts.clone(), case.slots.clone(), start, limits, costs)
    assert all(torch.equal(a, b) for a, b in zip(again.pieces, plan.pieces, strict=True))


@settings(deadline=None, max_examples=400)
@given(case=cases(distinct=False), rule=st.sampled_from(list(STARTS)), eps=st.sampled_from([0.0, 0.02, 0.3]))
@example(case=Case(torch.ones(3, 6).long(), torch.tensor([[0, 1, 2], [3, 4, 5], [-1, -1, -1]])), rule="even", eps=0.0)
def test_the_memory_bound_holds_with_the_slots_that_are_said_to_suffice(case: Case, rule: str, eps: float) -> None:
    num_ranks, held = case.slots.shape
    start = STARTS[rule](case.counts, case.slots)
    limits = SpillLimits(borrowed_slots_needed(held, num_ranks), eps, min_rows=10**6, memory_bound=True)
    never = SpillCosts(1e30, 1.0, Rates(1.0, 1.0, 1.0))
    plan = spill(case.counts, case.slots, start, limits, never)
    check_plan(case, start, limits, plan)
    assert plan.missed == 0


@pytest.mark.parametrize(
    ("num_ranks", "held"), [(2, 1), (2, 2), (2, 5), (3, 3), (4, 3), (5, 7), (8, 4), (64, 4), (64, 5)]
)
def test_fewer_borrowed_slots_do_not_suffice(num_ranks: int, held: int) -> None:
    """The case that the docstring of `borrowed_slots_needed` names: one rank idle, all other experts alike."""
    slots = torch.arange((num_ranks - 1) * held).view(num_ranks - 1, held)
    slots = torch.cat([slots, torch.full((1, held), -1)])
    counts = torch.zeros(num_ranks, (num_ranks - 1) * held, dtype=torch.int64)
    counts[0] = 2 * num_ranks * held
    start = even_pieces(counts, slots)
    needed = borrowed_slots_needed(held, num_ranks)
    enough, fewer = (
        spill(counts, slots, start, SpillLimits(number, 0.0, memory_bound=True)) for number in (needed, needed - 1)
    )
    assert enough.missed == 0
    assert fewer.missed > 0


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_of_small_surpluses_needs_one_borrowed_expert_each(seed: int) -> None:
    """All ranks but one have a route too many: to send those to the idle rank alone it would borrow from all."""
    num_ranks, held = 32, 4
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_ranks * held, generator=generator).view(num_ranks, held)
    totals = torch.full((num_ranks * held,), 250)
    totals[slots[:, 0]] += 1
    totals[slots[5]] -= torch.tensor([num_ranks, 0, 0, 0])
    counts = torch.zeros(num_ranks, num_ranks * held, dtype=torch.int64)
    counts[3] = totals
    plan = spill(counts, slots, even_pieces(counts, slots), SpillLimits(4, 0.0, memory_bound=True))
    assert plan.missed == 0
    assert plan.after.tolist() == [1000] * num_ranks


def test_surplus_goes_to_a_copy_with_room_before_anything_is_borrowed() -> None:
    slots = torch.tensor([[0, 1], [2, 0], [3, 4]])
    counts = torch.zeros(3, 5, dtype=torch.int64)
    counts[0] = torch.tensor([400, 500, 0, 300, 0])
    start = even_pieces(counts, slots)
    assert start.per_rank.tolist() == [700, 200, 300]
    plan = spill(counts, slots, start, SpillLimits(2, 0.0, min_rows=0))
    assert plan.pieces.amounts[1, 1] == 400, "the whole of expert 0"
    assert plan.borrowed.tolist() == [[-1, -1], [-1, -1], [1, -1]]
    assert plan.after.tolist() == [400, 400, 400]


def test_costs_decide_unless_memory_is_bound() -> None:
    slots = torch.tensor([[0, 1], [2, 3]])
    counts = torch.tensor([[500, 300, 100, 100], [500, 300, 100, 100]])
    start = even_pieces(counts, slots)
    # Of 1,600 routes 600 move; 1 flop/s and 1 flop per route, thrice: 1,800 s are saved (less the slack of eps).
    cheap, dear = (SpillCosts(size, 1.0, Rates(1.0, 1.0, 10.0)) for size in (100.0, 1000.0))
    plain = SpillLimits(2)
    assert spill(counts, slots, start, plain, cheap).after.max() <= 1020
    refused = spill(counts, slots, start, plain, dear)
    assert refused.after.tolist() == [1600, 400]
    assert bool((refused.borrowed == -1).all())
    assert refused.seconds_saved == 3 * (1600 - 1020)
    assert refused.seconds_spent == 3 * 1000 + 2 * 10
    assert spill(counts, slots, start, SpillLimits(2, memory_bound=True), dear).missed == 0


def test_where_all_of_it_does_not_pay_a_part_of_it_is_done() -> None:
    # Rank 0 has 2 experts of 1,000 routes and 28 of 20; the others 30 of 20 each. The mean is 1,090.
    slots = torch.arange(120).view(4, 30)
    counts = torch.full((4, 120), 5)
    counts[:, :2] = 250
    start = even_pieces(counts, slots)
    limits = SpillLimits(30, 0.0, min_rows=1)
    free = SpillCosts(0.0, 1.0, Rates(1.0, 1.0, 0.0))
    dear = SpillCosts(400.0, 1.0, Rates(1.0, 1.0, 0.0))
    assert int(spill(counts, slots, start, limits, free).after.max()) == 1090
    plan = spill(counts, slots, start, limits, dear)
    assert 1090 < int(plan.after.max()) < 2560
    assert plan.missed == int(plan.after.max()) - 1090
    assert plan.seconds_spent < plan.seconds_saved


@settings(deadline=None, max_examples=80)
@given(
    case=cases(most=30, distinct=False),
    rule=st.sampled_from(list(STARTS)),
    max_borrowed=st.integers(0, 3),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_all_ranks_routes_together_fill_the_pieces(
    case: Case, rule: str, max_borrowed: int, top_k: int, seed: int
) -> None:
    start = STARTS[rule](case.counts, case.slots)
    limits = SpillLimits(max_borrowed, 0.0, min_rows=1, memory_bound=True)
    pieces = spill(case.counts, case.slots, start, limits).pieces
    ids = [_tokens(row, top_k, seed) for row in case.counts]
    filled = torch.zeros_like(pieces.amounts).flatten()
    for rank, own in enumerate(ids):
        table = assignment(case.counts, pieces, rank)
        slots = assign(own, table)
        assert torch.equal(slots, assign(own, table))
        assert bool(((slots == -1) == (own == -1)).all())
        real = own >= 0
        assert pieces.experts.flatten()[slots[real]].tolist() == own[real].tolist()
        filled.scatter_add_(0, slots[real], torch.ones_like(slots[real]))
    assert filled.tolist() == pieces.amounts.flatten().tolist()


@settings(deadline=None, max_examples=50)
@given(case=cases(most=30), max_borrowed=st.integers(0, 3))
def test_as_many_routes_as_possible_stay_where_their_tokens_are(case: Case, max_borrowed: int) -> None:
    limits = SpillLimits(max_borrowed, 0.0, min_rows=1)
    pieces = spill(case.counts, case.slots, even_pieces(case.counts, case.slots), limits).pieces
    slots_per_rank = pieces.experts.shape[1]
    for rank, counts in enumerate(case.counts):
        slots = assign(_tokens(counts, 1, 0), assignment(case.counts, pieces, rank))
        stayed = (slots >= 0) & (slots // slots_per_rank == rank)
        own = zip(pieces.experts[rank].tolist(), pieces.amounts[rank].tolist(), strict=True)
        assert int(stayed.sum()) == sum(min(int(counts[expert]), amount) for expert, amount in own if expert >= 0)


def test_an_expert_that_does_not_exist_raises_on_a_cpu() -> None:
    counts, slots = torch.ones(2, 3).long(), torch.tensor([[0, 1], [2, -1]])
    table = assignment(counts, even_pieces(counts, slots), 0)
    with pytest.raises(IndexError):
        assign(torch.tensor([[0, 1], [3, -1]]), table)


def test_what_cannot_be_is_refused() -> None:
    counts, slots = torch.ones(2, 3).long(), torch.tensor([[0, 1], [2, -1]])
    for split in STARTS.values():
        with pytest.raises(ValueError, match=r"without one: \[2\]"):
            split(counts, slots[:1])
    with pytest.raises(ValueError, match=r"of 6 routes.*\[2, 2\].*12 routes"):
        spill(2 * counts, slots, even_pieces(counts, slots), SpillLimits(1))
    for max_borrowed, eps, min_rows in ((-1, 0.0, 0), (1, -0.1, 0), (1, math.inf, 0), (1, math.nan, 0), (1, 0.0, -1)):
        with pytest.raises(ValueError, match="must be 0 or more"):
            SpillLimits(max_borrowed, eps, min_rows)


def _tokens(counts: Tensor, top_k: int, seed: int) -> Tensor:
    """`[T, K]` ids with just these counts, in some order, some of them -1."""
    ids = torch.arange(len(counts)).repeat_interleave(counts)
    ids = torch.cat([ids, torch.full((-len(ids) % top_k + top_k,), -1)])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))].view(-1, top_k)
