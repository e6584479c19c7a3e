"""Whether a model and a run fit the layout that is asked for."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from crossdock.balance import BalanceError, check_sizes
from crossdock.config.requirements import require
from crossdock.config.settings import Config, ConfigError
from crossdock.dispatch import find_nodes
from crossdock.models import (
    FAMILIES,
    ExpertSizes,
    UnknownAttention,
    accept_context_parallel,
    build_model,
    most_positions,
)
from crossdock.models.generic import Generic
from crossdock.parallel import (
    LayoutError,
    ParallelDims,
    check_heads,
    check_microbatches,
    cut_blocks,
    nearest,
    stages_per_rank,
)

__all__ = ["AUTO_BATCH", "check_layout", "check_ring", "expert_parallel_degrees"]

AUTO_BATCH = -1
"""Of `training.local_batch_size`: chosen when a run starts."""

_TP = "parallelism.tensor_parallel_degree"
_PP = "parallelism.pipeline_parallel_degree"


def check_layout(
    config: Config, dims: ParallelDims, model: PreTrainedConfig, ranks_per_machine: int, *, elsewhere: bool = False
) -> None:
    """Everything that depends on the number of ranks.

    Args:
        config: to check.
        dims: degrees that fit one another.
        model: its configuration.
        ranks_per_machine: see `validate`.
        elsewhere: see `check_settings`.

    Raises:
        ConfigError: with the rule that is broken and what would fit.
    """
    if dims.tp > 1:
        _check_tensor_parallel(config, dims, model)
    _check_experts(config, dims, model, ranks_per_machine)
    batch, total = config.training.local_batch_size, config.training.global_batch_size
    require(
        config,
        "training.local_batch_size",
        batch != AUTO_BATCH,
        "must be a number here: only train and plan choose one",
    )
    step = batch * dims.dp_replicate * dims.dp_shard
    valid = f"-1 or a multiple of {step} (local_batch_size {batch} x data-parallel ranks)"
    require(config, "training.global_batch_size", total == -1 or (total > 0 and total % step == 0), valid)
    if dims.cp > 1:
        _check_context(config, model, dims, elsewhere=elsewhere)
    if dims.pp > 1:
        _check_pipeline(config, dims, model)


def _check_experts(config: Config, dims: ParallelDims, model: PreTrainedConfig, ranks_per_machine: int) -> None:
    """What `ep` divides, and dispatchers that need a layout."""
    sizes = FAMILIES[config.model.name].expert_sizes(model)
    ep, most = "parallelism.expert_parallel_degree", sizes.num_experts
    valid = f"needs {ep} = 1, not {dims.ep}; use auto or alltoall"
    require(config, "moe.dispatcher", config.moe.dispatcher != "local" or dims.ep == 1, valid)
    if config.moe.dispatcher == "hierarchical" and dims.ep > 1:
        for first in range(0, dims.world_size, dims.ep):  # each group of expert-parallel ranks
            nodes = find_nodes(range(first, first + dims.ep), config.moe.ranks_per_node, ranks_per_machine)
            valid = f"must divide {ep} = {dims.ep}"
            require(config, "moe.ranks_per_node", nodes.size is not None or not config.moe.ranks_per_node, valid)
            valid = (
                f"needs as many expert-parallel ranks on each machine, but ranks {first} to {first + dims.ep - 1} are "
                f"on machines {nodes}; use alltoall, or set moe.ranks_per_node"
            )
            require(config, "moe.dispatcher", nodes.size is not None, valid)
    if config.moe.dispatcher == "symmetric" and dims.ep > 1:
        for first in range(0, dims.world_size, dims.ep):
            nodes = find_nodes(range(first, first + dims.ep), config.moe.ranks_per_node, ranks_per_machine)
            valid = (
                f"needs expert-parallel ranks that share memory, but ranks {first} to {first + dims.ep - 1} are on "
                f"machines {nodes}; use alltoall, or, where NVLink joins them, set moe.ranks_per_node = {dims.ep}"
            )
            require(config, "moe.dispatcher", nodes.count == 1, valid)
    require(config, ep, dims.ep <= most, f"at most {most}, the model's experts")
    try:
        check_sizes(config.balance, config.moe, most, dims.ep)
    except BalanceError as error:
        raise ConfigError(f"balance.{error.field}", error.value, error.valid) from None
    working = expert_parallel_degrees(sizes, dims.replica_size)
    valid = f"one of {', '.join(map(str, working))}" if working else "there is none for this number of ranks"
    why = f"{dims.replica_size} ranks / expert_parallel_degree must divide the experts' sizes {sizes[1]} and {sizes[2]}"
    require(config, ep, dims.ep in working, f"{valid}: {why}")


def _check_tensor_parallel(config: Config, dims: ParallelDims, model: PreTrainedConfig) -> None:
    """What `tp` divides: heads, the vocabulary, dense layers, sequences."""
    family, text = FAMILIES[config.model.name], model.get_text_config()
    one = "must be 1 "
    require(config, _TP, not isinstance(family, Generic), f"{one}with model.name = generic, which has no plan for it")
    require(config, _TP, not config.lora.rank, f"{one}with lora.rank: adapters are not split")
    require(config, _TP, config.model.kernels == "none", f"{one}with model.kernels = {config.model.kernels}")
    plan = family.tensor_plan(model)
    sizes = {"the vocabulary": text.vocab_size, "training.seq_len": config.training.seq_len // dims.cp}
    if any(region.columns for name, region in plan.regions.items() if name == "self_attn"):
        sizes["the attention heads"] = plan.num_heads
    for name in ("intermediate_size", "intermediate_size_mlp", "shared_expert_intermediate_size"):
        if getattr(text, name, None):
            sizes[name] = getattr(text, name)
    if shared := getattr(text, "n_shared_experts", 0):
        sizes["the shared experts"] = shared * text.moe_intermediate_size

    def fits(degree: int) -> bool:
        heads = plan.num_key_value_heads
        return all(size % degree == 0 for size in sizes.values()) and (heads % degree == 0 or degree % heads == 0)

    working = [degree for degree in range(1, dims.tp * 2 + 1) if fits(degree)]
    what = ", ".join(f"{name} ({size})" for name, size in sizes.items())
    valid = f"must divide {what}, and divide the {plan.num_key_value_heads} key-value heads or be a multiple of them"
    require(config, _TP, fits(dims.tp), f"{valid}; the nearest that does is {nearest(dims.tp, working)}")


def _check_pipeline(config: Config, dims: ParallelDims, model: PreTrainedConfig) -> None:
    """Stages, and the micro-batches that go through them."""
    parallelism, training = config.parallelism, config.training
    schedule = parallelism.pipeline_parallel_schedule
    require(config, _PP, not config.lora.rank, "must be 1 with lora.rank: an adapter is written by one stage")
    name = "parallelism.pipeline_parallel_stages_per_rank"
    try:
        per_rank = stages_per_rank(schedule, parallelism.pipeline_parallel_stages_per_rank)
    except ValueError as error:
        raise ConfigError(name, parallelism.pipeline_parallel_stages_per_rank, str(error)) from None
    num_stages = dims.pp * per_rank
    try:
        cut_blocks(build_model(FAMILIES[config.model.name], model, config.moe, torch.float32), num_stages)
    except ValueError as error:
        blocks = model.get_text_config().num_hidden_layers
        fitting = [n for n in range(1, dims.pp + 1) if n * per_rank <= blocks and dims.world_size % n == 0]
        near = f"; the nearest that fits is {max(fitting, default=1)}" if blocks < num_stages else "; it must be 1"
        raise ConfigError(_PP, dims.pp, f"{error}{near}") from None
    micro_batch = training.local_batch_size * dims.dp_replicate * dims.dp_shard
    microbatches = dims.pp if training.global_batch_size == -1 else training.global_batch_size // micro_batch
    try:
        check_microbatches(schedule, microbatches, num_stages, dims.pp)
    except ValueError as error:
        valid = f"a step is {error}; a micro-batch is {micro_batch} rows (local_batch_size x data-parallel ranks)"
        raise ConfigError("training.global_batch_size", training.global_batch_size, valid) from None
    if schedule in ("zero_bubble", "zbv"):
        split = f"with {schedule}, which takes the backward pass in two"
        mode = "activation_checkpoint.mode"
        require(config, mode, config.activation_checkpoint.mode == "none", f"must be none {split}: it would run twice")
        require(config, "compile.enable", not config.compile.enable, f"must be false {split}")
        valid = f"must be auto or never {split}: the second part needs what the first has gathered"
        require(config, "parallelism.reshard_after_forward", not parallelism.reshards, valid)


def _check_context(config: Config, model: PreTrainedConfig, dims: ParallelDims, *, elsewhere: bool) -> None:
    """Ranks that share sequences."""
    cp, seq_len = dims.cp, config.training.seq_len
    fitting = [nearby * cp for nearby in (seq_len // cp, seq_len // cp + 1) if 0 < nearby * cp <= most_positions(model)]
    near = f"; the nearest is {nearest(seq_len, fitting)}" if fitting else ""
    valid = f"must be a multiple of parallelism.context_parallel_degree = {cp}, the ranks that share a sequence{near}"
    require(config, "training.seq_len", seq_len % cp == 0, valid)
    attention = config.model.attn_implementation
    blind = attention.startswith("flash_attention") and config.data.within_documents
    valid = "needs model.attn_implementation = sdpa where ranks share sequences (context_parallel_degree)"
    require(config, "data.attend_within_documents", not blind, valid)
    method = config.parallelism.context_parallel_method
    if method == "ring":
        check_ring(config, on_gpu=elsewhere or torch.cuda.is_available())
    family = FAMILIES[config.model.name]
    built = build_model(family, model, config.moe, torch.float32, attn_implementation=attention)
    field = "parallelism.context_parallel_degree"
    try:
        check_heads(accept_context_parallel(built, method), cp, dims.tp, dims.dp_shard * cp)
    except UnknownAttention as error:
        raise ConfigError(field, cp, f"must be 1: ranks cannot share sequences with {error}") from None
    except LayoutError as error:
        raise ConfigError(field, cp, error.valid) from None


def check_ring(config: Config, *, on_gpu: bool) -> None:
    """What torch's ring attention computes, and where. Raises ConfigError."""
    name, instead = "parallelism.context_parallel_method", "use ulysses"
    valid = f"torch's ring attention needs a GPU: on a CPU it saves nothing and merges parts in float32; {instead}"
    require(config, name, on_gpu, valid)
    valid = f"torch's ring attention needs training.dtype = bfloat16; {instead}"
    require(config, name, config.training.dtype == "bfloat16", valid)
    valid = f"torch's ring attention does not see the ends of documents (data.attend_within_documents); {instead}"
    require(config, name, not config.data.within_documents, valid)


def expert_parallel_degrees(sizes: ExpertSizes, num_ranks: int) -> list[int]:
    """The degrees that work, ascending: no rank without an expert, and matrices that divide evenly over `ep_shard`.

    Args:
        sizes: of the model's experts.
        num_ranks: that share a copy of them.
    """
    return [
        degree
        for degree in range(1, min(num_ranks, sizes.num_experts) + 1)
        if num_ranks % degree == 0
        and not any(size % (num_ranks // degree) for size in (sizes.hidden_size, sizes.intermediate_size))
    ]
