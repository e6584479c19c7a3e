"""The planner beside DeepSeek's method: balance, and time on one core.

Both plan for the same loads in turn, other ones in each round; a ratio is taken within a round. Time is the process's
CPU time with one thread, so that others on the machine count less. `published loops` is the method as it was published,
in loops over layers and experts, whose plans must equal those of our vectorised one. The goal of balance is for layers
in which the peer's plan has no two copies of an expert on one rank; those in which it has are counted beside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results_file import result_row, spread, write_results
from crossdock.placement import PLANNERS, PlanningSituation, max_mean, plan_with_primaries

__all__ = ["compare_planners"]

OURS, PEER, LOOPS = "exchange", "deepseek", "published loops"
GOAL_MS = 150.0
KINDS = ("uniform", "zipf0.5", "zipf1", "zipf1.5", "log-normal")
HEADLINE = (58, 256, 64, 5)
"""Layers, experts, ranks and slots per rank: the size with a goal for time."""

SIZES = [HEADLINE, (58, 256, 32, 9), (58, 256, 8, 36), (26, 64, 8, 9), (48, 128, 16, 10), (61, 384, 64, 7)]


class Measured(NamedTuple):
    """CPU milliseconds and max/mean, over layers, of each round."""

    milliseconds: list[float]
    balance: list[float]


def compare_planners(rounds: int, write: bool, only: str = "") -> int:
    """Measure, print, and write `benchmarks/results/balance_DATE.json`; 0 where every goal is met.

    `only`: of all cases those whose name has it.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for sizes in SIZES:
        for kind in KINDS:
            if only not in _name(sizes, kind):
                continue
            rows += _compare(sizes, kind, rounds)
            if write:
                write_results("balance", ["torch", "crossdock"], rows)
    return 0 if all(row.get("met", True) for row in rows) else 1


def _name(sizes: tuple[int, int, int, int], kind: str) -> str:
    num_layers, num_experts, num_ranks, slots_per_rank = sizes
    return f"{num_layers} layers, {num_experts} experts, {num_ranks} ranks of {slots_per_rank} slots, {kind}"


def _compare(sizes: tuple[int, int, int, int], kind: str, rounds: int) -> list[dict[str, Any]]:
    num_layers, num_experts, num_ranks, slots_per_rank = sizes
    situation = PlanningSituation(num_ranks, slots_per_rank)
    generator = torch.Generator().manual_seed(0)
    measured = {name: Measured([], []) for name in (OURS, PEER, LOOPS, "again", "primaries")}
    agree, once, twice = True, [0.0], [0.0]
    for number in range(-1, rounds):  # one round to warm up
        loads = _loads(kind, num_layers, num_experts, generator)
        drifted = loads * (0.2 * torch.randn(loads.shape, generator=generator)).exp()
        current = PLANNERS[OURS](drifted, situation)
        calls: dict[str, Callable[[], Tensor]] = {
            OURS: lambda loads=loads: PLANNERS[OURS](loads, situation),
            PEER: lambda loads=loads: PLANNERS[PEER](loads, situation),
            "again": lambda loads=loads, current=current: PLANNERS[OURS](loads, situation, current),
            "primaries": lambda loads=loads: plan_with_primaries(PLANNERS[OURS], loads, situation),
        }
        if number < 3 and sizes == HEADLINE:  # slow
            calls[LOOPS] = lambda loads=loads: _published_loops(loads, situation)
        names = list(calls)
        plans = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            plans[name] = calls[name]()
            milliseconds = 1000 * (time.process_time() - start)
            if number >= 0:
                measured[name].milliseconds.append(milliseconds)
                measured[name].balance.append(max_mean(loads, plans[name], situation).mean().item())
        ratio = max_mean(loads, plans[OURS], situation) / max_mean(loads, plans[PEER], situation)
        in_order = plans[PEER].sort(dim=2).values
        double = (in_order[..., 1:] == in_order[..., :-1]).flatten(1).any(1)
        once += ratio[~double].tolist()
        twice += ratio[double].tolist()
        agree &= LOOPS not in plans or torch.equal(plans[LOOPS], plans[PEER])
    worst = {
        "worst_ratio": round(max(once), 6),
        "layers_with_double_copies": round((len(twice) - 1) / (len(once) + len(twice) - 2), 4),
        "worst_ratio_there": round(max(twice), 6),
    }
    return _rows(_name(sizes, kind), measured, agree, worst, sizes == HEADLINE)


def _rows(
    case: str, measured: dict[str, Measured], agree: bool, worst: dict[str, float], headline: bool
) -> list[dict[str, Any]]:
    ours, theirs = measured[OURS], measured[PEER]
    print(f"\n{case}")
    for name, each in measured.items():
        if each.milliseconds:
            balance, milliseconds = statistics.median(each.balance), spread(each.milliseconds)
            print(
                f"{name:>16}: max/mean {balance:.4f}, {milliseconds['median']:8.1f} ms "
                f"({milliseconds['low']:.1f} to {milliseconds['high']:.1f})",
                flush=True,
            )
    of_balance = [own / other for own, other in zip(ours.balance, theirs.balance, strict=True)]
    print(worst, flush=True)
    row = result_row(
        f"max/mean, {case}", "max/mean", ours.balance, PEER, theirs.balance, spread(of_balance), agree=True
    )
    row |= worst | {"goal": 1.0, "met": worst["worst_ratio"] <= 1.0}
    row |= {
        name: round(statistics.median(each.balance), 4) for name, each in (("figure", ours), ("peer_figure", theirs))
    }
    row["with_primaries"] = round(statistics.median(measured["primaries"].balance), 4)
    rows = [row]
    bound = [GOAL_MS] * len(ours.milliseconds)
    for what, peer, figures, goal in (
        ("time", "the goal", bound, 1.0 if headline else None),
        ("time", PEER, theirs.milliseconds, None),
        ("time", LOOPS, measured[LOOPS].milliseconds, None),
    ):
        own = ours.milliseconds[: len(figures)]
        if figures and (headline or peer == PEER):
            ratios = spread([one / other for one, other in zip(own, figures, strict=True)])
            rows.append(
                result_row(f"{what}, {case}", "ms", own, peer, figures, ratios, agree=agree, goal=goal, at_most=True)
            )
            rows[-1]["from_current_plan"] = round(statistics.median(measured["again"].milliseconds), 2)
    return rows


def _loads(kind: str, num_layers: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """`[L, E]` float64."""
    if kind == "uniform":
        return torch.rand(num_layers, num_experts, generator=generator, dtype=torch.float64)
    if kind == "log-normal":
        return torch.randn(num_layers, num_experts, generator=generator, dtype=torch.float64).exp()
    popularity = 1 / torch.arange(1, num_experts + 1, dtype=torch.float64) ** float(kind[4:])
    order = torch.rand(num_layers, num_experts, generator=generator).argsort(dim=1)
    # Counts of a million routes, so that layers differ in more than order.
    counts = torch.poisson((1e6 * popularity / popularity.sum()).repeat(num_layers, 1), generator=generator)
    return counts.gather(1, order)


def _published_loops(loads: Tensor, situation: PlanningSituation) -> Tensor:
    """The global form of DeepSeek's method as published, with its loop over layers and items."""
    num_layers, num_experts = loads.shape
    num_slots = situation.num_ranks * situation.slots_per_rank
    weight, layers = loads.float(), torch.arange(num_layers)
    slots = torch.arange(num_slots).repeat(num_layers, 1)
    copies = torch.ones_like(weight)
    for slot in range(num_experts, num_slots):
        heaviest = (weight / copies).max(dim=-1).indices
        slots[:, slot] = heaviest
        copies[layers, heaviest] += 1
    share = (weight / copies).gather(1, slots)
    order = share.sort(dim=-1, descending=True, stable=True).indices
    plan = torch.empty(num_layers, situation.num_ranks, situation.slots_per_rank, dtype=torch.int64)
    for layer in range(num_layers):
        weights = [torch.zeros(()) for _ in range(situation.num_ranks)]
        filled = [0] * situation.num_ranks
        for item in order[layer].tolist():
            free = (rank for rank in range(situation.num_ranks) if filled[rank] < situation.slots_per_rank)
            rank = min(free, key=weights.__getitem__)
            plan[layer, rank, filled[rank]] = slots[layer, item]
            weights[rank] = weights[rank] + share[layer, item]
            filled[rank] += 1
    return plan
