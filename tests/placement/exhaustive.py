"""The best balance that any placement without two copies of an expert on a rank has, by trying all."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

__all__ = ["least_maximum"]


def least_maximum(loads: list[float], num_ranks: int, slots_per_rank: int, below: float = float("inf")) -> float:
    """The least load of the heaviest rank, copies split evenly; `below` where none is less.

    For each way to share out the copies (each expert has one at least and `num_ranks` at most), ranks are filled with
    the copies of one expert after the other, the heaviest share first. Ranks that hold the same experts are
    interchangeable: of such ranks the first ones are taken.
    """
    order = sorted(loads, reverse=True)
    best = [below]
    for copies in _shared_out(order, num_ranks * slots_per_rank, num_ranks, best):
        items = sorted(zip((load / count for load, count in zip(order, copies, strict=True)), copies, strict=True))[
            ::-1
        ]
        if items[0][0] < best[0] and sum(order) / num_ranks < best[0]:
            _fill(items, 0, [((), 0.0, slots_per_rank, num_ranks)], best)
    return best[0]


def _shared_out(order: list[float], num_slots: int, most: int, best: list[float]) -> Iterator[tuple[int, ...]]:
    """Numbers of copies; of experts with equal loads the first ones have more."""

    def parts(expert: int, left: int, before: int) -> Iterator[tuple[int, ...]]:
        others = len(order) - expert - 1
        limit = before if expert and order[expert] == order[expert - 1] else most
        least = max(1, left - others * most, ceil(order[expert] / best[0] * (1 - 1e-9)))
        for count in range(least, min(limit, left - others) + 1):
            if others:
                for rest in parts(expert + 1, left - count, count):
                    yield count, *rest
            else:
                yield (count,)

    return parts(0, num_slots, most)


Kind = tuple[tuple[int, ...], float, int, int]


def _fill(items: list[tuple[float, int]], item: int, kinds: list[Kind], best: list[float]) -> None:
    """`kinds` are ranks that hold the same: experts, load, free slots and how many such ranks there are."""
    if item == len(items):
        best[0] = min(best[0], max(load for _, load, _, _ in kinds))
        return
    share, copies = items[item]

    def choose(number: int, left: int, chosen: list[Kind]) -> None:
        if number == len(kinds):
            if not left:
                _fill(items, item + 1, chosen, best)
            return
        experts, load, free, ranks = kinds[number]
        fits = free > 0 and load + share < best[0] * (1 - 1e-9)
        for taken in range(min(left, ranks) if fits else 0, -1, -1):
            following = list(chosen)
            if taken:
                following.append(((*experts, item), load + share, free - 1, taken))
            if taken < ranks:
                following.append((experts, load, free, ranks - taken))
            choose(number + 1, left - taken, following)

    choose(0, copies, [])
