"""What experience warns of."""

from __future__ import annotations

from collections.abc import Iterator

from crossdock.config import Config
from crossdock.tools.plan.estimate import Estimator
from crossdock.tools.plan.figures import Estimate
from crossdock.tools.plan.flows import spans

__all__ = ["advice"]

_FEW_ROWS = 128


def advice(estimate: Estimate, estimator: Estimator) -> list[str]:
    """Sentences, each with the numbers that it goes by; none where there is nothing to say."""
    return list(_advice(estimate, estimator))


def _advice(estimate: Estimate, estimator: Estimator) -> Iterator[str]:
    config, dims, device, facts = estimate.config, estimate.dims, estimate.device, estimator.facts
    memory, work = estimate.memory, estimate.work
    if not estimate.fits:
        over = (memory.total - estimate.limit) / 2**30
        yield (
            f"does not fit: {memory.total / 2**30:.1f} GiB, {over:.1f} more than the {estimate.limit / 2**30:.1f} that "
            f"may be used. {_remedy(config)}"
        )
    travels = work.exchange + work.layout
    if travels > work.compute:
        yield (
            f"more traffic than compute: {1e3 * travels:.0f} ms of a step in exchanges that nothing hides, "
            f"{1e3 * work.compute:.0f} ms in products. Fewer expert-parallel ranks, or a longer micro-batch, help."
        )
    elif travels + work.collectives > work.compute:
        yield (
            f"more traffic than compute: {1e3 * work.collectives:.0f} ms of a step in gathers and reductions that "
            f"nothing hides, {1e3 * travels:.0f} in exchanges, {1e3 * work.compute:.0f} ms in products. "
            f"{_less_gathered(estimate)}"
        )
    if dims.ep > 1:
        inside = spans(dims)["ep"].in_node(device.node_size)
        exchange = estimate.flows.get("expert exchange")
        if inside < dims.ep and exchange is not None:
            yield (
                f"expert parallelism across nodes: ep {dims.ep} spans {-(-dims.ep // inside)} nodes of "
                f"{device.node_size}, and {exchange.network / 2**30:.1f} GiB per step and rank go over the network. "
                f"ep {inside} stays on NVLink."
            )
        routes = estimate.routes
        redundant = sum(routes.rows) / max(routes.tokens, 1)
        if redundant > facts.top_k * 0.9 and facts.top_k > 1:
            yield (
                f"redundant traffic: a token travels to {redundant:.1f} ranks for its {facts.top_k} experts, so that "
                "sending it once per rank saves next to nothing."
            )
    rows = estimate.routes.tokens * dims.ep * facts.top_k / facts.num_experts
    if rows < _FEW_ROWS:
        yield (
            f"few rows per product: {rows:.0f} tokens for an expert in a micro-batch, while grouped products want "
            f"{_FEW_ROWS} or more. A larger local batch or more expert-parallel ranks give them more."
        )
    if estimate.routes.imbalance > 1.2:
        yield _imbalance(estimate, estimator)
    if dims.ep > 1 and (smaller := _without_ep(estimate, estimator)) is not None:
        yield smaller


def _remedy(config: Config) -> str:
    steps = []
    if config.activation_checkpoint.mode != "full":
        steps.append("activation_checkpoint.mode = full")
    if config.training.local_batch_size > 1:
        steps.append("a smaller training.local_batch_size")
    steps += ["more ranks", "a larger expert_parallel_degree or pipeline_parallel_degree"]
    return f"What helps: {', '.join(steps)}."


def _less_gathered(estimate: Estimate) -> str:
    """What makes gathers and reductions fewer, or smaller, for the same tokens."""
    steps = ["a larger training.local_batch_size"]
    parallelism, dims = estimate.config.parallelism, estimate.dims
    if estimate.micro_batches > 1 and dims.pp == 1 and parallelism.gradient_reduction != "step":
        steps.append("parallelism.gradient_reduction = step")
    if dims.dp_shard > 1:
        steps.append("shards within fewer ranks (a larger parallelism.data_parallel_replicate_degree)")
    return f"What helps, where it fits: {', '.join(steps)}."


def _imbalance(estimate: Estimate, estimator: Estimator) -> str:
    routes = estimate.routes
    worst = estimator.at_worst(estimate.config, estimate.dims)
    ends = "" if worst <= estimate.limit else ", which runs out of memory"
    return (
        f"imbalance: the busiest rank computes {routes.imbalance:.2f} times the mean, and all others wait for it. Were "
        f"all tokens to choose its experts, it would hold {worst / 2**30:.1f} GiB{ends}."
    )


def _without_ep(estimate: Estimate, estimator: Estimator) -> str | None:
    """Where one rank could gather all experts of a layer, and be faster for it."""
    dims, config = estimate.dims, estimate.config
    alone = estimator.with_ep(config, dims, 1)
    if alone is None or not alone.fits or alone.tokens_per_second < estimate.tokens_per_second:
        return None
    return (
        f"expert parallelism is not needed: with ep 1 it is estimated to fit ({alone.memory.total / 2**30:.1f} GiB) "
        f"and to be {100 * (alone.tokens_per_second / estimate.tokens_per_second - 1):.0f} % faster."
    )
