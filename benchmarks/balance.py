"""A training step under skewed routing: each strategy of `[balance]` beside none.

    python -m benchmarks.balance [--ranks 4 2] [--rounds 7] [--steps 2] [--write]
    python -m benchmarks.balance --planner [--rounds 11] [--only TEXT] [--write]

Two MoE layers and AdamW on gloo processes of one thread. Each process holds a model for every strategy, from the same
weights, and takes the same steps with them in turn; losses must agree. Routing is forced: Zipf(1.2) with popularity
that falls with the expert's index, so that the popular experts share a rank; the same shuffled; and uniform, where
relief has nothing to do and shall cost nothing. The time of a step is the slowest rank's: wall time where there is a
core for every rank, else CPU time, which other ranks on the same core do not lengthen. A ratio is taken within a round.

With `--planner`, quality and time of the planner beside DeepSeek's method (`benchmarks/balance_planner.py`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks.balance_planner import compare_planners
from benchmarks.results_file import spread, write_results
from crossdock.balance import BalanceConfig, Balancer
from crossdock.moe import MoE, finish_step
from crossdock.moe_config import MoEConfig
from crossdock.parallel import GradientManager, ParallelDims, parallelize
from crossdock.routing import RouterConfig

HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 256, 512, 32, 4, 512
GOAL, MOST_OVERHEAD = 1.3, 1.02
NONE = "none"
STRATEGIES = (NONE, "eplb", "spill", "eplb+spill", "auto")
ROUTINGS: dict[str, dict[str, Any]] = {
    "Zipf(1.2), popular experts on one rank": {"debug_force_zipf": 1.2},
    "Zipf(1.2), shuffled": {"debug_force_zipf": 1.2, "debug_force_zipf_seed": 0},
    "uniform": {"debug_force_zipf": 0.0},
}
WARM_UP_STEPS = 12
TOLERANCE = 1e-5


class Block(nn.Module):
    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.moe = MoE(HIDDEN, INNER, RouterConfig(EXPERTS, TOP_K), config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Layers(nn.Module):
    """MoE layers with residuals."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(config) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Run:
    """Training with one strategy."""

    def __init__(self, strategy: str, routing: dict[str, Any]) -> None:
        torch.manual_seed(0)
        model = Layers(MoEConfig(**routing))
        meshes = ParallelDims(dist.get_world_size(), ep=dist.get_world_size()).build_mesh("cpu")
        self.model = parallelize(model, meshes)
        self.gradients = GradientManager(model, meshes)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        # Placements are looked at while everything warms up, and again only after the run.
        config: Any = {} if strategy == NONE else {"rebalance_interval": 4, "load_decay": 0.5}
        if strategy == "spill":
            config = {}
        self.balancer = Balancer(model, BalanceConfig(strategy=strategy, **config), optimizer=self.optimizer)  # type: ignore[arg-type]
        self.x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step(self) -> tuple[float, float, dict[str, Any]]:
        """Seconds of this rank, its loss, and the metrics of balance."""
        clock = time.perf_counter if dist.get_world_size() <= len(os.sched_getaffinity(0)) else time.process_time
        dist.barrier()
        started = clock()
        self.gradients.before_backward(is_last=True)
        loss = (self.model(self.x) - 1).square().sum() / (TOKENS * HIDDEN * dist.get_world_size())
        loss.backward()
        self.gradients.clip(1.0)
        self.optimizer.step()
        load = finish_step(self.model, dist.group.WORLD)
        metrics, _ = self.balancer.after_step(load)
        self.optimizer.zero_grad()
        return clock() - started, loss.item(), metrics


def work(
    rank: int, world_size: int, store: str, routing: dict[str, Any], rounds: int, steps: int, results: Any
) -> None:
    """All rounds on one rank; the first rank puts the slowest rank's seconds, losses and max/mean in `results`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    runs = {strategy: Run(strategy, routing) for strategy in STRATEGIES}
    for run in runs.values():
        for _ in range(WARM_UP_STEPS):
            run.step()
        # What the steps that are measured would do every so often, they do not.
        run.balancer.after_step = _only_watch(run.balancer)  # type: ignore[method-assign]
    seconds: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    losses: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    uneven: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    for number in range(rounds):
        turn = number % len(STRATEGIES)
        for strategy in STRATEGIES[turn:] + STRATEGIES[:turn]:
            taken = 0.0
            for _ in range(steps):
                own, loss, metrics = runs[strategy].step()
                sums, most = torch.tensor([loss, own], dtype=torch.float64), torch.tensor([own], dtype=torch.float64)
                dist.all_reduce(sums)
                dist.all_reduce(most, dist.ReduceOp.MAX)
                taken += most.item()
                losses[strategy].append(sums[0].item())
                uneven[strategy].append(metrics["rank_max_mean"])
            seconds[strategy].append(taken / steps)
    if rank == 0:
        results.put((seconds, losses, uneven))
    dist.barrier()
    dist.destroy_process_group()


def _only_watch(balancer: Balancer) -> Any:
    def after_step(load: Any, gathered: Any = None) -> tuple[dict[str, Any], list[str]]:
        loads = balancer.gather(load)[:-4].view(-1, balancer.num_ranks + 1)
        seen = balancer.monitor.update(load, loads)
        return seen.metrics(balancer.num_ranks), []

    return after_step


def compare(world_size: int, name: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Run all strategies in turn under one routing; prints and returns a row for each but `none`."""
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, str(Path(folder, "store")), ROUTINGS[name], rounds, steps, results)
        team = mp.start_processes(work, arguments, world_size, join=False, start_method="spawn")
        assert team is not None
        while results.empty():
            team.join(timeout=1)  # Raises where a rank has failed.
        seconds, losses, uneven = results.get()
        while not team.join():
            pass
    cores = len(os.sched_getaffinity(0))
    clock = "wall time" if world_size <= cores else "CPU time of the slowest rank"
    rows = []
    print(f"\n{name}, ep {world_size}: ms per step, {clock}", flush=True)
    print(f"  {NONE:12} {1000 * statistics.median(seconds[NONE]):8.1f}  max/mean {_mean(uneven[NONE]):.3f}")
    for strategy in STRATEGIES[1:]:
        ratios = spread([none / own for none, own in zip(seconds[NONE], seconds[strategy], strict=True)])
        agree = all(
            abs(own - none) <= TOLERANCE * abs(none) for own, none in zip(losses[strategy], losses[NONE], strict=True)
        )
        figure, peer = (1000 * statistics.median(seconds[each]) for each in (strategy, NONE))
        row: dict[str, Any] = {
            "case": f"{name}, ep {world_size}, {strategy}",
            "figure": round(figure, 1),
            "unit": f"ms per step, {clock}",
            "peer": NONE,
            "peer_figure": round(peer, 1),
            "ratio": ratios["median"],
            "spread": ratios,
            "losses_agree": agree,
            "max_mean": round(_mean(uneven[strategy]), 3),
            "peer_max_mean": round(_mean(uneven[NONE]), 3),
        }
        if name == "uniform":
            goal = round(1 / MOST_OVERHEAD, 4)
            row |= {"goal": goal, "met": agree and ratios["median"] >= goal}
        elif world_size == 4 and name.endswith("one rank"):
            row |= {"goal": GOAL, "met": agree and ratios["median"] >= GOAL}
        rows.append(row)
        wrong = "" if agree else "  LOSSES DIFFER"
        between = f"{ratios['low']:.3f} to {ratios['high']:.3f}"
        print(
            f"  {strategy:12} {figure:8.1f}  max/mean {row['max_mean']:.3f}  {ratios['median']:.3f} times as fast "
            f"({between}){wrong}",
            flush=True,
        )
    return rows


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--planner", action="store_true", help="the planner beside DeepSeek's method")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--only", default="", help="of the planner's cases those whose name has this text")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/balance_DATE.json")
    arguments = parser.parse_args()
    if arguments.planner:
        return compare_planners(arguments.rounds, arguments.write, arguments.only)
    rows = []
    for world_size in arguments.ranks:
        for name in arguments.routings:
            rows += compare(world_size, name, arguments.rounds, arguments.steps)
            if arguments.write:
                print(write_results("balance", ["torch", "crossdock"], rows))
    return 0 if all(row["losses_agree"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
