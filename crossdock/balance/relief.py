"""What a layer does within a step to keep ranks evenly busy: tokens choose among copies, and idle ranks help out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from crossdock.balance.assign import assign, assignment
from crossdock.balance.borrowing import Borrowed
from crossdock.balance.choice import CopyTable, choose, copy_table
from crossdock.balance.copies import Copies
from crossdock.balance.costs import SpillCosts
from crossdock.balance.pieces import Pieces, even_pieces
from crossdock.balance.pouring import level
from crossdock.balance.rows import RowExchange
from crossdock.balance.spilling import SpillLimits, spill
from crossdock.comm import gather_rows
from crossdock.experts import ComputeRows, GroupedExperts
from crossdock.placement import EMPTY, CopyChoice, Placement
from crossdock.routing import count_experts, is_recompute

__all__ = ["LayerRelief", "ReliefRules"]


class ReliefRules(NamedTuple):
    """How tokens choose a slot, of all layers.

    Attributes:
        copy_choice: among the copies of an expert.
        ranks_per_node: consecutive ranks that make a node.
        limits: of what ranks may borrow in a step; `None`: nothing.
        costs: what borrowing must save; `None`: it is never asked for.
    """

    copy_choice: CopyChoice = "even"
    ranks_per_node: int = 1
    limits: SpillLimits | None = None
    costs: SpillCosts | None = None


class LayerRelief:
    """The relief of one layer under one placement (`crossdock.routed_experts.Relief`).

    Args:
        placement: of primaries, copies, and at the end of every rank's slots those that it may borrow.
        num_borrowed: how many of them.
        group: the ranks that hold the experts.
        rules: alike on all of them.

    Attributes:
        copies: those that this rank holds; `None` where no rank holds one.
    """

    def __init__(self, placement: Placement, num_borrowed: int, group: dist.ProcessGroup, rules: ReliefRules) -> None:
        self.placement, self.group, self.rules = placement, group, rules
        self._borrowed_experts = 0
        held = placement.slots_per_rank - num_borrowed
        self._slots = torch.tensor([placement.slots_of(rank)[:held] for rank in range(placement.num_ranks)])
        self._num_copies = held - placement.rows_per_rank
        has_copies = bool((self._slots[:, placement.rows_per_rank :] != EMPTY).any())
        self.copies = Copies(placement, group) if has_copies else None
        self._borrowing: Borrowed | None = None
        rule = "nearest" if rules.copy_choice == "nearest" else "even"
        size = placement.slots_per_rank, group.rank()
        self._table: CopyTable = copy_table(self._slots, *size, rule, rules.ranks_per_node)

    @property
    def _exchanges_counts(self) -> bool:
        levels = self.rules.copy_choice == "least_load" and self._num_copies > 0
        return self.rules.limits is not None or levels

    def weights_changed(self) -> None:
        if self.copies is not None:
            self.copies.weights_changed()

    def begin(self, experts: GroupedExperts) -> None:
        self._experts = experts
        if self.copies is not None:
            self.copies.begin(experts)

    def slots_of(self, expert_ids: Tensor) -> Tensor:
        self._borrowing = None
        if not self._exchanges_counts:
            return self._choose(expert_ids)
        counts = self._gather(count_experts(expert_ids, self.placement.num_experts))
        if counts is None:  # Another rank has refused, and says so to the dispatcher.
            return torch.full_like(expert_ids, -1)
        pieces = self._plan(counts)
        if pieces is None:
            return self._choose(expert_ids)
        return assign(expert_ids, assignment(counts, pieces, self.group.rank()).to(expert_ids.device))

    def _choose(self, expert_ids: Tensor) -> Tensor:
        """By the rule, whatever others do."""
        self._table = self._table.to(expert_ids.device)
        return choose(expert_ids, self._table, self.group.rank())

    def refuse(self) -> None:
        if self._exchanges_counts:
            self._gather(None)

    def prepare(self, rows: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor, Tensor, ComputeRows], Tensor] | None:
        of_copies = None if self.copies is None else self.copies.prepare(rows)
        of_borrowed = None if self._borrowing is None else self._borrowing.prepare(rows)

        def compute(tokens: Tensor, slot_ids: Tensor, weights: Tensor, compute_rows: ComputeRows) -> Tensor:
            outputs = []
            if of_copies is not None:
                copies = slot_ids.masked_fill(slot_ids >= self._num_copies, -1)
                outputs.append(of_copies(tokens, copies, weights, compute_rows))
            if of_borrowed is not None:
                borrowed = (slot_ids - self._num_copies).clamp_min(-1)
                outputs.append(of_borrowed(tokens, borrowed, weights, compute_rows))
            return sum(outputs[1:], outputs[0])

        return compute if of_copies is not None or of_borrowed is not None else None

    def take_borrowed(self) -> int:
        """Experts that ranks have borrowed in training since the last call, all ranks together."""
        number, self._borrowed_experts = self._borrowed_experts, 0
        return number

    def _gather(self, counts: Tensor | None) -> Tensor | None:
        """Routes by source rank and logical expert `[R, E]`, on the host; `None` where a rank has none to tell.

        Selective recompute, which hands out what it saved in the order of the calls, does not see the exchange.
        """
        num_experts, device = self.placement.num_experts, self._experts.down_projs.device
        own = torch.full((num_experts,), -1, device=device) if counts is None else counts
        with torch.no_grad(), _disable_current_modes():
            gathered = gather_rows(own[None], [1] * self.placement.num_ranks, self.group.group_name).wait().cpu()
        return None if bool((gathered < 0).any()) else gathered

    def _plan(self, counts: Tensor) -> Pieces | None:
        """Who computes what, and what is borrowed for it; `None` where nobody needs help, and the rule does."""
        limits, levels = self.rules.limits, self.rules.copy_choice == "least_load"
        start = (level if levels else even_pieces)(counts, self._slots)
        if limits is None:
            missing = (0, self.placement.slots_per_rank - self._slots.shape[1])
            return Pieces(F.pad(start.experts, missing, value=EMPTY), F.pad(start.amounts, missing))
        # Copies dealt out in turn are even but for what does not divide, which a bound may not allow.
        ruled = self.copies is None or (self.rules.copy_choice == "even" and not limits.memory_bound)
        if ruled and int(start.per_rank.max()) <= limits.bound(int(counts.sum()), len(counts)):
            return None
        plan = spill(counts, self._slots, start, limits, self.rules.costs)
        if bool((plan.borrowed != EMPTY).any()):
            if self._experts.training and torch.is_grad_enabled() and not is_recompute():
                self._borrowed_experts += int((plan.borrowed != EMPTY).sum())
            self._borrowing = Borrowed(RowExchange.of(plan.borrowed.tolist(), self.placement, self.group))
            self._borrowing.begin(self._experts)
        elif ruled and torch.equal(plan.after, plan.before):
            return None
        return plan.pieces
