"""Random moves for plans so small that exchanges alone end in poor ones."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.placement.descent import MoveRules, descend
from crossdock.placement.start import fresh_start

__all__ = ["SMALL", "annealed"]

SMALL = 24
"""Slots of a layer up to which annealing is worth its time."""

_CHAINS = 64
_STEPS = 400
_STEPS_PER_DESCENT = 50
_HOT, _COLD = 0.1, 0.005  # in units of the mean load
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
    num_experts = loads.shape[1]
    generator = torch.Generator().manual_seed(0)
    apart = rules.kept_apart(slots_per_rank)

    def draw(end: int) -> Tensor:
        return torch.randint(end, (_CHAINS,), generator=generator).repeat_interleave(num_layers)

    def chance() -> Tensor:
        return torch.rand(_CHAINS, generator=generator).repeat_interleave(num_layers)

    best, lowest = plan.clone(), _peak(loads, plan, rules)
    state, many = torch.cat(_starts(loads, plan, rules, generator)), loads.repeat(_CHAINS, 1)
    rough, row = many.float(), torch.arange(len(state))
    energy = _energy(rough, state, rules)
    for step in range(_STEPS):
        heat = _HOT * (_COLD / _HOT) ** (step / _STEPS)
        first, one, second, two = draw(num_ranks), draw(slots_per_rank), draw(num_ranks), draw(slots_per_rank)
        new, exchanges = draw(num_experts), chance() < 0.5
        here, there = state[row, first, one], state[row, second, two]
        fits = (state[row, second] != here[:, None]).all(1) & (state[row, first] != there[:, None]).all(1)
        if apart is not None:
            fits &= ~apart[one, two]
        spare = ((state == here[:, None, None]).flatten(1).sum(1) > 1) & (one >= rules.primary_rows)
        spare &= (state[row, first] != new[:, None]).all(1)
        other = state.clone()
        other[row, first, one] = torch.where(exchanges, torch.where(fits, there, here), torch.where(spare, new, here))
        other[row, second, two] = torch.where(exchanges & fits, here, other[row, second, two])
        changed = _energy(rough, other, rules)
        accepted = ((energy - changed) / heat).exp() > chance()
        state = torch.where(accepted[:, None, None], other, state)
        energy = torch.where(accepted, changed, energy)
        if (step + 1) % _STEPS_PER_DESCENT == 0:
            ends = descend(rough, state, rules, _DESCENT)
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


def _energy(loads: Tensor, plan: Tensor, rules: MoveRules) -> Tensor:
    """Of the ranks' loads, scaled by the largest so that fp32 holds their powers."""
    load = rules.slot_loads(loads, plan).sum(2)
    top = load.amax(1, keepdim=True).clamp_min(torch.finfo(load.dtype).tiny)
    return top[:, 0] * ((load / top) ** _NORM).mean(1) ** (1 / _NORM)
