"""How much of a model and of its tokens a rank has, by a layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from crossdock.balance import copies_per_rank
from crossdock.config import Config, default_global_batch_size
from crossdock.parallel import ParallelDims
from crossdock.tools.plan.model import BlockFacts, ModelFacts

__all__ = [
    "copies_bytes",
    "end_parameters",
    "gathered_parameters",
    "local_parameters",
    "local_tokens",
    "num_micro_batches",
    "over_blocks",
    "slots_per_rank",
    "trained_locally",
    "trained_parameters",
    "value_sizes",
]


def over_blocks(facts: ModelFacts, dims: ParallelDims) -> Callable[[Callable[[BlockFacts], float]], float]:
    """The sum over the blocks of a stage, of as many as the largest has."""
    largest = -(-facts.num_layers // dims.pp)
    share = largest / facts.num_layers
    return lambda of: share * sum(kind.count * of(kind) for kind in facts.kinds)


def slots_per_rank(facts: ModelFacts, dims: ParallelDims) -> int:
    """Experts of a layer whose parameters a rank has, of the rank with most."""
    return -(-facts.num_experts // dims.ep)


def trained_locally(kind: BlockFacts, facts: ModelFacts, dims: ParallelDims) -> float:
    """Of these, those that have gradients and a state of the optimizer on this rank."""
    dense, experts = trained_parameters(kind, facts, dims)
    return dense / (dims.dp_shard * dims.cp) + experts / dims.ep_shard


def local_parameters(kind: BlockFacts, facts: ModelFacts, dims: ParallelDims) -> float:
    """Of a block, those that a rank keeps."""
    fsdp = dims.dp_shard * dims.cp
    return (kind.matrices / dims.tp + kind.rest) / fsdp + slots_per_rank(facts, dims) * kind.slot / dims.ep_shard


def gathered_parameters(kind: BlockFacts, facts: ModelFacts, dims: ParallelDims) -> float:
    """Of a block, those that a rank computes with."""
    return kind.matrices / dims.tp + kind.rest + slots_per_rank(facts, dims) * kind.slot


def copies_bytes(config: Config, facts: ModelFacts, dims: ParallelDims) -> float:
    """Of the copies of experts that `[balance]` lets a rank hold, as many as it may: values of all layers, kept from
    step to step, and of one layer the gradients, which return to the primaries, as they leave and as they arrive.
    """
    slots = copies_per_rank(config.balance, dims.ep) if dims.ep > 1 else 0
    item = value_sizes(config)[1]
    kept = over_blocks(facts, dims)(lambda kind: kind.slot)
    return slots * item * (kept + 2 * max(kind.slot - kind.frozen_slot for kind in facts.kinds))


def trained_parameters(kind: BlockFacts, facts: ModelFacts, dims: ParallelDims) -> tuple[float, float]:
    """Of a block, those that a rank has gradients of before they are reduced: dense ones, and its experts'."""
    dense = kind.matrices / dims.tp + kind.rest - kind.frozen  # `tp` splits no model of which matrices are frozen
    return dense, slots_per_rank(facts, dims) * (kind.slot - kind.frozen_slot)


def end_parameters(facts: ModelFacts, dims: ParallelDims, stage: int) -> float:
    """Parameters of embedding, norm and head that a stage has."""
    first = facts.embedding if stage == 0 else 0
    last = (facts.head + facts.ends_rest) if stage == dims.pp - 1 else 0
    return first + last


def local_tokens(config: Config, dims: ParallelDims) -> int:
    """Tokens of a micro-batch that one rank has between the modules that `tp` splits."""
    return config.training.local_batch_size * config.training.seq_len // (dims.cp * dims.tp)


def num_micro_batches(config: Config, dims: ParallelDims) -> int:
    """Of a step."""
    total = config.training.global_batch_size
    if total == -1:
        total = default_global_batch_size(config, dims)
    return max(1, total // (config.training.local_batch_size * dims.dp_replicate * dims.dp_shard))


def value_sizes(config: Config) -> tuple[int, int]:
    """Bytes of a parameter that is kept, and of one that is computed with."""
    dtype = getattr(torch, config.training.dtype)
    return (8 if dtype == torch.float64 else 4), dtype.itemsize
