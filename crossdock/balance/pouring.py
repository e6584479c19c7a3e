"""Routes poured over the copies of their experts so as to level the ranks (`copy_choice = least_load`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from crossdock.balance.pieces import Pieces, even_pieces, holders_of

__all__ = ["level"]

# Of pouring. A few settle most of it; along chains of ranks that share experts two by two it is slow.
_ROUNDS = 8


def level(counts: Tensor, slots: Tensor) -> Pieces:
    """Split each expert's routes over its slots so that the busiest rank has the fewest routes that any split gives it.

    From the even split on, one expert after another is taken off its ranks and poured back like water into vessels, a
    few rounds long. Then routes are passed on from the busiest rank along paths: from rank to rank that share an
    expert of which the former computes routes, to one that has at least two routes less. Each of these steps makes
    the sum of the ranks' squared loads smaller, so they end; and where no path is left, the maximum `m` is the least
    possible: from the busiest rank, paths reach only ranks with `m - 1` routes or more. All copies of an expert that
    any of these ranks computes are among them, so whatever the split, these routes stay there; and as they are more
    than `m - 1` per rank, one rank has `m`.

    Args:
        counts: `[R, E]` int64, routes of this step by source rank and logical expert, on the CPU.
        slots: `[R, S]` int64, the logical expert of each slot that is held, `-1` for none.

    Returns:
        Pieces over the `S` held slots of each rank.

    Raises:
        ValueError: where an expert with routes has no slot.
    """
    even = even_pieces(counts, slots)
    totals: list[int] = counts.sum(dim=0).tolist()
    levelling = _Levelling(slots.tolist(), even.amounts.tolist(), even.per_rank.tolist(), len(totals))
    levelling.pour(totals)
    while levelling.pass_on():
        pass
    return Pieces(slots, torch.tensor(levelling.amounts))


class _Levelling:
    """A split in the making.

    Args:
        experts, amounts: per rank, of each slot.
        loads: per rank.
        num_experts: `E`.
    """

    def __init__(self, experts: list[list[int]], amounts: list[list[int]], loads: list[int], num_experts: int) -> None:
        self.experts, self.amounts, self.loads = experts, amounts, loads
        self.holders = holders_of(experts, num_experts)
        self.least = -(-sum(loads) // len(loads))

    def pour(self, totals: list[int]) -> None:
        several = [expert for expert, held in enumerate(self.holders) if len(held) > 1 and totals[expert]]
        several.sort(key=lambda expert: -totals[expert])
        amounts, loads = self.amounts, self.loads
        busiest = max(loads)
        for _ in range(_ROUNDS):
            if busiest <= self.least:
                return
            for expert in several:
                held = self.holders[expert]
                for rank, local in held:
                    loads[rank] -= amounts[rank][local]
                poured = _pour(totals[expert], [loads[rank] for rank, _ in held])
                for (rank, local), amount in zip(held, poured, strict=True):
                    amounts[rank][local] = amount
                    loads[rank] += amount
            if max(loads) == busiest:
                return
            busiest = max(loads)

    def pass_on(self) -> bool:
        """Pass routes from the busiest rank along the shortest path; was there one?"""
        busiest = max(self.loads)
        start = self.loads.index(busiest)
        if busiest <= self.least:
            return False
        # How each rank is reached: from a slot of another, to a slot of its own.
        came: dict[int, tuple[int, int, int]] = {start: (start, 0, 0)}
        waiting = deque([start])
        seen: set[int] = set()
        while waiting:
            rank = waiting.popleft()
            for local, (expert, amount) in enumerate(zip(self.experts[rank], self.amounts[rank], strict=True)):
                if not amount or expert in seen:
                    continue
                seen.add(expert)
                for other, slot in self.holders[expert]:
                    if other in came:
                        continue
                    came[other] = (rank, local, slot)
                    if self.loads[other] <= busiest - 2:
                        self._move(came, start, other, (busiest - self.loads[other]) // 2)
                        return True
                    waiting.append(other)
        return False

    def _move(self, came: dict[int, tuple[int, int, int]], start: int, end: int, amount: int) -> None:
        path, rank = [], end
        while rank != start:
            before, local, slot = came[rank]
            path.append((before, local, rank, slot))
            amount = min(amount, self.amounts[before][local])
            rank = before
        for before, local, rank, slot in path:
            self.amounts[before][local] -= amount
            self.amounts[rank][slot] += amount
        self.loads[start] -= amount
        self.loads[end] += amount


def _pour(amount: int, levels: Sequence[int]) -> list[int]:
    """How much each vessel takes so that the lowest ones come up to one level; what does not divide, the first."""
    order = sorted(range(len(levels)), key=levels.__getitem__)
    below, wet = 0, 0
    for wet, vessel in enumerate(order, 1):
        below += levels[vessel]
        if wet == len(order) or amount + below <= wet * levels[order[wet]]:
            break
    surface, left = divmod(amount + below, wet)
    poured = [0] * len(levels)
    for place, vessel in enumerate(order[:wet]):
        poured[vessel] = surface - levels[vessel] + (place < left)
    return poured
