"""All layouts, batches, chunks and accumulations that fit, ranked; and the field's two tables of scaling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from crossdock.config import Config, ConfigError, check_layout, expert_parallel_degrees, ranks_per_group, validate
from crossdock.models import ExpertSizes, resolve_hf_config
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, check_microbatches, stages_per_rank
from crossdock.tools.plan.auto import batch_sizes
from crossdock.tools.plan.estimate import Estimator, with_layout
from crossdock.tools.plan.figures import Estimate
from crossdock.tools.plan.model import ModelFacts
from crossdock.tools.plan.sizes import num_micro_batches

__all__ = ["Found", "ScaleRow", "scale", "search", "why"]

_MOST_TP, _MOST_PP, _LONG = 8, 16, 16384
_CHUNKS = (1, 2, 4)


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        ranked: layouts that fit and break no rule, best first.
        tried: how many combinations were estimated.
        fitting: how many of them fit.
        least: of those that do not, the one that would take least memory; `None` where none was tried.
    """

    ranked: list[Estimate]
    tried: int
    fitting: int
    least: Estimate | None


def search(estimator: Estimator, config: Config, world_size: int, most: int = 10) -> Found:
    """Rank layouts by tokens per second, of as good ones the one with more memory to spare.

    The global batch stays where it is a number; else every local batch has the accumulation of one step.
    """
    found: list[Estimate] = []
    tried, least = 0, None
    moes = _settings_of_layers(config)
    for dims in layouts(estimator.facts, config, world_size):
        plain = with_layout(config, dims, 1, config.training.global_batch_size)
        for size in batch_sizes(plain, dims):
            sized = with_layout(config, dims, size, config.training.global_batch_size)
            for each in _variants(estimator, sized, dims, moes):
                tried += 1
                if each.fits:
                    found.append(each)
                elif least is None or each.memory.total < least.memory.total:
                    least = each
    found.sort(key=lambda each: (-each.tokens_per_second, each.memory.total))
    return Found(list(_valid(found, estimator, config, most)), tried, len(found), least)


def _settings_of_layers(config: Config) -> dict[bool, list[MoEConfig]]:
    """Those to try, by whether tokens travel: every number of chunks, unless one is set."""
    moe = config.moe
    alone = moe if moe.dispatcher in ("auto", "local") else replace(moe, dispatcher="auto")
    chunks = (moe.overlap_chunks,) if moe.overlap_chunks else _CHUNKS
    return {
        True: [replace(moe, overlap_chunks=count) for count in chunks],
        False: [replace(alone, overlap_chunks=0)],
    }


def _variants(
    estimator: Estimator, config: Config, dims: ParallelDims, moes: Mapping[bool, list[MoEConfig]]
) -> Iterator[Estimate]:
    """With every number of chunks, and both ways of accumulating, where there is a choice."""
    if not _has_microbatches(config, dims):
        return
    several = num_micro_batches(config, dims) > 1 and dims.pp == 1
    for moe in moes[dims.ep > 1]:
        for reduction in ("micro_batch", "step") if several else ("micro_batch",):
            layout = replace(config.parallelism, gradient_reduction=reduction)
            yield estimator.estimate(replace(config, moe=moe, parallelism=layout), dims)


def _has_microbatches(config: Config, dims: ParallelDims) -> bool:
    if dims.pp == 1:
        return True
    schedule = config.parallelism.pipeline_parallel_schedule
    stages = dims.pp * stages_per_rank(schedule, config.parallelism.pipeline_parallel_stages_per_rank)
    try:
        check_microbatches(schedule, num_micro_batches(config, dims), stages, dims.pp)
    except ValueError:
        return False
    return True


def layouts(facts: ModelFacts, config: Config, world_size: int) -> Iterator[ParallelDims]:
    """Those that break no rule that is quick to look at. `tp` and `cp` stay within 8 ranks; sequences are shared only
    where they are long, or where the settings share them."""
    parallelism, seq_len = config.parallelism, config.training.seq_len
    sizes = ExpertSizes(facts.num_experts, facts.hidden_size, facts.intermediate_size)
    schedule = parallelism.pipeline_parallel_schedule
    per_rank = stages_per_rank(schedule, parallelism.pipeline_parallel_stages_per_rank)
    stages = [d for d in _divisors(world_size, _MOST_PP) if d == 1 or d * per_rank <= facts.num_layers]
    if config.lora.rank or not facts.head:
        stages = [1]
    heads = facts.num_heads, facts.num_key_value_heads
    shares = [d for d in _divisors(world_size, _MOST_TP) if heads[0] % d == 0]
    if config.lora.rank or config.model.name == "generic":
        shares = [1]
    shares = [d for d in shares if facts.vocab_size % d == 0 and (heads[1] % d == 0 or d % heads[1] == 0)]
    context = [1]
    if seq_len >= _LONG or parallelism.context_parallel_degree > 1:
        context = [d for d in _divisors(world_size, 8) if seq_len % d == 0]
    for pp in stages:
        for tp in shares:
            for cp in context:
                left, rest = divmod(world_size, pp * tp * cp)
                if rest or heads[0] % (tp * cp):
                    continue
                for replicas in _divisors(left, left):
                    if replicas & (replicas - 1):
                        continue
                    size = left // replicas * cp * tp
                    for ep in expert_parallel_degrees(sizes, size):
                        yield ParallelDims(
                            world_size, dp_replicate=replicas, dp_shard=left // replicas, cp=cp, tp=tp, pp=pp, ep=ep
                        )


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def _valid(found: Iterable[Estimate], estimator: Estimator, config: Config, most: int) -> Iterator[Estimate]:
    """The first ones that `train` would take, one for each layout."""
    model = resolve_hf_config(config.run_model)
    seen: set[ParallelDims] = set()
    refused: set[ParallelDims] = set()
    for each in found:
        if len(seen) == most:
            return
        if each.dims in seen or each.dims in refused:
            continue
        try:
            check_layout(each.config, each.dims, model, estimator.device.node_size, elsewhere=True)
        except ConfigError:
            refused.add(each.dims)
            continue
        seen.add(each.dims)
        yield each


def why(best: Estimate, other: Estimate) -> str:
    """Where the worse one of two loses most, per token, in words."""
    names = ("compute", "exchange", "collectives", "layout", "bubble", "optimizer")
    words = {
        "compute": "products and recompute",
        "exchange": "experts' exchanges",
        "collectives": "gathers and reductions",
        "layout": "exchanges over tp and cp",
        "bubble": "waiting in the pipeline",
        "optimizer": "the update",
    }
    tokens = best.tokens, other.tokens
    gaps = {n: getattr(other.work, n) / tokens[1] - getattr(best.work, n) / tokens[0] for n in names}
    name = max(gaps, key=gaps.__getitem__)
    step = best.work.step / tokens[0]
    return f"more {words[name]}: {100 * gaps[name] / step:+.1f} % of a step"


@dataclass(frozen=True)
class ScaleRow:
    """One row of a table of scaling.

    Attributes:
        ranks, ep, local_batch: what it is for.
        estimate: `None` where a rule is broken.
        problem: why the row fails; empty where it does not.
    """

    ranks: int
    ep: int
    local_batch: int
    estimate: Estimate | None
    problem: str = ""


def scale(
    estimator: Estimator, config: Config, ranks: Sequence[int], degrees: Sequence[int]
) -> tuple[list[ScaleRow], list[ScaleRow]]:
    """The field's two tables.

    "Strong": the local batch of the settings on more and more ranks. "Weak": the first of these numbers of ranks, with
    a growing local batch. (Elsewhere the two words mean other things: strong scaling fixes the global problem.)

    Args:
        estimator: of the model and device.
        config: the settings.
        ranks: numbers of ranks.
        degrees: of expert parallelism.
    """
    batch = config.training.local_batch_size
    strong = [_row(estimator, config, count, ep, batch) for ep in degrees for count in ranks]
    sizes = [1, 2, 4, 8, 16, 32]
    weak = [_row(estimator, config, ranks[0], ep, size) for ep in degrees for size in sizes]
    return strong, weak


def _row(estimator: Estimator, config: Config, ranks: int, ep: int, batch: int) -> ScaleRow:
    parallelism = replace(config.parallelism, expert_parallel_degree=ep, data_parallel_shard_degree=-1)
    moe = config.moe
    if ep == 1 and moe.dispatcher != "auto":
        moe = replace(moe, dispatcher="auto")
    training = replace(config.training, local_batch_size=batch, global_batch_size=-1)
    config = replace(config, parallelism=parallelism, training=training, moe=moe)
    try:
        dims = validate(config, ranks_per_group(config, ranks), estimator.device.node_size, elsewhere=True)
    except ConfigError as error:
        return ScaleRow(ranks, ep, batch, None, f"{error.field} = {error.value!r}: {error.valid}")
    estimate = estimator.estimate(config, dims)
    over = (estimate.memory.total - estimate.limit) / 2**30
    return ScaleRow(ranks, ep, batch, estimate, "" if estimate.fits else f"out of memory by {over:.1f} GiB")
