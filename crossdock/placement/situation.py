"""What a planner is given to fill, and the rule by which tokens will choose among copies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from crossdock.placement.placement import EMPTY

__all__ = ["CopyChoice", "PlanningSituation"]

CopyChoice = Literal["even", "nearest", "least_load"]
"""How the tokens of an expert choose among its copies (docs/balance.md): `even`, each copy the same share; `nearest`,
the copy on their own rank, else those on their node, else all; `least_load`, so as to level the ranks."""

# Sums of loads must be numbers of fp32, in which the published method computes.
_MOST_LOAD = 1e30


@dataclass(frozen=True)
class PlanningSituation:
    """The slots that a planner fills.

    Args:
        num_ranks: `R`, those that are gone included.
        slots_per_rank: `S`, primaries and copies.
        num_nodes: of ranks, in order, of equal size.
        num_groups: of experts, in order, of equal size, to which routing is limited; 1 where it is not.
        ranks_out: ranks that are gone; their slots stay empty, and no tokens come from them.
        copy_choice: the rule by which tokens choose copies.
        move_cost: what it costs to move the experts of all slots of a layer, in units of max/mean; of all its
            primaries, where there are `primary_rows`.
        primary_rows: the first slots of each rank, all of which together hold each expert once (`plan_with_primaries`,
            which sets it); 0 where all slots are alike.

    Raises:
        ValueError: names the field, its value and what would be valid.
    """

    num_ranks: int
    slots_per_rank: int
    num_nodes: int = 1
    num_groups: int = 1
    ranks_out: tuple[int, ...] = ()
    copy_choice: CopyChoice = "even"
    move_cost: float = 0.0
    primary_rows: int = 0

    def __post_init__(self) -> None:
        for name in ("num_ranks", "slots_per_rank", "num_nodes", "num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.num_ranks % self.num_nodes:
            raise ValueError(f"num_nodes = {self.num_nodes}: must divide num_ranks = {self.num_ranks}")
        if len(set(self.ranks_out)) < len(self.ranks_out) or not set(self.ranks_out) <= set(range(self.num_ranks)):
            raise ValueError(f"ranks_out = {self.ranks_out}: must be different ranks of 0..{self.num_ranks - 1}")
        if len(self.ranks_out) == self.num_ranks:
            raise ValueError(f"ranks_out = {self.ranks_out}: must leave a rank of {self.num_ranks}")
        if self.copy_choice not in get_args(CopyChoice):
            choices = ", ".join(get_args(CopyChoice))
            raise ValueError(f"copy_choice = {self.copy_choice!r}: must be one of {choices}")
        if not 0 <= self.primary_rows <= self.slots_per_rank:
            raise ValueError(f"primary_rows = {self.primary_rows}: must be 0 to slots_per_rank = {self.slots_per_rank}")
        if not 0 <= self.move_cost < float("inf"):
            raise ValueError(f"move_cost = {self.move_cost}: must be a finite number of at least 0")

    @cached_property
    def living(self) -> tuple[int, ...]:
        """The ranks that are not out."""
        return tuple(rank for rank in range(self.num_ranks) if rank not in self.ranks_out)

    @property
    def node_of_living(self) -> Tensor:
        """The node of each living rank, `[R']` int64."""
        return torch.tensor(self.living) // (self.num_ranks // self.num_nodes)

    def check(self, loads: Tensor, current: Tensor | None = None) -> Tensor:
        """The loads `[L, E]` as float64 on the CPU.

        Raises:
            ValueError: for loads that are no loads, slots that are too few for the experts, or a plan of another shape.
        """
        if loads.ndim != 2 or not loads.numel():
            raise ValueError(f"loads of shape {tuple(loads.shape)}: must be [layers, experts]")
        loads = loads.detach().cpu().double()
        refused = (
            ("NaN", loads.isnan()),
            ("infinite", loads.isinf()),
            ("negative", loads < 0),
            ("too large", loads > _MOST_LOAD),
        )
        for name, wrong in refused:
            if wrong.any():
                layer, expert = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"loads[{layer}, {expert}] = {loads[layer, expert]}: {name}; must be 0 to {_MOST_LOAD:g}"
                )
        num_experts = loads.shape[1]
        if num_experts % self.num_groups:
            raise ValueError(f"num_groups = {self.num_groups}: must divide the {num_experts} experts")
        needed = -(-num_experts // len(self.living))
        if self.slots_per_rank < needed:
            raise ValueError(
                f"slots_per_rank = {self.slots_per_rank}: {num_experts} experts on {len(self.living)} ranks need "
                f"at least {needed}"
            )
        if self.primary_rows and self.primary_rows * len(self.living) != num_experts:
            raise ValueError(
                f"primary_rows = {self.primary_rows}: {len(self.living)} ranks of them must hold the {num_experts} "
                "experts exactly; plan_with_primaries adds experts without load where they do not"
            )
        shape = (len(loads), self.num_ranks, self.slots_per_rank)
        if current is not None:
            if current.shape != shape:
                raise ValueError(f"current of shape {tuple(current.shape)}: must be {shape}")
            if len(current) and not EMPTY <= int(current.min()) <= int(current.max()) < num_experts:
                raise ValueError(f"current: must hold experts of 0..{num_experts - 1} and {EMPTY}")
        return loads
