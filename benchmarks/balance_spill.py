"""Plans of relief within a step: how long they take to make, how level the ranks come out, what must be moved for it.

    python -m benchmarks.balance_spill [--rounds 200] [--write]

64 ranks, 256 experts, 8,192 routes per rank, drawn by Zipf's law; on one thread. Placements: contiguous, with the
popular experts anywhere; and 5 slots per rank planned on another popularity (a plan that has gone stale). `spill` has
as many borrowed slots as always suffice. Beside each plan the time of what a step needs with it: the split to start
from and the table by which 4,096 tokens of 8 routes find their slots.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.results_file import spread, write_results
from crossdock.balance import (
    SpillLimits,
    assign,
    assignment,
    borrowed_slots_needed,
    choose,
    copy_table,
    even_pieces,
    level,
    spill,
)
from crossdock.routing import draw_zipf

RANKS, EXPERTS, ROUTES = 64, 256, 8192
GOAL_MILLISECONDS = 2.0
LAWS = (1.0, 1.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/balance_spill_DATE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for law in LAWS:
        for name, slots in (("contiguous", _contiguous()), ("stale plan", _stale(law))):
            rows += measure(law, name, slots, arguments.rounds)
    if arguments.write:
        print(write_results("balance_spill", ["torch", "crossdock"], rows))
    return 0


def measure(law: float, placement: str, slots: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Rows of all methods on as many different counts."""
    held = slots.shape[1]
    counts = [_counts(law, seed) for seed in range(rounds)]
    limits = {
        "spill, memory bound": SpillLimits(borrowed_slots_needed(held, RANKS), memory_bound=True),
        "spill, 1 borrowed slot": SpillLimits(1, memory_bound=True),
    }
    plans: dict[str, Callable[[Tensor], Tensor]] = {
        "even": lambda step: even_pieces(step, slots).amounts,
        "level": lambda step: level(step, slots).amounts,
    }
    starts = [even_pieces(step, slots) for step in counts]
    rows = []
    for name, plan in plans.items():
        milliseconds, results = _time(plan, counts)
        rows.append(_row(law, placement, name, milliseconds, [_imbalance(result.sum(dim=1)) for result in results]))
    for name, limit in limits.items():
        milliseconds, results = _time(
            lambda pair, limit=limit: spill(pair[0], slots, pair[1], limit), zip(counts, starts, strict=True)
        )
        row = _row(law, placement, name, milliseconds, [_imbalance(plan.after) for plan in results])
        row["max_mean_before"] = round(statistics.median(_imbalance(plan.before) for plan in results), 3)
        row["experts_borrowed"] = statistics.median(int((plan.borrowed >= 0).sum()) for plan in results)
        row["goal"] = GOAL_MILLISECONDS
        row["met"] = row["figure"] <= GOAL_MILLISECONDS
        rows.append(row)
    plan = spill(counts[0], slots, starts[0], limits["spill, memory bound"])
    ids = draw_zipf(4096, EXPERTS, 8, law, 0, torch.device("cpu"))
    table = assignment(counts[0], plan.pieces, 0)
    copies = copy_table(slots, held, 0)
    for name, call in {
        "assignment": lambda _: assignment(counts[0], plan.pieces, 0),
        "assign": lambda _: assign(ids, table),
        "choose": lambda _: choose(ids, copies, 0),
    }.items():
        rows.append(_row(law, placement, name, _time(call, range(rounds))[0], None))
    for row in rows:
        print(row["case"], f"{row['figure']} ms", {key: row[key] for key in row if "mean" in key or "experts" in key})
    return rows


def _row(
    law: float, placement: str, name: str, milliseconds: list[float], levels: list[float] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case": f"{name}; {RANKS} ranks, {EXPERTS} experts, Zipf({law}), {placement}",
        "figure": round(statistics.median(milliseconds), 3),
        "unit": "ms",
        "spread": spread(milliseconds),
    }
    if levels is not None:
        row |= {"max_mean": round(statistics.median(levels), 4), "max_mean_worst": round(max(levels), 4)}
    return row


def _time(call: Callable[[Any], Any], inputs: Any) -> tuple[list[float], list[Any]]:
    """Milliseconds of every call, and what it gave."""
    taken, results = [], []
    gc.disable()
    for each in inputs:
        started = time.perf_counter()
        results.append(call(each))
        taken.append(1000 * (time.perf_counter() - started))
    gc.enable()
    return taken, results


def _counts(law: float, seed: int) -> Tensor:
    """`[R, E]`: a popularity of its own, drawn on every rank."""
    share = _popularity(law, seed).expand(RANKS, -1)
    drawn = torch.multinomial(share, ROUTES, replacement=True, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(RANKS, EXPERTS, dtype=torch.int64).scatter_add_(1, drawn, torch.ones_like(drawn))


def _popularity(law: float, seed: int) -> Tensor:
    share = torch.arange(1, EXPERTS + 1, dtype=torch.float64) ** -law
    return share[torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(seed))]


def _contiguous() -> Tensor:
    return torch.arange(EXPERTS).view(RANKS, -1)


def _stale(law: float) -> Tensor:
    """5 slots per rank for a popularity that none of the counts has: copies for what was popular, packed greedily."""
    loads = _popularity(law, 10**6).tolist()
    copies = [1] * EXPERTS
    slots_per_rank = EXPERTS // RANKS + 1
    for _ in range(RANKS * slots_per_rank - EXPERTS):
        copies[max(range(EXPERTS), key=lambda expert: loads[expert] / copies[expert])] += 1
    items = sorted(
        (expert for expert, number in enumerate(copies) for _ in range(number)),
        key=lambda expert: -loads[expert] / copies[expert],
    )
    ranks: list[list[int]] = [[] for _ in range(RANKS)]
    carried = [0.0] * RANKS
    for expert in items:
        open_ranks = [rank for rank in range(RANKS) if len(ranks[rank]) < slots_per_rank]
        lightest = min(open_ranks, key=lambda rank: (expert in ranks[rank], carried[rank]))
        ranks[lightest].append(expert)
        carried[lightest] += loads[expert] / copies[expert]
    return torch.tensor(ranks)


def _imbalance(loads: Tensor) -> float:
    return float(loads.max() / loads.double().mean())


if __name__ == "__main__":
    sys.exit(main())
