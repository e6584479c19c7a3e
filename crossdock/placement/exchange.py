"""Ours: copies and places chosen together, improved by exchanging slots, and kept where a move does not pay."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from crossdock.placement.annealing import SMALL, annealed
from crossdock.placement.descent import BALANCED, MoveRules, descend, descent, exchange_pairs
from crossdock.placement.eplb import pack, published
from crossdock.placement.matching import match_primaries
from crossdock.placement.mend import filled, mended
from crossdock.placement.nodes import Nodes
from crossdock.placement.placement import EMPTY
from crossdock.placement.relabel import rank_order
from crossdock.placement.situation import PlanningSituation
from crossdock.placement.slot_order import keep_slots, moved_experts
from crossdock.placement.start import fresh_start

__all__ = ["NODE_PRICE", "plan_by_exchange"]

NODE_PRICE = 0.01
"""What it costs to send everything between nodes, in units of max/mean: so much balance at most is given for it."""

_PAIR_ROUNDS = 16
_MOVES = 200
_EQUAL = 1e-9


def plan_by_exchange(loads: Tensor, situation: PlanningSituation, current: Tensor | None = None) -> Tensor:
    """A plan `[L, R, S]` without two copies of an expert on one rank (`Planner`).

    It lowers `max/mean + NODE_PRICE * between + move_cost * moved / slots`, for each layer on its own, where
    - max/mean is that of the rule by which tokens choose copies; `least_load` is planned for as `even`. With `current`
      every max/mean below 1.001 counts as 1.001, so that nothing moves for less.
    - between is what `Nodes.between` says of traffic between nodes: 0 with one node, or where each plan sends the same.
    - moved is the number of slots whose expert their rank does not hold in `current`, slots the number of all that
      are filled. With `primary_rows`, primaries alone: a copy's weights are sent in each step anyhow.

    Without `current`: copies for the heaviest experts, dealt to ranks in rounds, then exchanges (`descent`); the
    published method's plan where that is better and has no two copies of an expert on a rank. Small plans are
    annealed. With `current` the best of it, of all plans on the descent from it, and of the plan without it,
    its ranks renamed so that most experts stay; with `primary_rows` of those with other copies beside its primaries,
    too; again from there, until nothing changes. So planning again from the result gives the result.
    """
    loads = situation.check(loads, current)
    living = torch.tensor(situation.living)
    search = _Search(loads, situation)
    plan = search.fresh()
    if current is not None:
        plan = search.from_current(current[:, living].cpu(), plan, situation.move_cost)
    full = torch.full((len(loads), situation.num_ranks, situation.slots_per_rank), EMPTY)
    full[:, living, : plan.shape[2]] = plan
    if current is None:
        return full
    rows, current = situation.primary_rows, current.cpu()
    kept = [keep_slots(full[..., part], current[..., part]) for part in (slice(rows), slice(rows, None))]
    return torch.cat(kept, dim=2)


class _Search:
    """The search for all layers, on the living ranks alone.

    Args:
        loads: `[L, E]` float64.
        situation: what there is to fill.
    """

    def __init__(self, loads: Tensor, situation: PlanningSituation) -> None:
        num_experts = loads.shape[1]
        self.given, self.situation, self.rows = loads, situation, situation.primary_rows
        self.num_ranks, self.slots = len(situation.living), min(situation.slots_per_rank, num_experts)
        # In units of the mean load of a rank.
        mean = loads.sum(1, keepdim=True) / self.num_ranks
        self.loads = torch.where(mean > 0, loads / mean.clamp_min(torch.finfo(loads.dtype).tiny), 0.0)
        self.all = torch.arange(len(loads))
        node_of = situation.node_of_living.unique(return_inverse=True)[1]
        nearest = situation.copy_choice == "nearest" and int(node_of.max()) > 0
        self.nodes = Nodes(node_of, situation.num_groups, nearest)
        self.even = MoveRules(self.rows)
        self.rules = MoveRules(self.rows, node_of if nearest else None)

    def fresh(self) -> Tensor:
        """A plan `[L, R, S]` of loads alone."""
        plan = self._improved(self._with_primaries(fresh_start(self.loads, self.num_ranks, self.slots)))
        if self.num_ranks * self.slots <= SMALL:
            # No plan is better than the mean, or than the heaviest expert with all copies that it can have.
            most = min(self.num_ranks, self.num_ranks * self.slots - self.loads.shape[1] + 1)
            bound = (self.loads.amax(1) / most).clamp_min(1.0)
            peak = self.even.slot_loads(self.loads, plan).sum(2).amax(1)
            layers = (peak > BALANCED * bound).nonzero().flatten()
            if len(layers):
                plan[layers] = annealed(self.loads[layers], plan[layers], self.even)
        if self.nodes.matter:
            plan = self._near(plan)
            grouped = self._grouped()
            if grouped is not None:
                plan = self._best(self.all, plan, self._near(grouped))
        if self.rows:
            # Other copies beside the same primaries may be better, and lead on.
            return self.from_current(plan, plan, move_cost=0.0)
        if self.slots < self.situation.slots_per_rank:
            return plan  # every rank holds every expert
        theirs = published(self.given, self.situation)
        in_order = theirs.sort(dim=2).values
        once = (in_order[..., 1:] != in_order[..., :-1]).flatten(1).all(1)
        layers = (once & (self._value(self.all, theirs) < self._value(self.all, plan))).nonzero().flatten()
        if len(layers):
            plan[layers] = self._best(layers, theirs[layers], self._descended(layers, theirs[layers], self.rules))
        return plan

    def from_current(self, current: Tensor, fresh: Tensor, move_cost: float) -> Tensor:
        """The plan to go to from `current [L, R, S]`."""
        plan = mended(self.loads, current, self.slots, self.rows)
        layers = self.all
        while len(layers):
            following = self._step(layers, plan[layers], fresh[layers], move_cost)
            changed = (following != plan[layers]).flatten(1).any(1)
            plan[layers] = following
            layers = layers[changed]
        return plan

    def _step(self, layers: Tensor, plan: Tensor, fresh: Tensor, move_cost: float) -> Tensor:
        """The best of a plan, what descends from it, and a fresh one with its ranks renamed; fewest moves of equals."""
        kind = slice(self.rows or None)
        num_slots = plan[0, :, kind].numel()
        best, moved = plan.clone(), torch.zeros(len(plan), dtype=torch.int64)
        value = self._value(layers, plan, BALANCED)

        def consider(which: Tensor, other: Tensor) -> None:
            away = moved_experts(other[..., kind], plan[which][..., kind])
            cost = self._value(layers[which], other, BALANCED) + move_cost * away / num_slots
            better = (cost < value[which] - _EQUAL) | ((cost <= value[which] + _EQUAL) & (away < moved[which]))
            taken = which[better]
            best[taken], value[taken], moved[taken] = other[better], cost[better], away[better]

        starts, every = [plan], torch.arange(len(plan))
        if 0 < self.rows < self.slots:
            # Copies anew beside the primaries that there are: they cost nothing to move.
            anew = plan.clone()
            anew[..., self.rows :] = EMPTY
            frozen = dataclasses.replace(self.rules, primaries_stay=True)
            starts.append(self._descended(layers, filled(self.loads[layers], anew), frozen))
            consider(every, starts[1])
        for start in starts:
            for which, other in descent(self.loads[layers].float(), start, self.rules, _MOVES):
                consider(which, other)
        node_of = self.nodes.node_of if self.nodes.matter else None
        order = rank_order(fresh[..., kind], plan[..., kind], node_of)
        consider(every, fresh.gather(1, order[..., None].expand_as(fresh)))
        return best

    def _value(self, layers: Tensor, plan: Tensor, least: float = 0.0) -> Tensor:
        """max/mean, which counts as `least` where it is less, and the price of traffic between nodes, `[L]` float64."""
        loads = self.loads[layers]
        share = self.rules.slot_loads(loads, plan)
        return share.sum(2).amax(1).clamp_min(least) + NODE_PRICE * self.nodes.between(loads, plan, share)

    def _improved(self, plan: Tensor) -> Tensor:
        """By exchanges of many pairs at once, then the heaviest rank's, with copies chosen evenly."""
        exchange_pairs(self.loads.float(), plan, self.even, _PAIR_ROUNDS)
        return self._descended(self.all, plan, self.even)

    def _descended(self, layers: Tensor, plan: Tensor, rules: MoveRules) -> Tensor:
        return descend(self.loads[layers].float(), plan, rules, _MOVES)

    def _best(self, layers: Tensor, plan: Tensor, other: Tensor) -> Tensor:
        better = self._value(layers, other) < self._value(layers, plan)
        return torch.where(better[:, None, None], other, plan)

    def _with_primaries(self, plan: Tensor) -> Tensor:
        """With the primaries in the first slots, where the situation has any."""
        return torch.cat(match_primaries(plan, self.loads, self.rows), dim=2) if self.rows else plan

    def _near(self, plan: Tensor) -> Tensor:
        """Its ranks in an order in which they send less between nodes, then levelled under the rule of copies."""
        arranged = self.nodes.arrange(self.loads, plan, self.even.slot_loads(self.loads, plan))
        if self.rules.node_of is not None:
            arranged = self._descended(self.all, arranged, self.rules)
        return arranged

    def _grouped(self) -> Tensor | None:
        """A plan in which groups of experts lie on one node but for what balance needs; `None` where there is no such.

        Groups are packed on nodes, each node is planned for on its own, and exchanges between nodes level those.
        """
        num_groups, num_nodes = self.nodes.num_groups, len(self.nodes.ranks_of)
        ranks, experts = self.num_ranks // num_nodes, self.loads.shape[1] // num_nodes
        if num_groups == 1 or num_groups % num_nodes or self.nodes.ranks_of.unique().numel() > 1:
            return None
        if ranks * self.slots < experts or self.slots > experts:
            return None
        of_groups = self.loads.unflatten(1, (num_groups, -1))
        node, place = pack(of_groups.sum(2), num_nodes)
        order = (node * (num_groups // num_nodes) + place).argsort(dim=1)
        loads = of_groups.gather(1, order[..., None].expand_as(of_groups)).reshape(-1, experts)
        mean = loads.sum(1, keepdim=True).clamp_min(torch.finfo(loads.dtype).tiny) / ranks
        start = fresh_start(loads, ranks, self.slots)
        plan = descend((loads / mean).float(), start, self.even, _MOVES) if not self.rows else start
        # From a node's own numbers of experts to all.
        size = of_groups.shape[2]
        group = order.view(-1, num_groups // num_nodes).gather(1, plan.flatten(1) // size)
        plan = (group * size + plan.flatten(1) % size).view(len(self.loads), self.num_ranks, self.slots)
        return self._descended(self.all, self._with_primaries(plan), self.even)
