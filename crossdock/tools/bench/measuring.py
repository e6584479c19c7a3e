"""Cases run on this machine's ranks: real dispatchers, real experts, forward and backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.dispatch import Dispatcher, DispatchOptions, Nodes, Traffic, build_dispatcher
from crossdock.experts import GroupedExperts
from crossdock.tools.bench.cases import Case, bench_cases
from crossdock.tools.bench.outcome import Bench, BenchError, Outcome, Segment
from crossdock.tools.bench.placing import Placed, place
from crossdock.tools.bench.plain import PlainDispatcher
from crossdock.tools.bench.workload import Workload

__all__ = ["BenchLayer", "bench_layers", "measure"]

# Of results that need not be equal bit by bit: sums of another order. A narrower wire has an error of its own.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
_OF_FP8 = 0.3


class BenchLayer:
    """One case on this rank.

    Args:
        case: which.
        workload: of all ranks.
        placed: its routes.
        experts: of this rank's slots.
        device: of this rank.
    """

    def __init__(
        self, case: Case, workload: Workload, placed: Placed, experts: GroupedExperts, device: torch.device
    ) -> None:
        self.case, self.experts, self.device = case, experts, device
        rank = dist.get_rank()
        self.computed = int((placed.ranks == rank).sum())
        group = dist.group.WORLD
        assert group is not None
        self.dispatcher: Dispatcher
        if case.dispatcher == "plain":
            nodes = Nodes.consecutive(workload.num_ranks, workload.ranks_per_node)
            self.dispatcher = PlainDispatcher(group, placed.slots_per_rank, nodes)
        else:
            options = DispatchOptions(workload.ranks_per_node, case.wire, overlap_chunks=case.chunks)
            self.dispatcher = build_dispatcher(case.dispatcher, group, placed.slots_per_rank, options)
        self.slots = torch.from_numpy(placed.slots[rank]).to(device)

    def run(self, x: Tensor, weights: Tensor, note: Callable[[int], None] = lambda _: None) -> Tensor:
        """A forward pass of tokens `x` `[T, H]` with `weights` `[T, K]`; `note` is told as each part ends."""
        parts = zip(*(each.tensor_split(self.case.chunks) for each in (x, self.slots, weights)), strict=True)
        returning = []
        for pending in [self.dispatcher.dispatch(*part) for part in parts]:
            arrived = pending.wait()
            note(0)
            y = self.experts(arrived.tokens, arrived.slot_ids, arrived.weights)
            note(1)
            returning.append(self.dispatcher.combine(y, arrived.handle))
        out = torch.cat([pending.wait() for pending in returning])
        note(2)
        return out


def measure(workload: Workload, device: torch.device, rounds: int, facts: list[str]) -> Bench:
    """Run all cases in turn, `rounds` times, on the ranks of the default process group. Collective.

    Raises:
        BenchError: on all ranks, where the results of a case are not those of the plain all-to-all.
    """
    routes = workload.draw()
    placed = {balanced: place(workload, routes, balanced=balanced) for balanced in (False, True)}
    layers = bench_layers(workload, placed, device)
    generator = torch.Generator().manual_seed(workload.seed + 1 + dist.get_rank())
    shape = (workload.tokens, workload.hidden_size)
    x, grad = (torch.randn(shape, generator=generator).to(device, workload.dtype) for _ in range(2))
    weights = torch.full((workload.tokens, workload.top_k), 1 / workload.top_k, device=device)
    wrong = _check(layers, x, weights)
    if wrong:
        raise BenchError(f"results differ from those of the plain all-to-all: {wrong}")
    seconds: list[list[float]] = [[] for _ in layers]
    sent: list[Traffic] = []
    for number in range(rounds):
        for index in range(len(layers)):
            turn = (index + number) % len(layers)
            seconds[turn].append(_time(layers[turn], x, weights, grad))
    for layer in layers:
        before = layer.dispatcher.traffic
        _time(layer, x, weights, grad)
        sent.append(_sum(layer.dispatcher.traffic - before, device))
    outcomes = []
    for layer, own, traffic in zip(layers, seconds, sent, strict=True):
        ratios = [one / plain for one, plain in zip(own, seconds[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
        computed = [int(number) for number in _gather([float(layer.computed)], device)[:, 0]]
        outcomes.append(
            Outcome(
                layer.case,
                traffic,
                statistics.median(own),
                max(computed) * len(computed) / sum(computed),
                _timeline(layer, x, weights),
                (low, middle, high),
                placed[layer.case.balanced].moves,
            )
        )
    return Bench(workload, outcomes, facts, measured=True)


def bench_layers(workload: Workload, placed: Mapping[bool, Placed], device: torch.device) -> list[BenchLayer]:
    """All cases on this rank; those with the same places share their experts. Collective.

    Args:
        workload: of all ranks.
        placed: by whether experts are balanced.
        device: of this rank.
    """
    experts = {balanced: _experts(workload, own, device) for balanced, own in placed.items()}
    return [
        BenchLayer(case, workload, placed[case.balanced], experts[case.balanced], device)
        for case in bench_cases(workload)
    ]


@torch.no_grad()
def _experts(workload: Workload, placed: Placed, device: torch.device) -> GroupedExperts:
    """This rank's. An expert has the same weights wherever it is."""
    with torch.device("meta"):
        experts = GroupedExperts(placed.slots_per_rank, workload.hidden_size, workload.intermediate_size)
    experts = experts.to(workload.dtype).to_empty(device=device)
    experts.is_whole = False
    for row, expert in enumerate(placed.experts[dist.get_rank()].tolist()):
        generator = torch.Generator(device).manual_seed(workload.seed + 1 + expert)
        for parameter in experts.parameters():
            parameter[row].normal_(std=0.02, generator=generator)
    return experts


def _check(layers: list[BenchLayer], x: Tensor, weights: Tensor) -> str:
    """Which cases give other results than the first, on any rank."""
    wrong = []
    with torch.no_grad():
        expected = layers[0].run(x, weights).float()
        for layer in layers[1:]:
            out = layer.run(x, weights).float()
            error = float((out - expected).norm() / expected.norm().clamp_min(1e-30))
            limit = _OF_FP8 if layer.case.wire.dtype != "same" else _TOLERANCE[x.dtype]
            largest = max(row[0] for row in _gather([error], x.device).tolist())
            if not largest < limit:
                wrong.append(f"{layer.case.name}, by {largest:.2g} of them")
    return "; ".join(wrong)


def _time(layer: BenchLayer, x: Tensor, weights: Tensor, grad: Tensor) -> float:
    """Seconds of a forward and a backward pass on the slowest rank."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    started = _together(layer.device)
    layer.run(x, weights).backward(grad)
    _wait(layer.device)
    elapsed = time.perf_counter() - started
    layer.experts.zero_grad(set_to_none=True)
    return float(_gather([elapsed], layer.device).max())


def _timeline(layer: BenchLayer, x: Tensor, weights: Tensor) -> dict[int, list[Segment]]:
    """Of one more forward pass, on all ranks; on a GPU each part is waited for, so that nothing overlaps there."""
    ends: list[tuple[int, float]] = []
    started = _together(layer.device)

    def note(part: int) -> None:
        _wait(layer.device)
        ends.append((part, time.perf_counter() - started))

    with torch.no_grad():
        layer.run(x, weights, note)
    rows = _gather([value for end in ends for value in end], layer.device).tolist()
    timeline = {}
    for rank, row in enumerate(rows):
        begin, segments = 0.0, []
        for part, end in zip(row[::2], row[1::2], strict=True):
            segments.append(Segment(int(part), begin, end))
            begin = end
        timeline[rank] = segments
    return timeline


def _together(device: torch.device) -> float:
    _wait(device)
    dist.barrier()
    return time.perf_counter()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sum(traffic: Traffic, device: torch.device) -> Traffic:
    sums = torch.tensor(astuple(traffic), dtype=torch.int64, device=device)
    dist.all_reduce(sums)
    return Traffic(*sums.tolist())


def _gather(values: list[float], device: torch.device) -> Tensor:
    """`[R, values]` of all ranks, on the CPU."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return torch.stack(everyone).cpu()
