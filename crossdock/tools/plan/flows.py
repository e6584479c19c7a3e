"""Bytes that a rank sends in a step, by kind and by link: NVLink within a node, the network between nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from crossdock.config import Config
from crossdock.dispatch import DispatchPlan, DispatchSituation, plan_dispatch
from crossdock.parallel import ParallelDims
from crossdock.tools.plan.devices import Device
from crossdock.tools.plan.model import ModelFacts
from crossdock.tools.plan.routes import RankRoutes

__all__ = ["CPU", "Flow", "Span", "dispatch_plan", "exchanges", "expert_flow", "ring", "spans"]

CPU = "cpu"
"""The device of the table that stands for processes without a GPU."""


@dataclass(frozen=True)
class Flow:
    """What one kind of communication costs a rank in a step.

    Attributes:
        name: of the kind.
        nvlink, network: bytes that the rank sends on each kind of link.
        seconds: that it takes, if nothing else goes on.
        calls: collectives.
    """

    name: str
    nvlink: float
    network: float
    seconds: float
    calls: int = 1

    def times(self, count: float) -> Flow:
        """So many of them, one after another."""
        return Flow(
            self.name, self.nvlink * count, self.network * count, self.seconds * count, round(self.calls * count)
        )

    def plus(self, other: Flow) -> Flow:
        return Flow(
            self.name,
            self.nvlink + other.nvlink,
            self.network + other.network,
            self.seconds + other.seconds,
            self.calls + other.calls,
        )


@dataclass(frozen=True)
class Span:
    """The ranks of one dimension of a layout: `size` of them, `stride` apart."""

    size: int
    stride: int

    def in_node(self, node_size: int) -> int:
        """How many of them share a node."""
        if self.stride >= node_size:
            return 1
        return min(self.size, max(node_size // self.stride, 1))


def spans(dims: ParallelDims) -> dict[str, Span]:
    """The dimensions of a layout, dense and experts'."""
    fsdp = dims.dp_shard * dims.cp
    return {
        "tp": Span(dims.tp, 1),
        "cp": Span(dims.cp, dims.tp),
        "fsdp": Span(fsdp, dims.tp),
        "dp_replicate": Span(dims.dp_replicate, fsdp * dims.tp),
        "ep": Span(dims.ep, 1),
        "ep_shard": Span(dims.ep_shard, dims.ep),
        "ep_replicate": Span(dims.dp_replicate, dims.replica_size),
        "pp": Span(dims.pp, dims.world_size // dims.pp),
    }


def ring(name: str, span: Span, nbytes: float, device: Device) -> Flow:
    """Parts of `nbytes` in all, that every rank of `span` passes on to the next until all have been everywhere.

    A rank sends `(n - 1) / n` of them. Where `m` of the ranks share a node there are `m` rings, each over another
    network card: of what passes from node to node each of the `m` carries its share.
    """
    if span.size == 1:
        return Flow(name, 0.0, 0.0, 0.0, 0)
    inside = span.in_node(device.node_size)
    sent = nbytes * (span.size - 1) / span.size
    nodes = -(-span.size // inside)
    network = sent / inside if nodes > 1 else 0.0
    nvlink = sent if inside > 1 else 0.0
    hops = span.size - nodes if inside > 1 else 0
    seconds = device.seconds(nvlink, network, hops, nodes - 1)
    return Flow(name, nvlink - (network if inside > 1 else 0.0), network, seconds)


def dispatch_plan(config: Config, dims: ParallelDims, facts: ModelFacts, tokens: int, device: Device) -> DispatchPlan:
    """What training picks for the dispatcher and its chunks on such a device, by the same rule."""
    moe = config.moe
    situation = DispatchSituation(
        dims.ep,
        facts.num_experts,
        facts.top_k,
        facts.hidden_size,
        getattr(torch, config.training.dtype),
        torch.device("cpu" if device.name == CPU else "cuda"),
        tokens,
        elsewhere=True,
    )
    options = replace(moe.dispatch_options(), ranks_per_node=moe.ranks_per_node or device.node_size)
    return plan_dispatch(moe.dispatcher, moe.overlap_chunks, situation, options)


def exchanges(config: Config) -> tuple[int, int]:
    """How often a layer sends tokens in a micro-batch; and results, and the gradients of both.

    Recompute of whole blocks sends tokens again. It stops where nothing further is needed: before the results, unless
    a loss of the router is attached to them.
    """
    if config.activation_checkpoint.mode != "full":
        return 1, 3
    moe = config.moe
    losses = (
        moe.sequence_aux_loss_coeff,
        moe.batch_aux_loss_coeff,
        moe.global_aux_loss_coeff,
        moe.z_loss_coeff,
    )
    return 2, 4 if any(losses) else 3


def expert_flow(
    config: Config, dims: ParallelDims, facts: ModelFacts, routes: RankRoutes, device: Device, plan: DispatchPlan
) -> Flow:
    """One exchange of one layer, the mean of tokens, results and gradients of both, of all chunks together.

    All wait for the rank that gets most rows. Metadata, a few per cent, is not in it.
    """
    name = "expert exchange"
    if dims.ep == 1:
        return Flow(name, 0.0, 0.0, 0.0, 0)
    dtype, wire = getattr(torch, config.training.dtype), config.moe.dispatch_options().wire
    token, result = (each.row_bytes(facts.hidden_size, dtype) for each in (wire, wire.back))
    tokens, others = exchanges(config)
    row = (tokens * token + others * result) / (tokens + others)
    inside = spans(dims)["ep"].in_node(device.node_size)
    rows = (routes.tokens,) * dims.ep if plan.dispatcher == "allgather" else routes.rows
    # Every rank sends alike; what a rank keeps is its own share, so that the mean over ranks is taken.
    total = sum(rows)
    here, there = total * (inside - 1) / dims.ep, total * (dims.ep - inside) / dims.ep
    hops = 1
    if plan.dispatcher == "hierarchical":
        here, there, hops = *_two_hops(dims.ep, config.moe.ranks_per_node or inside, inside, routes), 2
    mean = total / len(rows)
    worst = max(rows) / mean if mean else 1.0
    chunks = plan.overlap_chunks
    seconds = device.seconds(
        here * row * worst,
        there * row * worst,
        chunks * hops * (here > 0),
        chunks * hops * (there > 0),
    )
    return Flow(name, here * row, there * row, seconds, chunks)


def _two_hops(ranks: int, group: int, inside: int, routes: RankRoutes) -> tuple[float, float]:
    """Rows on NVLink and on the network where a token goes once to each group, and from there to ranks of it.

    Args:
        ranks: `ep`.
        group: ranks of what the dispatcher takes for a node; divides `ranks`.
        inside: ranks that really share one.
        routes: of a rank's tokens.
    """
    groups = ranks // group
    near = max(inside // group, 1) - 1  # other groups on the same node
    first = sum(routes.node_rows(group)) / groups
    # Every group passes on what came to it: of each rank the rows for its members, as many as the rank's own.
    second = sum(routes.rows) * groups / ranks
    beside = min(group, inside) - 1  # other members on the same node
    return first * near + second * beside, first * (groups - 1 - near) + second * (group - 1 - beside)
