"""Relief within a step: surplus routes of overloaded ranks go to ranks with room, which borrow the experts' weights.

A plan follows from the step's counts alone, without a random choice, so that every rank makes the same one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.balance.costs import SpillCosts
from crossdock.balance.pieces import Pieces, holders_of

__all__ = ["SpillLimits", "SpillPlan", "borrowed_slots_needed", "spill"]

# Of the surplus above the bound, how much may stay, where removing all of it does not pay.
_SHARES = (0.0, 0.5, 0.75)


@dataclass(frozen=True)
class SpillLimits:
    """What a plan may do.

    Args:
        max_borrowed: `B`, experts that a rank borrows at most, per layer.
        eps: how far above the mean a rank may end.
        min_rows: a borrowed piece of fewer routes is not worth its product.
        memory_bound: no rank ends above the bound, whatever `min_rows` or the costs say.

    Raises:
        ValueError: on a negative number.
    """

    max_borrowed: int
    eps: float = 0.02
    min_rows: int = 64
    memory_bound: bool = False

    def __post_init__(self) -> None:
        if self.max_borrowed < 0 or self.min_rows < 0 or not 0 <= self.eps < math.inf:
            raise ValueError(
                f"max_borrowed ({self.max_borrowed}), min_rows ({self.min_rows}) and eps ({self.eps}) "
                "must be 0 or more, and eps finite"
            )

    def bound(self, routes: int, num_ranks: int) -> int:
        """`ceil((1 + eps) * routes / num_ranks)`, exactly: `eps` is the decimal number that it reads as."""
        return math.ceil((1 + Fraction(str(self.eps))) * routes / num_ranks)


class SpillPlan(NamedTuple):
    """Who computes what in this step. The same on all ranks, on the CPU.

    Attributes:
        pieces: over `P = S + B` slots per rank, the borrowed ones last.
        borrowed: `[R, B]` int64, the expert that each borrowed slot holds in this step, `-1` for none.
        before, after: `[R]` int64, routes that each rank computes without and with the plan.
        bound: `ceil((1 + eps) * mean)` routes.
        missed: by how many routes the busiest rank stays above the bound; 0 where it does not. With `memory_bound` and
            `borrowed_slots_needed` slots or more it is 0.
        seconds_saved, seconds_spent: as `SpillCosts` predicts of what is borrowed; where nothing pays, of what would
            have brought all ranks to the bound. 0 without costs.
    """

    pieces: Pieces
    borrowed: Tensor
    before: Tensor
    after: Tensor
    bound: int
    missed: int
    seconds_saved: float
    seconds_spent: float


def borrowed_slots_needed(slots_per_rank: int, num_ranks: int) -> int:
    """With so many borrowed slots `B` per rank, any counts can be brought under the bound: `ceil(S * (R - 1) / R)`.

    Why it is enough. `_Relief.chain` takes the rank with the least routes `l` and the one with the most, `L`, among
    the `n` ranks that it has not yet filled, whose routes are `A` together. It fills the first up to `floor(A / n)`
    from the second's pieces, largest first, and is done with it. It stops once no rank is above the bound `C`.

    - The average of the ranks that are left, rounded up, never grows: with `A = n q + r`, `0 <= r < n`, they keep
      `(n - 1) q + r`, and `ceil(q + r / (n - 1)) <= ceil(q + r / n)`. So it never exceeds `ceil(mean) <= C`: all filled
      ranks are within the bound, and so is the last one left.
    - A rank that gives has borrowed nothing, for who has borrowed is filled and left out. All its `L` routes are in
      its `S` own slots, of which the largest `k` have `k L / S` or more. As `L >= (A - l) / (n - 1)`, what it gives is
      `floor(A / n) - l <= (A - n l) / n <= (A - l) / n <= L (n - 1) / n`, so `k = ceil(S (n - 1) / n)` of them do.
    - A rank borrows once, from one rank, so at most `ceil(S (R - 1) / R)` experts.

    Why fewer are not, where `eps = 0`: let `R - 1` ranks have `S` experts of `R m / S` routes each, and one rank none.
    It must come to compute `(R - 1) m` routes, which are `S (R - 1) / R` of those experts.
    """
    return -(-slots_per_rank * (num_ranks - 1) // num_ranks)


def spill(
    counts: Tensor, slots: Tensor, start: Pieces, limits: SpillLimits, costs: SpillCosts | None = None
) -> SpillPlan:
    """Plan the relief of a step.

    First surplus goes to ranks that hold another copy of its expert and have room, which needs no weights moved and is
    always done. Then, the most overloaded rank first and of each the largest pieces, to ranks that borrow the expert:
    to the one whose room it fills best, and where none has room for all, to the one with the most. If the bound must
    hold and did not come out, a second method replaces that, which moves more (`borrowed_slots_needed`).

    Args:
        counts: `[R, E]` int64, routes of this step by source rank and logical expert, on the CPU.
        slots: `[R, S]` int64, the logical expert of each slot that is held, `-1` for none.
        start: pieces over those slots: `even_pieces`, or `level`.
        limits: what the plan may do.
        costs: borrow only what pays by them: where bringing all ranks to the bound does not, less is tried, then
            nothing. `None`: as much as the limits ask for.

    Raises:
        ValueError: where the pieces are not of these counts and slots.
    """
    totals: list[int] = counts.sum(dim=0).tolist()
    if start.amounts.shape != slots.shape or int(start.amounts.sum()) != sum(totals):
        raise ValueError(
            f"the pieces ({list(start.amounts.shape)}, of {int(start.amounts.sum())} routes) must be over the slots "
            f"{list(slots.shape)} and of the counts' {sum(totals)} routes"
        )
    bound = limits.bound(sum(totals), len(slots))
    relief = _Relief.begin(slots, len(totals), start, limits.max_borrowed, bound)
    before = list(relief.loads)
    relief.use_copies()
    relief, saved, spent = _borrow(relief, limits, costs)
    after = torch.tensor(relief.loads)
    return SpillPlan(
        relief.pieces(),
        torch.tensor(relief.borrowed()).view(len(slots), limits.max_borrowed),
        torch.tensor(before),
        after,
        bound,
        max(0, int(after.max()) - bound),
        saved,
        spent,
    )


def _borrow(free: _Relief, limits: SpillLimits, costs: SpillCosts | None) -> tuple[_Relief, float, float]:
    """What is borrowed on top of a plan that borrows nothing; predicted seconds saved and spent."""
    bound, busiest = free.bound, max(free.loads)
    if busiest <= bound:
        return free, 0.0, 0.0
    if limits.memory_bound:
        relief = free.copy()
        relief.borrow(limits.min_rows)
        if max(relief.loads) > bound:
            relief.borrow(1)
        if max(relief.loads) > bound:
            chained = free.copy()
            chained.chain()
            relief = min(chained, relief, key=lambda plan: max(plan.loads))
        return relief, *_seconds(free, relief, costs)
    predicted: list[tuple[float, float]] = []
    for share in _SHARES[: None if costs else 1]:
        relief = free.copy()
        relief.bound = bound + int(share * (busiest - bound))
        relief.borrow(limits.min_rows)
        saved, spent = _seconds(free, relief, costs)
        if costs is None or saved > spent:
            return relief, saved, spent
        predicted.append((saved, spent))
    return free, *predicted[0]


def _seconds(free: _Relief, relief: _Relief, costs: SpillCosts | None) -> tuple[float, float]:
    if costs is None:
        return 0.0, 0.0
    saved = costs.seconds_saved(max(free.loads) - max(relief.loads))
    return saved, costs.seconds_spent(relief.busiest_lender_or_borrower())


@dataclass
class _Relief:
    """A plan in the making. Python's own lists: a step's few hundred moves are too small for tensors.

    Attributes:
        num_held: `S`; local slots from there on are borrowed.
        max_borrowed: `B`.
        bound: that no rank shall exceed.
        experts: per rank, of each slot in use, borrowed ones appended as they are filled.
        amounts: per rank, of each of these slots.
        holders: `(rank, local slot)` per expert.
        loads: per rank.
    """

    num_held: int
    max_borrowed: int
    bound: int
    experts: list[list[int]]
    amounts: list[list[int]]
    holders: list[list[tuple[int, int]]]
    loads: list[int]

    @classmethod
    def begin(cls, slots: Tensor, num_experts: int, start: Pieces, max_borrowed: int, bound: int) -> _Relief:
        experts = slots.tolist()
        amounts = start.amounts.tolist()
        loads = [sum(row) for row in amounts]
        return cls(slots.shape[1], max_borrowed, bound, experts, amounts, holders_of(experts, num_experts), loads)

    def copy(self) -> _Relief:
        nested = ([list(row) for row in rows] for rows in (self.experts, self.amounts, self.holders))
        return _Relief(self.num_held, self.max_borrowed, self.bound, *nested, list(self.loads))  # type: ignore[arg-type]

    def pieces(self) -> Pieces:
        width = self.num_held + self.max_borrowed
        experts = [row + [-1] * (width - len(row)) for row in self.experts]
        amounts = [row + [0] * (width - len(row)) for row in self.amounts]
        return Pieces(torch.tensor(experts), torch.tensor(amounts))

    def borrowed(self) -> list[list[int]]:
        width = self.num_held + self.max_borrowed
        return [(row + [-1] * (width - len(row)))[self.num_held :] for row in self.experts]

    def busiest_lender_or_borrower(self) -> int:
        """How many experts the busiest rank lends (each as often as it is borrowed) or borrows."""
        lent = [0] * len(self.loads)
        for row in self.experts:
            for expert in row[self.num_held :]:
                # Parameters come before copies, so an expert's lowest slot is that of its parameters.
                lent[min(self.holders[expert], key=lambda held: (held[1], held[0]))[0]] += 1
        return max(max(lent), *(len(row) - self.num_held for row in self.experts))

    def overloaded(self) -> list[int]:
        ranks = [rank for rank, load in enumerate(self.loads) if load > self.bound]
        return sorted(ranks, key=lambda rank: -self.loads[rank])

    def largest_first(self, rank: int) -> list[int]:
        """The rank's slots that compute anything."""
        amounts = self.amounts[rank]
        return sorted((local for local, amount in enumerate(amounts) if amount), key=lambda local: -amounts[local])

    def move(self, amount: int, giver: int, local: int, taker: int) -> None:
        """Move routes of a slot to a rank: to a slot there that has the expert, or else to one that borrows it."""
        expert = self.experts[giver][local]
        self.amounts[giver][local] -= amount
        self.loads[giver] -= amount
        self.loads[taker] += amount
        for rank, slot in self.holders[expert]:
            if rank == taker:
                self.amounts[taker][slot] += amount
                return
        self.holders[expert].append((taker, len(self.experts[taker])))
        self.experts[taker].append(expert)
        self.amounts[taker].append(amount)

    def free_slots(self, rank: int) -> int:
        return self.num_held + self.max_borrowed - len(self.experts[rank])

    def holder_with_room(self, expert: int) -> int | None:
        """Of the ranks that have an expert's weights, the one with the most room; `None` where none has any."""
        held = self.holders[expert]
        if len(held) == 1:
            return None
        rank = min((rank for rank, _ in held), key=self.loads.__getitem__)
        return rank if self.loads[rank] < self.bound else None

    def use_copies(self) -> None:
        """Move surplus to ranks that hold its expert too."""
        for giver in self.overloaded():
            for local in self.largest_first(giver):
                expert = self.experts[giver][local]
                while amount := min(self.amounts[giver][local], self.loads[giver] - self.bound):
                    if (taker := self.holder_with_room(expert)) is None:
                        break
                    self.move(min(amount, self.bound - self.loads[taker]), giver, local, taker)

    def borrow(self, min_rows: int) -> None:
        """Move surplus to ranks that borrow its expert, few experts in all: the largest pieces, where they fit best."""
        rooms = sorted(
            (self.bound - load, rank)
            for rank, load in enumerate(self.loads)
            if load < self.bound and self.free_slots(rank)
        )
        for giver in self.overloaded():
            for local in self.largest_first(giver):
                expert = self.experts[giver][local]
                while amount := min(self.amounts[giver][local], self.loads[giver] - self.bound):
                    taker = self.holder_with_room(expert)
                    if taker is None and rooms:
                        place = bisect_left(rooms, (amount, -1))
                        taker = rooms[min(place, len(rooms) - 1)][1]
                    if taker is None:
                        break
                    room = self.bound - self.loads[taker]
                    amount = min(amount, room)
                    if amount < min_rows:
                        break
                    place = bisect_left(rooms, (room, taker))
                    if place < len(rooms) and rooms[place] == (room, taker):
                        del rooms[place]
                    self.move(amount, giver, local, taker)
                    if room > amount and self.free_slots(taker):
                        insort(rooms, (room - amount, taker))

    def chain(self) -> None:
        """Bring all ranks under the bound, with `borrowed_slots_needed` slots; with fewer, as far as it comes."""
        ranks = sorted((load, rank) for rank, load in enumerate(self.loads))
        total = sum(self.loads)
        while ranks and ranks[-1][0] > self.bound:
            load, taker = ranks.pop(0)
            missing = total // (len(ranks) + 1) - load
            if ranks and missing > 0:
                _, giver = ranks.pop()
                for local in self.largest_first(giver):
                    amount = min(missing, self.amounts[giver][local])
                    has_it = any(rank == taker for rank, _ in self.holders[self.experts[giver][local]])
                    if amount and (has_it or self.free_slots(taker)):
                        self.move(amount, giver, local, taker)
                        missing -= amount
                insort(ranks, (self.loads[giver], giver))
            total -= self.loads[taker]
