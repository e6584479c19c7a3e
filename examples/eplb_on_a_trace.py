"""What balancing would have gained on a recorded trace of loads: EPLB and crossdock's planner, beside no plan.

    python examples/eplb_on_a_trace.py [RUN] [--ranks 8] [--redundant 8] [--every 20]

RUN is the folder of a run, whose expert_load.bin has the routes of every step, layer and expert; without one, a trace
with a Zipf law that drifts stands in. Every plan is made from the steps before it and judged on those after it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from crossdock.placement import PLANNERS, PlanningSituation, max_mean
from crossdock.tools.report import LOAD_FILE, LoadFileError, read_load


def made_up(steps: int, layers: int, experts: int) -> Tensor:
    """Routes `[S, L, E]`: the popular experts are others every now and then."""
    torch.manual_seed(0)
    popularity = 1 / torch.arange(1, experts + 1) ** 1.0
    orders = torch.stack([torch.randperm(experts) for _ in range(layers)])
    trace = []
    for step in range(steps):
        if step % 60 == 0:
            orders = orders.roll(experts // 8, dims=1)
        trace.append(torch.poisson(4096 * (popularity / popularity.sum())[orders]))
    return torch.stack(trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--redundant", type=int, default=8, help="slots more than there are experts")
    parser.add_argument("--every", type=int, default=20, help="steps between plans")
    parsed = parser.parse_args()
    if parsed.run is None:
        trace = made_up(steps=120, layers=4, experts=64)
    else:
        try:
            trace = torch.from_numpy(read_load(parsed.run / LOAD_FILE)[1].copy())
        except (LoadFileError, OSError) as error:
            parser.error(f"RUN = {parsed.run}: {error}")
    steps, layers, experts = trace.shape
    if min(parsed.ranks, parsed.every, parsed.redundant + 1) < 1:
        parser.error("--ranks and --every must be 1 or more, --redundant 0 or more")
    if (experts + parsed.redundant) % parsed.ranks or experts % parsed.ranks or steps <= parsed.every:
        parser.error(f"{experts} experts, and with --redundant, must divide over --ranks; {steps} steps, --every less")
    situation = PlanningSituation(num_ranks=parsed.ranks, slots_per_rank=(experts + parsed.redundant) // parsed.ranks)
    without = PlanningSituation(num_ranks=parsed.ranks, slots_per_rank=experts // parsed.ranks)
    as_they_are = torch.arange(experts).view(1, parsed.ranks, -1).expand(layers, -1, -1)
    found: dict[str, list[Tensor]] = {"no plan": [], **{name: [] for name in PLANNERS}}
    plans: dict[str, Tensor] = {}
    for start in range(parsed.every, steps, parsed.every):
        before, after = trace[start - parsed.every : start].sum(0), trace[start : start + parsed.every]
        for name, planner in PLANNERS.items():
            plans[name] = planner(before, situation, plans.get(name))
        for step in after:
            found["no plan"].append(max_mean(step, as_they_are, without))
            for name, plan in plans.items():
                found[name].append(max_mean(step, plan, situation))
    print(
        f"{steps} steps, {layers} layers, {experts} experts on {parsed.ranks} ranks, planned every {parsed.every} steps"
    )
    for name, ratios in found.items():
        per_step = torch.stack(ratios)
        print(f"{name:10s} busiest rank / mean: {per_step.mean():.3f} on average, {per_step.max():.3f} at worst")


if __name__ == "__main__":
    main()
