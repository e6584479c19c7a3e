"""Which dispatcher, in how many chunks: what was asked for, or a rule that says what it picked and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crossdock.dispatch.deepep import deepep_problem
from crossdock.dispatch.nodes import Nodes, find_nodes
from crossdock.dispatch.options import DispatchOptions

__all__ = ["AUTO_DISPATCHER", "LOCAL_PLAN", "DispatchPlan", "DispatchSituation", "plan_dispatch"]

AUTO_DISPATCHER = "auto"
"""The value of `dispatcher` that leaves the choice to `plan_dispatch`."""

# A second hop costs a kernel's start and a copy of the rows: not for a few per cent of the slow link's bytes.
_HIERARCHY_PAYS = 1.5
# What a rank sends per exchange, from which on half of it takes longer than what a further exchange costs to start.
_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class DispatchSituation:
    """What the rule looks at.

    Attributes:
        num_ranks: `R`.
        num_experts: `E`.
        top_k: `K`.
        hidden_size: `H`.
        dtype: of activations.
        device: where tokens are.
        tokens_per_rank: `T`, of a forward pass; `None` where it is not known.
        ranks: of the group, in the world; 0 to `R - 1` if `None`.
        elsewhere: it is planned for a device that this machine may not have.
    """

    num_ranks: int
    num_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    tokens_per_rank: int | None = None
    ranks: tuple[int, ...] | None = None
    elsewhere: bool = False

    def nodes(self, options: DispatchOptions) -> Nodes:
        return find_nodes(self.ranks or range(self.num_ranks), options.ranks_per_node)


@dataclass(frozen=True)
class DispatchPlan:
    """How a layer's tokens travel.

    Attributes:
        dispatcher: of `DISPATCHERS`.
        overlap_chunks: parts of a rank's tokens, one of which travels while experts compute another.
        reason: why, in words.
    """

    dispatcher: str
    overlap_chunks: int
    reason: str

    def __str__(self) -> str:
        chunks = "1 chunk" if self.overlap_chunks == 1 else f"{self.overlap_chunks} chunks"
        return f"{self.dispatcher}, {chunks}: {self.reason}"


LOCAL_PLAN = DispatchPlan("local", 1, "one rank holds all experts")
"""The only plan for one rank."""


def plan_dispatch(
    name: str, overlap_chunks: int, situation: DispatchSituation, options: DispatchOptions
) -> DispatchPlan:
    """What is set, and the rule for what is not. The wire is never chosen: a lossy one changes results.

    Args:
        name: of `DISPATCHERS`, or `auto`.
        overlap_chunks: 0 for the rule's.
        situation: alike on all ranks.
        options: nodes; static shapes, which only all-gathers have.
    """
    if situation.num_ranks == 1:
        return LOCAL_PLAN
    if name == AUTO_DISPATCHER:
        dispatcher, reason = _dispatcher(situation, options)
    elif name == "hierarchical" and situation.nodes(options).size in (1, situation.num_ranks):
        dispatcher, reason = (
            "alltoall",
            "hierarchical as set, but there is one node, or one rank in each; ranks_per_node",
        )
    else:
        dispatcher, reason = name, "as set"
    if overlap_chunks:
        return DispatchPlan(dispatcher, overlap_chunks, reason)
    chunks, why = _chunks(situation)
    return DispatchPlan(dispatcher, chunks, f"{reason}; {why}")


def _dispatcher(situation: DispatchSituation, options: DispatchOptions) -> tuple[str, str]:
    ranks, node = situation.num_ranks, situation.nodes(options).size
    if options.static_shapes:
        return "alltoall", "static_shapes makes it an all-gather"
    if situation.device.type == "cuda" and options.wire.dtype == "same":
        slots = -(-situation.num_experts // ranks)
        problem = deepep_problem(ranks, slots, situation.hidden_size, situation.top_k, situation.dtype, options.deepep)
        if problem is None:
            return "deepep", "its library is installed and takes these sizes"
        without = f", without deepep ({problem})"
        if situation.elsewhere:
            without = f", without deepep (here: {problem}; moe.dispatcher = deepep plans with it)"
    else:
        without = ""
    if node in (None, 1, ranks):
        where = "all ranks are one node" if node == ranks else f"{ranks} ranks are not nodes of several ranks each"
        return "alltoall", f"{where}{without}"
    # Of rows that uniform routing sends between nodes: one per other rank that a token needs, against one per node.
    plain = (ranks - node) * _needed(ranks, situation.top_k)
    by_node = (ranks // node - 1) * _needed(ranks // node, situation.top_k)
    saving = f"a token needs {plain:.1f} ranks on other nodes, and {by_node:.1f} other nodes{without}"
    return ("hierarchical" if plain >= _HIERARCHY_PAYS * by_node else "alltoall"), saving


def _chunks(situation: DispatchSituation) -> tuple[int, str]:
    if situation.device.type == "cpu":
        return 1, "on a CPU, exchanges and experts share the cores"
    if situation.tokens_per_rank is None:
        return 1, "the number of tokens is not known"
    ranks = situation.num_ranks
    rows = situation.tokens_per_rank * (ranks - 1) * _needed(ranks, situation.top_k)
    sent = rows * situation.hidden_size * situation.dtype.itemsize
    chunks = 2 if sent >= _CHUNK_BYTES else 1
    return chunks, f"a rank sends about {sent / 2**20:.0f} MiB"


def _needed(places: int, top_k: int) -> float:
    """The probability that a token needs one of so many places that hold as many experts each."""
    return 1 - (1 - 1 / places) ** top_k
