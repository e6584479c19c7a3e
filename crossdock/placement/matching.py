"""Matching experts to the ranks that own them, with repair of plans that admit no matching."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from crossdock.placement.placement import EMPTY

__all__ = ["match_primaries"]


def match_primaries(
    plan: Tensor, loads: Tensor, rows_per_rank: int, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The primaries `[L, R, rows_per_rank]` and the copies `[L, R, S - rows_per_rank]` of each rank.

    As many experts as can be keep the rank of their primary in `before [L, R, rows_per_rank]`: a matching of least
    cost, by shortest augmenting paths. See `with_primaries` for the rest.
    """
    primaries, copies = [], []
    owners = [None] * len(plan) if before is None else _owners(before, loads.shape[1]).tolist()
    for slots, load, owner in zip(plan.tolist(), loads.tolist(), owners, strict=True):
        layer = _Layer(slots, load, rows_per_rank, owner)
        layer.match()
        first, rest = layer.split()
        primaries.append(first)
        copies.append(rest)
    shape = plan.shape[:2]
    return (
        torch.tensor(primaries, dtype=torch.int64).view(*shape, rows_per_rank),
        torch.tensor(copies, dtype=torch.int64).view(*shape, plan.shape[2] - rows_per_rank),
    )


class _Layer:
    """The matching of one layer.

    A primary row without an expert is a pad, an expert of its own, numbered from `E`, that lies in an empty slot: so
    every rank owns exactly `rows` experts.

    Args:
        slots: of each rank, the experts in them or `-1`.
        load: of each expert.
        rows: primaries of each rank.
        owner: the rank of each expert's primary so far, `-1` for none; `None` where none has one.
    """

    def __init__(self, slots: list[list[int]], load: list[float], rows: int, owner: list[int] | None) -> None:
        self.slots, self.rows = slots, rows
        self.living = [rank for rank, held in enumerate(slots) if any(expert != EMPTY for expert in held)]
        num_pads = len(self.living) * rows - len(load)
        self.load, self.num_experts = load + [0.0] * num_pads, len(load)
        self.before = (owner or [EMPTY] * len(load)) + [EMPTY] * num_pads
        self.holders: list[list[int]] = [[] for _ in self.load]
        self.copies = [0] * len(self.load)
        for rank in self.living:
            for expert in slots[rank]:
                if expert != EMPTY:
                    self.copies[expert] += 1
                    if rank not in self.holders[expert]:
                        self.holders[expert].append(rank)
        self._place_pads(num_pads)
        missing = [expert for expert, held in enumerate(self.holders) if not held]
        if missing:
            raise ValueError(f"plan: experts {missing[:8]} have no slot")
        self.owner = [EMPTY] * len(self.load)
        self.owned: list[set[int]] = [set() for _ in slots]

    def match(self) -> None:
        """Every expert gets an owner; slots are exchanged where there is no other way."""
        single = [expert for expert, held in enumerate(self.holders) if len(held) == 1]
        several = [expert for expert, held in enumerate(self.holders) if len(held) > 1]
        for expert in single:
            self._own_if_room(expert, self.holders[expert][0])
        for expert in several:
            if self.before[expert] in self.holders[expert]:
                self._own_if_room(expert, self.before[expert])
        for expert in several:
            if self.owner[expert] == EMPTY:
                self._own_if_room(expert, min(self.holders[expert], key=lambda rank: len(self.owned[rank])))
        for expert in several + single:
            if self.owner[expert] == EMPTY:
                self._augment(expert)

    def split(self) -> tuple[list[list[int]], list[list[int]]]:
        """The primaries and the copies of each rank, in the order of its slots; pads and what is out are `-1`."""
        primaries, copies = [], []
        for rank, held in enumerate(self.slots):
            left, first, rest = set(self.owned[rank]), [], []
            for expert in held:
                of = first if expert in left else rest
                left.discard(expert)
                of.append(expert if expert < self.num_experts else EMPTY)
            if not self.owned[rank]:
                first, rest = rest[: self.rows], rest[self.rows :]
            primaries.append(first)
            copies.append(rest)
        return primaries, copies

    def _place_pads(self, num_pads: int) -> None:
        """Pads fill empty slots, on the ranks with most of them first; copies that are missed least make room."""
        empty = [
            (rank, slot) for rank in self.living for slot, expert in enumerate(self.slots[rank]) if expert == EMPTY
        ]
        while len(empty) < num_pads:
            spare = [
                (self.load[expert] / (self.copies[expert] - 1), rank, slot)
                for rank in self.living
                for slot, expert in enumerate(self.slots[rank])
                if expert != EMPTY and self.copies[expert] > 1
            ]
            _, rank, slot = min(spare)
            expert, self.slots[rank][slot] = self.slots[rank][slot], EMPTY
            self.copies[expert] -= 1
            if expert not in self.slots[rank]:
                self.holders[expert].remove(rank)
            empty.append((rank, slot))
        by_rank = {rank: [slot for held, slot in empty if held == rank] for rank in self.living}
        for pad in range(self.num_experts, len(self.load)):
            rank = max(self.living, key=lambda rank: len(by_rank[rank]))
            self.slots[rank][by_rank[rank].pop()] = pad
            self.holders[pad], self.copies[pad] = [rank], 1

    def _own_if_room(self, expert: int, rank: int) -> None:
        if len(self.owned[rank]) < self.rows:
            self._own(expert, rank)

    def _own(self, expert: int, rank: int) -> None:
        if self.owner[expert] != EMPTY:
            self.owned[self.owner[expert]].discard(expert)
        self.owner[expert] = rank
        self.owned[rank].add(expert)

    def _augment(self, unmatched: int) -> None:
        """Other experts make room for one along the path on which the fewest leave the ranks that own them so far.

        A path goes from an expert to a rank that holds it, and on to an expert that this rank owns. An expert costs 1
        where it leaves the rank of its primary so far, and -1 where it comes back to it (Bellman and Ford's search).
        """
        cost: dict[int, int] = {}
        via: dict[int, int] = {}
        queue = deque[int]()

        def reach(expert: int, base: int) -> None:
            for rank in self.holders[expert]:
                through = base - (self.before[expert] == rank)
                if rank != self.owner[expert] and through < cost.get(rank, len(self.load)):
                    cost[rank], via[rank] = through, expert
                    queue.append(rank)

        reach(unmatched, 0)
        while queue:
            rank = queue.popleft()
            for expert in self.owned[rank]:
                if len(self.holders[expert]) > 1:
                    reach(expert, cost[rank] + (self.before[expert] == rank))
        with_room = [rank for rank in cost if len(self.owned[rank]) < self.rows]
        end = min(with_room, key=lambda rank: cost[rank]) if with_room else self._exchange(unmatched, set(cost))
        # From the end backwards each expert moves on, and leaves room for the one before it.
        while end != EMPTY:
            expert = via[end]
            before = self.owner[expert]
            self._own(expert, end)
            end = before

    def _exchange(self, unmatched: int, full: set[int]) -> int:
        """Exchange a slot of a rank in `full` with one of a rank that owns too few; the rank that then has room.

        An expert that a rank in `full` owns goes to the other rank, which owns it from then on, for a copy.
        """
        share = [load / copies for load, copies in zip(self.load, self.copies, strict=True)]
        short = [rank for rank in self.living if len(self.owned[rank]) < self.rows]
        total = {rank: sum(share[expert] for expert in self.slots[rank] if expert != EMPTY) for rank in {*full, *short}}
        best: tuple[bool, float, int, int, int, int] | None = None
        for to in short:
            copies = [expert for expert in self.slots[to] if expert not in self.owned[to]]
            # A second slot of an expert that the rank owns is a copy, too.
            copies += [expert for expert in self.owned[to] if self.slots[to].count(expert) > 1]
            for of in full:
                leaving = self.owned[of] | ({unmatched} if of in self.holders[unmatched] else set())
                for expert in leaving:
                    for copy in copies:
                        gain = share[expert] - (share[copy] if copy != EMPTY else 0.0)
                        top = max(total[of] - gain, total[to] + gain)
                        choice = (copy != EMPTY and copy in self.slots[of], top, of, to, expert, copy)
                        if best is None or choice < best:
                            best = choice
        assert best is not None  # a rank that owns too few has a slot that it does not own
        twice, _, of, to, expert, copy = best
        self.slots[to][self._copy_slot(to, copy)] = expert
        if twice:
            # Rather than a second slot of one expert, a copy of the heaviest that the rank does not hold.
            self.copies[copy] -= 1
            others = [other for other in range(self.num_experts) if other not in self.slots[of]]
            copy_there = max(others, key=lambda other: share[other], default=EMPTY)
            if copy_there != EMPTY:
                self.copies[copy_there] += 1
        else:
            copy_there = copy
        self.slots[of][self.slots[of].index(expert)] = copy_there
        for moved in {expert, copy, copy_there} - {EMPTY}:
            self.holders[moved] = [rank for rank in self.living if moved in self.slots[rank]]
        self._own(expert, to)
        return EMPTY if expert == unmatched else of

    def _copy_slot(self, rank: int, expert: int) -> int:
        """The last slot of an expert: the first is its primary, if any."""
        return len(self.slots[rank]) - 1 - self.slots[rank][::-1].index(expert)


def _owners(before: Tensor, num_experts: int) -> Tensor:
    """The rank of each expert's primary, `[L, E]`, from the primaries of each rank; `-1` for none."""
    num_layers, num_ranks, rows = before.shape
    expert = torch.where(before == EMPTY, num_experts, before).flatten(1)
    rank = torch.arange(num_ranks).repeat_interleave(rows).expand(num_layers, -1)
    return torch.full((num_layers, num_experts + 1), EMPTY).scatter_(1, expert, rank)[:, :num_experts]
