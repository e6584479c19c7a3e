"""The experts of one MoE layer, forward and backward, beside transformers' and the bound of the products alone.

    python -m benchmarks.moe_layer [--rounds 9] [--threads 1 2] [--dtypes float32 bfloat16] [--write]

All take turns in one process on the same tokens, routes, weights and output gradient; a ratio is taken within a round.
Outputs and gradients must agree with ours; torchtitan's products are in bfloat16 in all cases, and its results held to
that. The bound is the same products as per-expert `mm(out=)` into buffers that are there: 2 forward, 4 backward. A
processor without bfloat16 products gets its bound from float32 ones. The process has the environment of `crossdock
train` (`memory_settings`), for all alike. GPUs: `benchmarks/expert_kernels.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.results_file import result_row, spread, write_results
from crossdock.experts import EXPERTS_BACKENDS, ExpertParams
from crossdock.experts.cpu import product_dtype
from crossdock.routing import draw_zipf
from crossdock.train.host_memory import memory_settings

SHAPES: dict[str, dict[str, int]] = {
    "E32": {"E": 32, "H": 512, "I": 256, "K": 4, "T": 4096},
    "E128": {"E": 128, "H": 1024, "I": 384, "K": 8, "T": 4096},
    "E8": {"E": 8, "H": 512, "I": 1792, "K": 2, "T": 4096},
}
GOALS = {"float32": {"E8": 0.95}, "bfloat16": {"E8": 0.88}}
GOAL = {"float32": 0.90, "bfloat16": 0.75}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
OURS, TORCHTITAN = "crossdock", "torchtitan"

Run = Callable[[], list[Tensor]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--routings", nargs="+", choices=("even", "zipf"), default=["even", "zipf"])
    parser.add_argument("--backend", choices=EXPERTS_BACKENDS, default="cpu")
    parser.add_argument(
        "--peers", nargs="*", choices=("grouped_mm", "eager", TORCHTITAN), help="all that run well here"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/moe_layer_DATE.json")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in memory_settings().items()):
        # Read when memory is first taken: too late for this process.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.moe_layer", *sys.argv[1:]],
            {**os.environ, **memory_settings()},
        )
    rows: list[dict[str, Any]] = []
    peers = _peers() if arguments.peers is None else arguments.peers
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in arguments.shapes:
            for dtype in arguments.dtypes:
                for routing in arguments.routings:
                    case = f"{shape} {SHAPES[shape]}, {dtype}, {routing} routing, {threads} threads"
                    runs = make_runs(SHAPES[shape], getattr(torch, dtype), routing, arguments.backend, peers)
                    rows += compare(case, shape, dtype, runs, arguments.rounds)
                    if arguments.write:
                        write_results("moe_layer", ["torch", "transformers", "torchtitan", "crossdock"], rows)
    return 0 if all(row["results_agree"] for row in rows) else 1


def make_runs(
    sizes: dict[str, int], dtype: torch.dtype, routing: str, backend: str, peers: list[str]
) -> dict[str, Run]:
    """The bound, ours and the peers by name; each run returns output and gradients (the bound: nothing)."""
    torch.manual_seed(0)
    num_experts, hidden, inner, top_k, num_tokens = (sizes[name] for name in ("E", "H", "I", "K", "T"))
    x = torch.randn(num_tokens, hidden, dtype=dtype, requires_grad=True)
    weights = torch.rand(num_tokens, top_k, requires_grad=True)
    exponent = 1.0 if routing == "zipf" else 0.0
    ids = draw_zipf(num_tokens, num_experts, top_k, exponent, 0, torch.device("cpu"))
    gate_and_up = (torch.randn(num_experts, hidden, 2 * inner) * hidden**-0.5).to(dtype).requires_grad_()
    down = (torch.randn(num_experts, inner, hidden) * inner**-0.5).to(dtype).requires_grad_()
    grad = torch.randn(num_tokens, hidden, dtype=dtype)

    def ours() -> list[Tensor]:
        y = EXPERTS_BACKENDS[backend](x, ids, weights, ExpertParams(gate_and_up, down))
        return [y, *torch.autograd.grad(y, (x, weights, gate_and_up, down), grad)]

    config = SimpleNamespace(
        num_experts=num_experts,
        num_local_experts=num_experts,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    experts: Any = Qwen3MoeExperts(config)  # type: ignore[arg-type]
    experts.gate_up_proj = nn.Parameter(gate_and_up.detach().mT.contiguous())
    experts.down_proj = nn.Parameter(down.detach().mT.contiguous())

    def peer(name: str) -> Run:
        def run() -> list[Tensor]:
            config._experts_implementation = name
            y = experts(x, ids, weights)
            grads = torch.autograd.grad(y, (x, weights, experts.gate_up_proj, experts.down_proj), grad)
            return [y, grads[0], grads[1], grads[2].mT, grads[3].mT]

        return run

    runs = {"bound": bound(ids, gate_and_up, down), OURS: ours}
    for name in peers:
        runs[name] = _torchtitan(x, ids, weights, gate_and_up, down, grad) if name == TORCHTITAN else peer(name)
    return runs


def _peers() -> list[str]:
    """Those that are installed and run well; torchtitan's products are in bfloat16, whatever the parameters are."""
    names = ["grouped_mm", "eager"]
    in_bf16 = product_dtype(torch.bfloat16) == torch.bfloat16
    return [*names, TORCHTITAN] if in_bf16 and find_spec("torchtitan") else names


def _torchtitan(x: Tensor, ids: Tensor, weights: Tensor, gate_and_up: Tensor, down: Tensor, grad: Tensor) -> Run:
    """torchtitan's experts between its local dispatcher's two halves: the layer but for its router."""
    from torchtitan.models.common.moe import GroupedExperts  # type: ignore[import-not-found]
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # type: ignore[import-not-found]

    num_experts, inner, hidden = down.shape
    experts = GroupedExperts(GroupedExperts.Config(dim=hidden, hidden_dim=inner, num_experts=num_experts))
    gate, up = gate_and_up.detach().chunk(2, dim=2)
    for name, parameter in (("w1_EFD", gate), ("w3_EFD", up), ("w2_EDF", down.detach())):
        setattr(experts, name, nn.Parameter(parameter.mT.contiguous()))
    dispatcher = LocalTokenDispatcher(LocalTokenDispatcher.Config(num_experts=num_experts, top_k=ids.shape[1]))
    params = [experts.w1_EFD, experts.w3_EFD, experts.w2_EDF]

    def run() -> list[Tensor]:
        counts = torch.bincount(ids.flatten(), minlength=num_experts)
        rows, counts, metadata = dispatcher.dispatch(x, weights, ids, counts)
        y = dispatcher.combine(experts(rows, counts), metadata, x)
        grad_x, grad_weights, *of_params = torch.autograd.grad(y, (x, weights, *params), grad)
        gate, up, down = (each.mT for each in of_params)
        return [y, grad_x, grad_weights, torch.cat([gate, up], dim=2), down]

    return run


def bound(ids: Tensor, gate_and_up: Tensor, down: Tensor) -> Run:
    """Per-expert products alone, into buffers."""
    dtype = product_dtype(down.dtype)
    counts = torch.bincount(ids.flatten(), minlength=len(down)).tolist()
    inner, hidden = down.shape[1:]
    up_weights, down_weights = gate_and_up.detach().to(dtype), down.detach().to(dtype)
    up_grads, down_grads = torch.empty_like(up_weights), torch.empty_like(down_weights)
    widths = (hidden, 2 * inner, inner, hidden)
    x, pre, h, out = (torch.randn(max(counts), width).to(dtype) for width in widths)

    def run() -> list[Tensor]:
        for expert, n in enumerate(counts):
            torch.mm(x[:n], up_weights[expert], out=pre[:n])
            torch.mm(h[:n], down_weights[expert], out=out[:n])
        for expert, n in enumerate(counts):
            torch.mm(out[:n], down_weights[expert].t(), out=h[:n])
            torch.mm(pre[:n], up_weights[expert].t(), out=x[:n])
            torch.mm(x[:n].t(), pre[:n], out=up_grads[expert])
            torch.mm(h[:n].t(), out[:n], out=down_grads[expert])
            # Products of products grow: start from small values again.
            for buffer in (x, pre, h, out):
                buffer[:1].fill_(1e-3)
        return []

    return run


def compare(case: str, shape: str, dtype: str, runs: dict[str, Run], rounds: int) -> list[dict[str, Any]]:
    """Run all in turn, print, and return a row for ours beside each other."""
    print(f"\n{case}", flush=True)
    ours = [tensor.detach().double() for tensor in runs[OURS]()]
    differences = {}
    for name, run in runs.items():
        theirs = run()
        pairs = zip(ours, theirs, strict=False)
        differences[name] = max(((a - b.detach()).norm() / a.norm() for a, b in pairs), default=torch.zeros(())).item()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, taken in seconds.items():
        ratios = spread([theirs / own for theirs, own in zip(taken, seconds[OURS], strict=True)])
        milliseconds = 1000 * statistics.median(taken)
        agree = differences[name] <= TOLERANCE["bfloat16" if name == TORCHTITAN else dtype]
        goal = GOALS[dtype].get(shape, GOAL[dtype]) if name == "bound" else 1.0
        print(
            f"{name:>12}: {milliseconds:9.1f} ms  its time over ours {ratios['median']:.3f} ({ratios['low']:.3f} to "
            f"{ratios['high']:.3f})" + ("" if agree else f"  RESULTS DIFFER by {differences[name]:.1e}"),
            flush=True,
        )
        if name == OURS:
            continue
        own, taken = ([1000 * each for each in seconds[which]] for which in (OURS, name))
        rows.append(result_row(case, "ms", own, name, taken, ratios, agree=agree, goal=goal))
    return rows


if __name__ == "__main__":
    sys.exit(main())
