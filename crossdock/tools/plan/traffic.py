"""What a rank sends in a step, by kind: by formulas, or as dry runs have counted it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from crossdock.config import Config
from crossdock.parallel import ParallelDims
from crossdock.tools.plan.counting import Counted, Sent
from crossdock.tools.plan.devices import Device
from crossdock.tools.plan.flows import Flow, exchanges, ring, spans
from crossdock.tools.plan.model import BlockFacts, ModelFacts
from crossdock.tools.plan.sizes import local_tokens, over_blocks, slots_per_rank, trained_parameters, value_sizes

__all__ = ["counted_flows", "edge_seconds", "formula_flows"]

EXCHANGE, GATHER, REDUCTION, REPLICAS = "expert exchange", "parameter gather", "gradient reduction", "replica sums"
TENSOR, CONTEXT, PIPELINE, NUMBERS = "tensor parallel", "context parallel", "pipeline", "norm and metrics"

_ORDER = (EXCHANGE, GATHER, REDUCTION, REPLICAS, TENSOR, CONTEXT, PIPELINE, NUMBERS)
# Whose bytes are of one kind, whatever the operation.
_OF_DIMENSIONS = {
    "dp_replicate": REPLICAS,
    "ep_replicate": REPLICAS,
    "tp": TENSOR,
    "cp": CONTEXT,
    "sequence": CONTEXT,
    "pp": PIPELINE,
    "stage": NUMBERS,
    "world": NUMBERS,
}


def formula_flows(
    config: Config, dims: ParallelDims, facts: ModelFacts, device: Device, exchange: Flow, micro_batches: int
) -> dict[str, Flow]:
    """All of a step, of the rank of the stage with most blocks.

    Args:
        config: of the run.
        dims: its layout.
        facts: of the model.
        device: of the table.
        exchange: of `expert_flow`.
        micro_batches: of a step.
    """
    wide, item = value_sizes(config)
    span = spans(dims)
    blocks = over_blocks(facts, dims)
    full = config.activation_checkpoint.mode == "full"
    reshards = config.parallelism.reshards
    per_step = dims.pp > 1 and not reshards
    # What is outside blocks stays gathered from the forward pass to the end of the backward one.
    of_ends = 1 if per_step else micro_batches
    gathers = of_ends * (2 if reshards else 1)
    by_step = dims.pp > 1 or config.parallelism.gradient_reduction == "step"
    reductions = 1 if by_step else micro_batches
    reduced = 4 if item < wide else wide
    ends = (facts.embedding + facts.head + facts.ends_rest) / dims.tp / min(dims.pp, 2)

    def over_all(name: str, of: Callable[[BlockFacts], tuple[float, float]], nbytes: int) -> Flow:
        """Of these parameters of all blocks once, dense ones and experts', with so many bytes each."""
        total = Flow(name, 0.0, 0.0, 0.0, 0)
        for kind in facts.kinds:
            for dimension, parameters in zip(("fsdp", "ep_shard"), of(kind), strict=True):
                if parameters:
                    each = ring(name, span[dimension], parameters * nbytes, device)
                    total = total.plus(each.times(kind.count / dims.pp))
        return total

    def gathered(kind: BlockFacts) -> tuple[float, float]:
        return kind.matrices / dims.tp + kind.rest, slots_per_rank(facts, dims) * kind.slot

    def trained(kind: BlockFacts) -> tuple[float, float]:
        return trained_parameters(kind, facts, dims)

    gather = over_all(GATHER, gathered, item).times(gathers)
    gather = gather.plus(ring(GATHER, span["fsdp"], ends * item, device).times(of_ends))
    trained_ends = ends if facts.trains_ends else 0.0
    reduce = over_all(REDUCTION, trained, reduced)
    if trained_ends:
        reduce = reduce.plus(ring(REDUCTION, span["fsdp"], trained_ends * reduced, device))
    local = (blocks(lambda kind: trained(kind)[0]) + trained_ends) / (dims.dp_shard * dims.cp)
    local_experts = blocks(lambda kind: trained(kind)[1]) / dims.ep_shard
    replicas = ring(REPLICAS, span["dp_replicate"], 2 * local * reduced, device)
    replicas = replicas.plus(ring(REPLICAS, span["ep_replicate"], 2 * local_experts * wide, device))
    layers = facts.num_moe_layers / dims.pp
    hidden = local_tokens(config, dims) * facts.hidden_size * item
    tensor = ring(TENSOR, span["tp"], hidden * dims.tp, device)
    heads = (2 * facts.num_heads + 2 * facts.num_key_value_heads) * facts.head_dim * item
    context = ring(CONTEXT, span["cp"], heads * local_tokens(config, dims), device)
    times = micro_batches * facts.num_layers / dims.pp
    found = [
        exchange.times(micro_batches * layers * sum(exchanges(config))),
        gather,
        reduce.times(reductions),
        replicas,
        tensor.times(times * (6 if full else 4)),
        context.times(times * (3 if full else 2)),
        _pipeline(2.0 * hidden * micro_batches, 2 * micro_batches, dims, device),
    ]
    return {flow.name: flow for flow in found if flow.calls}


def _pipeline(nbytes: float, calls: int, dims: ParallelDims, device: Device) -> Flow:
    if dims.pp == 1:
        return Flow(PIPELINE, 0.0, 0.0, 0.0, 0)
    inside = spans(dims)["pp"].in_node(device.node_size) > 1
    here, there = (nbytes, 0.0) if inside else (0.0, nbytes)
    return Flow(PIPELINE, here, there, device.seconds(here, there, 0, calls), calls)


def edge_seconds(config: Config, dims: ParallelDims, facts: ModelFacts, device: Device) -> float:
    """What no compute hides: the first gather of a step and the last reduction, of the ends and of one block."""
    span = spans(dims)
    wide, item = value_sizes(config)
    reduced = 4 if item < wide else wide
    kind = facts.kinds[0]
    ends = (facts.embedding + facts.head) / dims.tp
    seconds = ring("", span["fsdp"], ends * (item + reduced), device).seconds
    seconds += ring("", span["fsdp"], (kind.matrices / dims.tp + kind.rest) * (item + reduced), device).seconds
    experts = slots_per_rank(facts, dims) * kind.slot * (item + reduced)
    return seconds + ring("", span["ep_shard"], experts, device).seconds


def counted_flows(
    formulas: Mapping[str, Flow], one: Counted, two: Counted, micro_batches: int, rank: int, device: Device
) -> dict[str, Flow]:
    """The bytes of a step that dry runs have counted, all of them; times are the formulas' where there are such.

    Args:
        formulas: of `formula_flows`.
        one: what was counted of a step of one micro-batch.
        two: of a step of two; each further one adds what the second does.
        micro_batches: of the step.
        rank: whose bytes these are.
        device: whose nodes these are.
    """
    first, second = (_by_kind(counted, rank, device) for counted in (one, two))
    flows = {}
    for name in sorted(first | second, key=_ORDER.index):
        before, after = (each.get(name, Flow(name, 0.0, 0.0, 0.0, 0)) for each in (first, second))
        total = before.plus(after.plus(before.times(-1)).times(micro_batches - 1))
        if total.nvlink or total.network:
            flows[name] = replace(total, seconds=formulas[name].seconds) if name in formulas else total
    return flows


def _by_kind(counted: Counted, rank: int, device: Device) -> dict[str, Flow]:
    flows: dict[str, Flow] = {}
    for (operation, dimension), sent in counted.sent.items():
        flow = _on_links(_kind(operation, dimension), sent, rank, device)
        flows[flow.name] = flows[flow.name].plus(flow) if flow.name in flows else flow
    return flows


def _kind(operation: str, dimension: str) -> str:
    if dimension in ("fsdp", "ep_shard"):
        return GATHER if "allgather" in operation else REDUCTION if "reduce_scatter" in operation else NUMBERS
    # Groups without a name are parts of `ep`, as dispatchers make them.
    return _OF_DIMENSIONS.get(dimension, EXCHANGE)


def _on_links(name: str, sent: Sent, rank: int, device: Device) -> Flow:
    """By whether the rank that gets the bytes is on the same node; rings as `ring` has them."""
    nodes = [other // device.node_size for other in sent.ranks]
    own = rank // device.node_size
    inside = nodes.count(own)
    network = 0.0 if inside == len(nodes) else float(sent.in_ring) / inside
    nvlink = sent.in_ring - network if inside > 1 else 0.0
    for node, nbytes in zip(nodes, sent.to_ranks, strict=False):
        here = node == own
        nvlink, network = nvlink + here * nbytes, network + (not here) * nbytes
    hops = sent.calls * (inside > 1), sent.calls * (inside < len(nodes))
    return Flow(name, nvlink, network, device.seconds(nvlink, network, *hops), sent.calls)
