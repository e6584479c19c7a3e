"""Which slot on which rank holds which logical expert."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

__all__ = ["EMPTY", "Placement"]

EMPTY = -1
"""The expert of a slot that holds none."""


@dataclass(frozen=True)
class Placement:
    """An immutable map of slots to logical experts (docs/design.md, contract 3).

    Rank `g` owns the slots `g * slots_per_rank .. (g + 1) * slots_per_rank - 1`. The first `rows_per_rank` of them are
    rows of the layer's parameters, where every expert has exactly one, its primary; the others hold copies. A slot may
    be empty (`-1`), so the number of experts need not be a multiple of the number of ranks.

    Args:
        num_experts: `E`, logical experts.
        num_ranks: `R`, ranks that share them.
        slot_to_expert: `P` entries, the logical expert of each slot or `-1`.
        copies_per_rank: how many of a rank's slots, the last ones, are no rows of parameters.

    Raises:
        ValueError: if slots do not divide evenly over the ranks, or not every expert has exactly one primary.
    """

    num_experts: int
    num_ranks: int
    slot_to_expert: tuple[int, ...]
    copies_per_rank: int = 0

    def __post_init__(self) -> None:
        _check_positive(self.num_experts, self.num_ranks)
        if len(self.slot_to_expert) % self.num_ranks:
            raise ValueError(f"{len(self.slot_to_expert)} slots do not divide evenly over {self.num_ranks} ranks")
        if not 0 <= self.copies_per_rank <= self.slots_per_rank:
            raise ValueError(
                f"copies_per_rank ({self.copies_per_rank}) must be 0 to {self.slots_per_rank}, a rank's slots"
            )
        experts = set(range(self.num_experts))
        held = set(self.slot_to_expert) - {EMPTY}
        if held != experts:
            raise ValueError(
                f"slot_to_expert must hold the experts 0..{self.num_experts - 1}; missing or unknown: "
                f"{sorted(held ^ experts)}"
            )
        primaries = [expert for expert in self.row_to_expert if expert != EMPTY]
        if len(primaries) != self.num_experts or set(primaries) != experts:
            wrong = sorted(expert for expert in experts if primaries.count(expert) != 1)
            raise ValueError(
                f"every expert must have one of the first {self.rows_per_rank} slots of a rank, its primary, once; "
                f"not so: {wrong}"
            )

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int, copies_per_rank: int = 0) -> Placement:
        """Rank `g` holds the experts `g*E//R .. (g+1)*E//R - 1`, in `ceil(E / R)` slots (9 on 4: 2, 2, 2, 3).

        `copies_per_rank` further slots of every rank are empty.
        """
        _check_positive(num_experts, num_ranks)
        rows_per_rank = -(-num_experts // num_ranks)
        slots: list[int] = []
        for rank in range(num_ranks):
            experts = list(range(rank * num_experts // num_ranks, (rank + 1) * num_experts // num_ranks))
            slots += experts + [EMPTY] * (rows_per_rank - len(experts) + copies_per_rank)
        return cls(num_experts, num_ranks, tuple(slots), copies_per_rank)

    def with_more_slots(self, number: int) -> Placement:
        """The same with `number` further empty slots on every rank, after those that it has."""
        slots: list[int] = []
        for rank in range(self.num_ranks):
            slots += [*self.slots_of(rank), *[EMPTY] * number]
        return Placement(self.num_experts, self.num_ranks, tuple(slots), self.copies_per_rank + number)

    def without_last_slots(self, number: int) -> Placement:
        """The same without the last `number` slots of every rank, which are empty."""
        slots: list[int] = []
        for rank in range(self.num_ranks):
            slots += self.slots_of(rank)[: self.slots_per_rank - number]
        return Placement(self.num_experts, self.num_ranks, tuple(slots), self.copies_per_rank - number)

    @property
    def num_slots(self) -> int:
        return len(self.slot_to_expert)

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @property
    def rows_per_rank(self) -> int:
        return self.slots_per_rank - self.copies_per_rank

    @property
    def num_rows(self) -> int:
        return self.rows_per_rank * self.num_ranks

    @cached_property
    def row_to_expert(self) -> tuple[int, ...]:
        """The logical expert of each row of the layer's parameters, `-1` where it is empty; `num_rows` entries."""
        return tuple(expert for rank in range(self.num_ranks) for expert in self.experts_on(rank))

    @cached_property
    def expert_to_row(self) -> tuple[int, ...]:
        """The row of each logical expert's primary, `E` entries."""
        rows = {expert: row for row, expert in enumerate(self.row_to_expert)}
        return tuple(rows[expert] for expert in range(self.num_experts))

    @property
    def expert_to_slot(self) -> tuple[int, ...]:
        """The slot of each logical expert's primary, `E` entries."""
        ranks_rows = (divmod(row, self.rows_per_rank) for row in self.expert_to_row)
        return tuple(rank * self.slots_per_rank + row for rank, row in ranks_rows)

    def experts_on(self, rank: int) -> tuple[int, ...]:
        """The logical expert of each of the rank's rows, `-1` where a row is empty; `rows_per_rank` entries."""
        return self.slots_of(rank)[: self.rows_per_rank]

    def slots_of(self, rank: int) -> tuple[int, ...]:
        """The logical expert of each of the rank's slots, copies included; `slots_per_rank` entries."""
        return self.slot_to_expert[rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]


def _check_positive(num_experts: int, num_ranks: int) -> None:
    if num_experts < 1 or num_ranks < 1:
        raise ValueError(f"num_experts ({num_experts}) and num_ranks ({num_ranks}) must be positive")
