"""Dispatch and combine over gloo processes, forward and backward, beside transformers' and torchtitan's all-to-all.

    python -m benchmarks.dispatch [--rounds 9] [--ranks 2 4] [--write]

Experts are the identity, so that only moving tokens is measured: the output is `x` times the sum of its routes'
weights, and `x` and the weights get gradients. All take turns in the same processes of one thread each, on the same
tokens and routes; a ratio is taken within a round, of the slowest rank's time. Results must agree. Bytes are counted
as each collective is called, to other ranks only, forward and backward.

torchtitan is left out where it is not installed: `pip install --no-deps torchtitan==0.3.0 spmd_types triton einops tyro
typeguard docstring_parser`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed.expert_parallel import AllToAllEP

from benchmarks.results_file import result_row, spread, write_results
from crossdock.dispatch import build_dispatcher
from crossdock.routing import draw_zipf

SHAPES: dict[str, dict[str, int]] = {
    "K8": {"E": 128, "K": 8, "H": 1024, "T": 2048},
    "K4": {"E": 32, "K": 4, "H": 1024, "T": 4096},
}
GOALS = {"K8": 0.40}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
OURS = "alltoall"
OURS_TOO = (OURS, "allgather")
PEERS = ("transformers", "torchtitan") if find_spec("torchtitan") else ("transformers",)

# x [T, H], ids [T, K], weights [T, K] -> [T, H]
Move = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/dispatch_DATE.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for ranks in arguments.ranks:
        for shape in arguments.shapes:
            for dtype in arguments.dtypes:
                rows += compare(ranks, shape, dtype, arguments.rounds)
                if arguments.write:
                    write_results("dispatch", ["torch", "transformers", "torchtitan", "crossdock"], rows)
    return 0 if all(row["results_agree"] for row in rows) else 1


def compare(num_ranks: int, shape: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Run all in turn on new processes, print, and return a row for ours beside each peer."""
    case = f"{shape} {SHAPES[shape]}, {dtype}, {num_ranks} ranks"
    print(f"\n{case}", flush=True)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, num_ranks, folder, SHAPES[shape], dtype, rounds, theirs)
            processes.append(context.Process(target=_measure, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        measured = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join(timeout=20)
            process.kill()
    names = (*OURS_TOO, *PEERS)
    seconds = {name: [max(times) for times in zip(*(m.seconds[name] for m in measured), strict=True)] for name in names}
    megabytes = {name: sum(m.sent[name] for m in measured) / num_ranks / 1e6 for name in names}
    differences = {name: max(m.differences[name] for m in measured) for name in names}
    best = min(PEERS, key=lambda name: statistics.median(seconds[name]))
    rows = []
    for name in names:
        ratios = spread([own / theirs for own, theirs in zip(seconds[OURS], seconds[name], strict=True)])
        milliseconds = 1000 * statistics.median(seconds[name])
        agree = differences[name] <= TOLERANCE[dtype]
        print(
            f"{name:>12}: {milliseconds:8.1f} ms  {megabytes[name]:7.1f} MB sent per rank  ours over its time "
            f"{ratios['median']:.3f} ({ratios['low']:.3f} to {ratios['high']:.3f})"
            + ("" if agree else f"  RESULTS DIFFER by {differences[name]:.1e}"),
            flush=True,
        )
        if name == OURS:
            continue
        own, taken = ([1000 * each for each in seconds[which]] for which in (OURS, name))
        goal = GOALS.get(shape) if name == best else None
        row = result_row(case, "ms", own, name, taken, ratios, agree=agree, goal=goal, at_most=True)
        rows.append(row | {"megabytes": round(megabytes[OURS], 2), "peer_megabytes": round(megabytes[name], 2)})
    return rows


def _measure(
    rank: int, num_ranks: int, folder: str, sizes: dict[str, int], dtype: str, rounds: int, pipe: Connection
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    generator = torch.Generator().manual_seed(rank)
    num_tokens, hidden = sizes["T"], sizes["H"]
    x = torch.randn(num_tokens, hidden, generator=generator).to(getattr(torch, dtype)).requires_grad_()
    ids = draw_zipf(num_tokens, sizes["E"], sizes["K"], 0.0, rank, torch.device("cpu"))
    weights = torch.rand(num_tokens, sizes["K"], generator=generator).requires_grad_()
    grad = torch.randn(num_tokens, hidden, generator=generator).to(x.dtype)
    moves = {name: _MOVES[name](name, num_ranks, sizes["E"], sizes["K"]) for name in (*OURS_TOO, *PEERS)}

    def run(name: str) -> list[Tensor]:
        out = moves[name](x, ids, weights)
        return [out, *torch.autograd.grad(out, (x, weights), grad)]

    total = weights.detach().double().sum(dim=1, keepdim=True)
    along = (x.detach().double() * grad.double()).sum(dim=1, keepdim=True).expand_as(weights)
    expected = [x.detach().double() * total, grad.double() * total, along]
    sent, differences = {}, {}
    for name in moves:
        run(name)
        with _SentBytes(rank) as counter:
            results = run(name)
        sent[name] = counter.total
        pairs = zip(results, expected, strict=True)
        differences[name] = max(((a.detach() - b).norm() / b.norm()).item() for a, b in pairs)
    seconds: dict[str, list[float]] = {name: [] for name in moves}
    names = list(moves)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier()
            started = time.perf_counter()
            run(name)
            seconds[name].append(time.perf_counter() - started)
    pipe.send(SimpleNamespace(seconds=seconds, sent=sent, differences=differences))
    dist.barrier()
    dist.destroy_process_group()


def _ours(name: str, num_ranks: int, num_experts: int, top_k: int) -> Move:
    dispatcher = build_dispatcher(name, dist.group.WORLD, num_experts // num_ranks)  # type: ignore[arg-type]

    def move(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        arrived = dispatcher.dispatch(x, ids, weights).wait()
        y = (arrived.tokens * arrived.weights.sum(dim=1, keepdim=True)).to(x.dtype)
        return dispatcher.combine(y, arrived.handle).wait()

    return move


def _transformers(name: str, num_ranks: int, num_experts: int, top_k: int) -> Move:
    def identity(tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return tokens

    experts: Any = nn.Module()
    experts.forward, experts.num_experts = identity, num_experts // num_ranks
    mesh = init_device_mesh("cpu", (num_ranks, 1), mesh_dim_names=("ep", "tp"))
    parallel = AllToAllEP(experts, mesh["ep"], mesh["tp"])
    # Weights of fp32 promote its output; its experts' output has the activations' dtype.
    return lambda x, ids, weights: parallel(x, ids, weights).to(x.dtype)


def _torchtitan(name: str, num_ranks: int, num_experts: int, top_k: int) -> Move:
    from torchtitan.distributed.utils import set_spmd_backend  # type: ignore[import-not-found]
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher  # type: ignore[import-not-found]

    set_spmd_backend("default")  # torch's functional collectives, as in its models without its own type checker
    dispatcher = AllToAllTokenDispatcher(AllToAllTokenDispatcher.Config(num_experts=num_experts, top_k=top_k))
    dispatcher.wire_meshes(ep_mesh=init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("ep",)))

    def move(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = torch.bincount(ids.flatten(), minlength=num_experts)
        rows, _, metadata = dispatcher.dispatch(x, weights, ids, counts)
        return dispatcher.combine(rows, metadata, x)

    return move


_MOVES: dict[str, Callable[[str, int, int, int], Move]] = {
    "alltoall": _ours,
    "allgather": _ours,
    "transformers": _transformers,
    "torchtitan": _torchtitan,
}


class _SentBytes(TorchDispatchMode):
    """Bytes that all-to-alls called within it send to other ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.total = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self._count(args[0], args[2])
        elif func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.total += (args[1] - 1) * args[0].numel() * args[0].dtype.itemsize
        elif func is torch.ops.c10d.alltoall_base_.default:
            self._count(args[1], args[4])
        return func(*args, **(kwargs or {}))

    def _count(self, rows: Tensor, splits: list[int]) -> None:
        splits = list(splits) or [len(rows) // dist.get_world_size()] * dist.get_world_size()
        per_row = rows.numel() // max(len(rows), 1) * rows.dtype.itemsize
        self.total += (sum(splits) - splits[self.rank]) * per_row


if __name__ == "__main__":
    sys.exit(main())
