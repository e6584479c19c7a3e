"""Exchange moves: a plan in which the heaviest rank is relieved, move by move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.placement.copy_rules import copies_of, nearest_loads

__all__ = ["BALANCED", "MoveRules", "descend", "descent", "exchange_pairs"]

BALANCED = 1.001
"""The max/mean at which a layer counts as balanced: no search goes on below it."""

# A move counts that lowers the load by this share of it: fp32 sums are exact to less.
_GAIN = 1e-5
_VICTIMS = 16
# Elements of a comparison of slots with slots, for which layers are taken in parts.
_MOST_ELEMENTS = 2**21


@dataclass(frozen=True)
class MoveRules:
    """What moves must leave as it is.

    Args:
        primary_rows: the first slots of each rank, which are exchanged among themselves only, and never given to
            another copy.
        primaries_stay: whether they are not exchanged at all.
        node_of: the node of each rank, `[R]`, where tokens choose the nearest copy; else `None`. The load of an expert
            with several copies then depends on their nodes: it does not leave its node, nor get other copies.
    """

    primary_rows: int = 0
    node_of: Tensor | None = None
    primaries_stay: bool = False

    def slot_loads(self, loads: Tensor, plan: Tensor) -> Tensor:
        """The load of each slot `[L, R, S]` of a plan without empty slots."""
        if self.node_of is not None:
            return nearest_loads(loads, plan, self.node_of)
        share = loads / copies_of(plan, loads.shape[1])
        return share.gather(1, plan.flatten(1)).view(plan.shape)

    def kept_apart(self, slots_per_rank: int) -> Tensor | None:
        """Pairs of slots `[S, S]` that are never exchanged."""
        primary = torch.arange(slots_per_rank) < self.primary_rows
        if self.primaries_stay:
            return primary[:, None] | primary
        return primary[:, None] != primary if 0 < self.primary_rows < slots_per_rank else None


def descend(loads: Tensor, plan: Tensor, rules: MoveRules, limit: int) -> Tensor:
    """Where `descent` ends, after `limit` moves at most."""
    plan = plan.clone()
    for layers, changed in descent(loads, plan, rules, limit):
        plan[layers] = changed
    return plan


def descent(loads: Tensor, plan: Tensor, rules: MoveRules, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """After each move, the layers that have changed and their plans; each plan follows from the one before it alone.

    A move exchanges a slot of the heaviest rank with one of another so that the heavier of the two becomes lightest;
    where no exchange helps, an expert of the heaviest rank gets one more copy in place of another's. A layer ends
    where no move helps or it is `BALANCED`.

    Args:
        loads: `[L, E]` fp32, whose mean over the ranks is 1.
        plan: `[L, R, S]`, without empty slots and without two copies of an expert on a rank.
        rules: what stays.
        limit: of moves per layer.
    """
    layers = torch.arange(len(plan))
    plan = plan.clone()
    for _ in range(limit):
        share = rules.slot_loads(loads, plan)
        moved = share.sum(2).amax(1) > BALANCED
        part = max(1, _MOST_ELEMENTS // (plan.shape[2] * plan[0].numel())) if len(plan) else 1
        for first in range(0, len(plan), part):
            here = slice(first, first + part)
            moved[here] &= _exchange(plan[here], share[here], rules, moved[here])
        left = (~moved & (share.sum(2).amax(1) > BALANCED)).nonzero().flatten()
        if len(left) and rules.node_of is None:
            changed = plan[left]
            moved[left] = _copy_instead(loads[left], changed, share[left], rules)
            plan[left] = changed
        if not moved.all():
            kept = moved.nonzero().flatten()
            layers, loads, plan = layers[kept], loads[kept], plan[kept]
        if not len(layers):
            return
        yield layers, plan


def exchange_pairs(loads: Tensor, plan: Tensor, rules: MoveRules, rounds: int) -> None:
    """Exchange slots of many pairs of ranks at once, in place: the heaviest with the lightest, the next with the next.

    A coarse beginning; in every other round the lighter ranks are shifted against the heavier ones.
    """
    _, num_ranks, slots_per_rank = plan.shape
    half = num_ranks // 2
    share = rules.slot_loads(loads, plan)
    apart = rules.kept_apart(slots_per_rank)
    idle = torch.zeros(len(plan), dtype=torch.int64)
    for number in range(rounds):
        order = share.sum(2).argsort(dim=1, descending=True)
        heavy, light = order[:, :half], order[:, num_ranks - half :].flip(1)
        if number % 2:
            light = light.roll(number // 2 + 1, 1)
        at = torch.stack([heavy, light], dim=1)[..., None].expand(-1, -1, -1, slots_per_rank).flatten(1, 2)
        experts, shares = (each.gather(1, at).unflatten(1, (2, half)) for each in (plan, share))
        load_heavy, load_light = shares.sum(3)[..., None, None].unbind(1)
        gain = shares[:, 0, :, :, None] - shares[:, 1, :, None, :]
        top = torch.maximum(load_heavy - gain, load_light + gain)
        same = experts[:, 0, :, :, None] == experts[:, 1, :, None, :]
        barred = same.any(-1, keepdim=True) | same.any(-2, keepdim=True)
        if apart is not None:
            barred = barred | apart
        if rules.node_of is not None:
            several = _several(plan).gather(1, at).unflatten(1, (2, half))
            across = rules.node_of[heavy] != rules.node_of[light]
            barred = barred | (across[..., None, None] & (several[:, 0, :, :, None] | several[:, 1, :, None, :]))
        best, which = top.masked_fill_(barred, torch.inf).flatten(2).min(2)
        good = best < torch.maximum(load_heavy, load_light)[..., 0, 0] * (1 - _GAIN)
        # A layer ends after two rounds without an exchange, whatever the others do.
        good &= (idle < 2)[:, None]
        idle = torch.where(good.any(1), 0, idle + 1)
        if (idle > 1).all():
            return
        layer, pair = good.nonzero(as_tuple=True)
        one, two = which[layer, pair] // slots_per_rank, which[layer, pair] % slots_per_rank
        first, second = heavy[layer, pair], light[layer, pair]
        for each in (plan, share):
            each[layer, first, one], each[layer, second, two] = each[layer, second, two], each[layer, first, one]


def _exchange(plan: Tensor, share: Tensor, rules: MoveRules, wanted: Tensor) -> Tensor:
    """The best exchange of each wanted layer's heaviest rank, in place; where there was one, `[L]` bool."""
    num_layers, num_ranks, slots_per_rank = plan.shape
    layer = torch.arange(num_layers)
    load = share.sum(2)
    top, heaviest = load.max(1)
    own, own_share = plan[layer, heaviest], share[layer, heaviest]
    flat = plan.flatten(1)
    gain = own_share[:, :, None] - share.flatten(1)[:, None, :]
    result = torch.maximum(top[:, None, None] - gain, load.repeat_interleave(slots_per_rank, 1)[:, None, :] + gain)
    same = own[:, :, None] == flat[:, None, :]
    result.masked_fill_(same.any(1, keepdim=True), torch.inf)
    result = result.view(num_layers, slots_per_rank, num_ranks, slots_per_rank)
    result.masked_fill_(same.view(result.shape).any(3, keepdim=True), torch.inf)
    apart = rules.kept_apart(slots_per_rank)
    if apart is not None:
        result.masked_fill_(apart[:, None], torch.inf)
    if rules.node_of is not None:
        several = _several(plan)
        across = rules.node_of[heaviest][:, None] != rules.node_of
        bound = several[layer, heaviest][:, :, None, None] | several[:, None]
        result.masked_fill_(across[:, None, :, None] & bound, torch.inf)
    best, which = result.flatten(1).min(1)
    good = wanted & (best < top * (1 - _GAIN))
    layer = good.nonzero().flatten()
    which, first = which[layer], heaviest[layer]
    one, second, two = which // flat.shape[1], which % flat.shape[1] // slots_per_rank, which % slots_per_rank
    plan[layer, first, one], plan[layer, second, two] = plan[layer, second, two], plan[layer, first, one]
    return good


def _copy_instead(loads: Tensor, plan: Tensor, share: Tensor, rules: MoveRules) -> Tensor:
    """The best new copy of an expert of the heaviest rank in a slot of another, in place; where there was one.

    Tried in the slots whose expert, with the load that its other copies then have, weighs least.
    """
    num_layers, _, slots_per_rank = plan.shape
    num_experts = loads.shape[1]
    layer = torch.arange(num_layers)
    flat = plan.flatten(1)
    load = share.sum(2)
    top, heaviest = load.max(1)
    copies = copies_of(plan, num_experts)
    with_fewer = torch.where(copies > 1, loads / (copies - 1).clamp_min(1), torch.inf)
    with_more = loads / (copies + 1)
    weight = with_fewer.gather(1, flat).view(plan.shape)
    weight = weight.index_fill(2, torch.arange(rules.primary_rows), torch.inf).flatten(1)
    left, slots = weight.topk(min(_VICTIMS, flat.shape[1]), dim=1, largest=False)
    own, other, rank = plan[layer, heaviest], flat.gather(1, slots), slots // slots_per_rank
    usable = left < torch.inf
    left = left.masked_fill(~usable, 0.0)
    own_share = (loads / copies).gather(1, own)
    new_share = with_more.gather(1, own)
    holds_own = (plan[:, None] == own[:, :, None, None]).any(3)
    holds_other = (plan[:, None] == other[:, :, None, None]).any(3)
    relief = (own_share - new_share)[..., None] * holds_own
    burden = (left - (loads / copies).gather(1, other))[..., None] * holds_other
    # Of each rank, for each own expert and each slot: `[L, S, victims, R]`.
    result = (load[:, None] - relief)[:, :, None] + burden[:, None]
    at = rank[:, None, :, None].expand(-1, slots_per_rank, -1, 1).contiguous()
    result.scatter_add_(3, at, (new_share[:, :, None] - left[:, None])[..., None])
    barred = ~usable[:, None] | holds_own.gather(2, at[..., 0])
    best, which = result.amax(3).masked_fill_(barred, torch.inf).flatten(1).min(1)
    good = best < top * (1 - _GAIN)
    layer = good.nonzero().flatten()
    one, victim = which[layer] // other.shape[1], which[layer] % other.shape[1]
    plan.view(num_layers, -1)[layer, slots[layer, victim]] = own[layer, one]
    return good


def _several(plan: Tensor) -> Tensor:
    """Whether the expert of each slot has several."""
    return copies_of(plan, int(plan.max()) + 1).gather(1, plan.flatten(1)).view(plan.shape) > 1
