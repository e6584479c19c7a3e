"""Which slot on which rank holds which logical expert."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

__all__ = ["EMPTY", "Placement"]

EMPTY = -1


@dataclass(frozen=True)
class Placement:
    """An immutable map of slots to logical experts (docs/design.md, contract 3).

    Rank `g` owns the slots `g * slots_per_rank .. (g + 1) * slots_per_rank - 1`. A slot may be empty (`-1`), so the
    number of experts need not be a multiple of the number of ranks.

    Args:
        num_experts: `E`, logical experts.
        num_ranks: `R`, ranks that share them.
        slot_to_expert: `P` entries, the logical expert of each slot or `-1`.

    Raises:
        ValueError: if slots do not divide evenly over the ranks, or an expert has no slot.
    """

    num_experts: int
    num_ranks: int
    slot_to_expert: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_positive(self.num_experts, self.num_ranks)
        if len(self.slot_to_expert) % self.num_ranks:
            raise ValueError(f"{len(self.slot_to_expert)} slots do not divide evenly over {self.num_ranks} ranks")
        held = {expert for expert in self.slot_to_expert if expert != EMPTY}
        if held != set(range(self.num_experts)):
            wrong = sorted(held ^ set(range(self.num_experts)))
            raise ValueError(
                f"slot_to_expert must hold the experts 0..{self.num_experts - 1}; missing or unknown: {wrong}"
            )

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> Placement:
        """Rank `g` holds the experts `g*E//R .. (g+1)*E//R - 1`, in `ceil(E / R)` slots (9 on 4: 2, 2, 2, 3)."""
        _check_positive(num_experts, num_ranks)
        slots_per_rank = -(-num_experts // num_ranks)
        slots: list[int] = []
        for rank in range(num_ranks):
            experts = list(range(rank * num_experts // num_ranks, (rank + 1) * num_experts // num_ranks))
            slots += experts + [EMPTY] * (slots_per_rank - len(experts))
        return cls(num_experts, num_ranks, tuple(slots))

    @property
    def num_slots(self) -> int:
        return len(self.slot_to_expert)

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @cached_property
    def expert_to_slot(self) -> tuple[int, ...]:
        """The first slot of each logical expert, `E` entries."""
        slots = [EMPTY] * self.num_experts
        for slot in reversed(range(self.num_slots)):
            if self.slot_to_expert[slot] != EMPTY:
                slots[self.slot_to_expert[slot]] = slot
        return tuple(slots)

    def experts_on(self, rank: int) -> tuple[int, ...]:
        """The logical expert of each of the rank's own slots, `-1` where a slot is empty; `slots_per_rank` entries."""
        return self.slot_to_expert[rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]


def _check_positive(num_experts: int, num_ranks: int) -> None:
    if num_experts < 1 or num_ranks < 1:
        raise ValueError(f"num_experts ({num_experts}) and num_ranks ({num_ranks}) must be positive")
