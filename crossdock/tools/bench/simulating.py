"""The time that a case would take, computed from the bytes that were counted and speeds that are assumed.

A rank's exchange lasts as long as the fuller direction of its fuller link needs; a rank's chunks follow each other on
its link and on its processor; results can arrive once every rank has computed its part of them. Nothing else is
modelled: no congestion, no kernels that gather and sum, no dense layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossdock.tools.bench.cases import Case, bench_cases
from crossdock.tools.bench.counting import Counts, Hop, count
from crossdock.tools.bench.outcome import Bench, Moves, Outcome, Segment
from crossdock.tools.bench.placing import place
from crossdock.tools.bench.workload import Workload

__all__ = ["Speeds", "simulate"]

# Ranks that a timeline shows, evenly from the least to the most loaded.
_SHOWN = 16


@dataclass(frozen=True)
class Speeds:
    """Assumed, for every rank.

    Attributes:
        within, between: bytes per second and direction of the link to its node, and of that to other nodes.
        flops: that experts reach per second.
        latency: seconds that an exchange takes besides.
    """

    within: float = 450e9
    between: float = 50e9
    flops: float = 400e12
    latency: float = 20e-6

    def __str__(self) -> str:
        return (
            f"{self.within / 1e9:g} GB/s within a node and {self.between / 1e9:g} GB/s between nodes per rank and "
            f"direction, {self.flops / 1e12:g} TFLOP/s, {self.latency * 1e6:g} us per exchange"
        )


def simulate(workload: Workload, speeds: Speeds) -> Bench:
    """All cases, counted and timed by the model."""
    routes = workload.draw()
    placed = {balanced: place(workload, routes, balanced=balanced) for balanced in (False, True)}
    outcomes = [
        _outcome(case, workload, count(case, workload, placed[case.balanced]), speeds, placed[case.balanced].moves)
        for case in bench_cases(workload)
    ]
    facts = ["bytes are counted from drawn routes; nothing was sent", f"assumed, not measured: {speeds}"]
    return Bench(workload, outcomes, facts, measured=False)


def _outcome(case: Case, workload: Workload, counts: Counts, speeds: Speeds, moves: Moves | None) -> Outcome:
    there, back = (_exchange(counts.hops, row_bytes, speeds) for row_bytes in counts.row_bytes)
    # Two products of [H, 2I] and [I, H] for each route, two operations for each of a matrix's values.
    compute = counts.computed * 6.0 * workload.hidden_size * workload.intermediate_size / speeds.flops
    forward, timeline = _pass(there, compute, back, case.chunks, len(counts.hops) * speeds.latency)
    backward, _ = _pass(back, 2 * compute, back, case.chunks, len(counts.hops) * speeds.latency)
    order = np.argsort(counts.computed, kind="stable")
    few = order[np.unique(np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().astype(int))]
    shown = {int(rank): timeline[rank] for rank in sorted(few.tolist())}
    busiest = float(counts.computed.max() / counts.computed.mean())
    return Outcome(case, counts.traffic, forward + backward, busiest, shown, moves=moves)


def _exchange(hops: tuple[Hop, ...], row_bytes: int, speeds: Speeds) -> np.ndarray:
    """`[R]`: seconds of a rank's exchange, its hops one after another, without the latency."""
    rates = np.array([speeds.within, speeds.between])[:, None]
    return np.sum([(np.maximum(hop.sent, hop.received) * row_bytes / rates).max(axis=0) for hop in hops], axis=0)


def _pass(
    there: np.ndarray, compute: np.ndarray, back: np.ndarray, chunks: int, latency: float
) -> tuple[float, list[list[Segment]]]:
    """Seconds until the last rank has its results, and the parts of each rank, of times `[R]` of one pass."""
    link, processor = np.zeros(len(there)), np.zeros(len(there))
    arrivals: list[np.ndarray] = []
    timeline: list[list[Segment]] = [[] for _ in there]

    def note(part: int, begin: np.ndarray, end: np.ndarray) -> None:
        for segments, first, last in zip(timeline, begin.tolist(), end.tolist(), strict=True):
            segments.append(Segment(part, first, last))

    for _ in range(chunks):
        begin, link = link, link + there / chunks + latency
        note(0, begin, link)
        arrivals.append(link)
    for arrived in arrivals:
        begin = np.maximum(arrived, processor)
        processor = begin + compute / chunks
        note(1, begin, processor)
        # Whose results are waited for is known of all alone: every rank has routes to nearly every other.
        begin = np.full(len(there), np.maximum(processor, link).max())
        link = begin + back / chunks + latency
        note(2, begin, link)
    return float(link.max()), timeline
