"""The bench as text, for a terminal."""

from __future__ import annotations

from crossdock.tools.bench.outcome import Bench, Outcome
from crossdock.tools.report.numbers import size

__all__ = ["bench_table", "milliseconds", "rows", "subject"]

HEAD = ("case", "within nodes", "between nodes", "metadata", "of plain", "ms", "of plain", "busiest rank")


def subject(bench: Bench) -> str:
    """What was moved and computed, in a sentence."""
    work = bench.workload
    nodes = f"{work.num_nodes} nodes of {work.ranks_per_node}" if work.num_nodes > 1 else "one node"
    return (
        f"One MoE layer, forward and backward: {work.num_experts:,} experts, top {work.top_k}, hidden size "
        f"{work.hidden_size:,}, inner size {work.intermediate_size:,}, {str(work.dtype).removeprefix('torch.')}; "
        f"{work.tokens:,} tokens on each of {work.num_ranks:,} ranks ({nodes}); routes {work.skew}."
    )


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def rows(bench: Bench) -> list[tuple[str, ...]]:
    """A row per case, as `HEAD` has it."""
    return [_row(outcome, bench) for outcome in bench.outcomes]


def _row(outcome: Outcome, bench: Bench) -> tuple[str, ...]:
    sent, plain = (each.traffic.within + each.traffic.between for each in (outcome, bench.plain))
    traffic = outcome.traffic
    of_time = outcome.spread[1] if outcome.spread is not None else outcome.seconds / bench.plain.seconds
    return (
        outcome.case.name,
        *(size(number) for number in (traffic.within, traffic.between, traffic.metadata)),
        f"{sent / plain:.3f}" if plain else "",
        milliseconds(outcome.seconds),
        f"{of_time:.3f}",
        f"{outcome.busiest:.3f}",
    )


def bench_table(bench: Bench) -> str:
    """All of it, with what the columns are."""
    table = [HEAD, *rows(bench)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    lines = []
    for row in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]))
    below = "Bytes are of all ranks, to other ranks alone; times of the slowest rank; the busiest rank over the mean."
    moved = next((outcome.moves for outcome in bench.outcomes if outcome.moves is not None), None)
    if moved is not None:
        below += f" To place experts, {moved.experts:,} have to be fetched once, {size(moved.bytes)} of weights."
    return "\n".join([subject(bench), *bench.facts, "", *lines, "", below, ""])
