"""Random moves for plans so small that exchanges alone end in poor ones."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.placement.copy_rules import copies_of
from crossdock.placement.descent import MoveRules, descend
from crossdock.placement.start import fresh_start

__all__ = ["SMALL", "annealed"]

SMALL = 24
"""Slots of a layer up to which annealing is worth its time."""

_CHAINS = 128
_STEPS = 400
_STEPS_PER_DESCENT = 50
_HOT, _COLD = 0.1, 0.01  # in units of the mean load
_NORM = 12
_NOISE = 3.0
_DESCENT = 50


def annealed(loads: Tensor, plan: Tensor, rules: MoveRules) -> Tensor:
    """The plans `[L, R, S]` with the lightest heaviest ranks that simulated annealing meets, from `plan` and others.

    Each layer has chains that exchange two random slots, or give one to another expert, and accept by Metropolis' rule
    on a norm of the ranks' loads that is close to the largest. Half of them start from plans of noisy loads, so that
    experts have other numbers of copies. Descents from where the chains are give the candidates. The random numbers
    are the same for all layers, so no layer's plan depends on the others.

    Args:
        loads: `[L, E]` float64, whose mean over the ranks is 1.
        plan: without empty slots and without two copies of an expert on a rank.
        rules: what stays; copies are chosen evenly.
    """
    num_layers, num_ranks, slots_per_rank = plan.shape
    num_experts, num_slots = loads.shape[1], num_ranks * slots_per_rank
    generator = torch.Generator().manual_seed(0)
    best, lowest = plan.clone(), _peak(loads, plan, rules)
    # `[chains, L, slots]` from here on, and `[chains, L, experts]`.
    state = torch.stack(_starts(loads, plan, rules, generator)).flatten(2)
    copies = copies_of(state.flatten(0, 1), num_experts).view(_CHAINS, num_layers, num_experts)
    rough, many = loads.float(), loads.repeat(_CHAINS, 1)
    draws = [torch.randint(end, (_STEPS, _CHAINS), generator=generator) for end in (num_slots, num_slots, num_experts)]
    exchanges, chances = (torch.rand(_STEPS, _CHAINS, generator=generator) for _ in range(2))
    primary = torch.arange(slots_per_rank).repeat(num_ranks) < rules.primary_rows
    neighbours = torch.arange(num_slots).view(num_ranks, -1).repeat_interleave(slots_per_rank, 0)
    energy = _energy(rough, copies, state, num_ranks)
    for step in range(_STEPS):
        heat = _HOT * (_COLD / _HOT) ** (step / _STEPS)
        one, two, new = (each[step][:, None, None].expand(-1, num_layers, 1) for each in draws)
        exchange = (exchanges[step] < 0.5)[:, None, None]
        here, there = state.gather(2, one), state.gather(2, two)
        coming = torch.where(exchange, there, new)
        with_one, with_two = (
            state.gather(2, neighbours[each[step]][:, None].expand(-1, num_layers, -1)) for each in draws[:2]
        )
        kept_apart, taken = (primary[one] != primary[two]), primary[one] | (copies.gather(2, here) == 1)
        barred = torch.where(exchange, kept_apart | (with_two == here).any(2, keepdim=True), taken)
        barred |= (one == two) | (with_one == coming).any(2, keepdim=True)
        other = state.scatter(2, one, coming).scatter(2, two, torch.where(exchange, here, there))
        change = (~exchange).long().expand_as(here)
        recounted = copies.scatter_add(2, coming, change).scatter_add(2, here, -change)
        changed = _energy(rough, recounted, other, num_ranks)
        accepted = ((energy - changed) / heat).exp() > chances[step][:, None]
        accepted &= ~barred[..., 0]
        state = torch.where(accepted[..., None], other, state)
        copies = torch.where(accepted[..., None], recounted, copies)
        energy = torch.where(accepted, changed, energy)
        if (step + 1) % _STEPS_PER_DESCENT == 0:
            ends = descend(many.float(), state.view(-1, num_ranks, slots_per_rank), rules, _DESCENT)
            peak, which = _peak(many, ends, rules).view(_CHAINS, num_layers).min(0)
            ends = ends.view(_CHAINS, num_layers, num_ranks, slots_per_rank)[which, torch.arange(num_layers)]
            better = peak < lowest
            best[better], lowest[better] = ends[better], peak[better]
    return best


def _starts(loads: Tensor, plan: Tensor, rules: MoveRules, generator: torch.Generator) -> list[Tensor]:
    """The plan of each chain; where there are primaries, all start from the same."""
    starts = []
    for chain in range(_CHAINS):
        noise = torch.randn(loads.shape[1], generator=generator, dtype=loads.dtype) * (_NOISE * (chain + 1) / _CHAINS)
        noisy = chain % 2 and not rules.primary_rows
        starts.append(fresh_start(loads * noise.exp(), *plan.shape[1:]) if noisy else plan)
    return starts


def _peak(loads: Tensor, plan: Tensor, rules: MoveRules) -> Tensor:
    return rules.slot_loads(loads, plan).sum(2).amax(1)


def _energy(loads: Tensor, copies: Tensor, state: Tensor, num_ranks: int) -> Tensor:
    """The norm of the ranks' loads, `[chains, L]`, scaled by the largest so that fp32 holds their powers.

    Where a move is barred an expert may have no copy left; what comes of it is not used.
    """
    load = (loads / copies).gather(2, state).unflatten(2, (num_ranks, -1)).sum(3)
    top = load.amax(2, keepdim=True)
    return top[..., 0] * (load / top).pow_(_NORM).mean(2).pow_(1 / _NORM)
