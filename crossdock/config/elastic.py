"""The layout of a run that goes on with fewer ranks than it was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedConfig

from crossdock.config.group_checks import default_global_batch_size
from crossdock.config.layout_checks import check_layout
from crossdock.config.settings import Config, ConfigError
from crossdock.config.validation import check_settings
from crossdock.parallel import LayoutError, ParallelDims

__all__ = ["fit", "with_settled_batch"]


def with_settled_batch(config: Config, dims: ParallelDims) -> Config:
    """With `training.global_batch_size` as a number, that of the layout `dims`: the same on any other layout."""
    if config.training.global_batch_size != -1:
        return config
    size = default_global_batch_size(config, dims)
    return replace(config, training=replace(config.training, global_batch_size=size))


def fit(config: Config, available: int) -> tuple[Config, int]:
    """The settings for at most `available` ranks, and how many of these they take.

    What was asked for, where it fits. Else the layout that takes the most ranks; of these the one that keeps most of
    the expert-parallel, then of the sharding degree, for memory. Only the degrees in `fault_tolerance.may_shrink` are
    lowered. The global batch stays; `training.local_batch_size` is lowered where it would not divide it.

    Args:
        config: with `training.global_batch_size` settled.
        available: ranks.

    Raises:
        ConfigError: where nothing fits.
    """
    model = check_settings(config)
    for used in range(available, 0, -1):
        for candidate in _candidates(config, used):
            if _fits(candidate, used, model):
                return candidate, used
    shrinking = ", ".join(config.fault_tolerance.may_shrink) or "nothing"
    raise ConfigError(
        "fault_tolerance.may_shrink",
        list(config.fault_tolerance.may_shrink),
        f"no layout fits {available} ranks where {shrinking} may shrink; let other degrees of [parallelism] shrink "
        "too, or ask for more machines (--nnodes MIN:MAX)",
    )


def _candidates(config: Config, used: int) -> Iterator[Config]:
    """Settings that may fit `used` ranks, the best first."""
    parallelism = config.parallelism
    may_shrink = config.fault_tolerance.may_shrink

    def choices(name: str, short: str) -> list[int]:
        """What a degree may be, the largest first; -1 takes what is left."""
        asked = getattr(parallelism, name)
        if asked == -1 or short not in may_shrink:
            return [asked]
        return [degree for degree in range(min(asked, used), 0, -1) if used % degree == 0]

    yield config
    for ep in choices("expert_parallel_degree", "ep"):
        for pp in choices("pipeline_parallel_degree", "pp"):
            for tp in choices("tensor_parallel_degree", "tp"):
                for cp in choices("context_parallel_degree", "cp"):
                    for replicate in reversed(choices("data_parallel_replicate_degree", "dp_replicate")):
                        shard, rest = divmod(used, pp * tp * cp * replicate)
                        asked = parallelism.data_parallel_shard_degree
                        allowed = asked in (-1, shard) or ("dp_shard" in may_shrink and shard < asked)
                        if rest or not shard or not allowed:
                            continue
                        degrees = replace(
                            parallelism,
                            expert_parallel_degree=ep,
                            pipeline_parallel_degree=pp,
                            tensor_parallel_degree=tp,
                            context_parallel_degree=cp,
                            data_parallel_replicate_degree=replicate,
                            data_parallel_shard_degree=shard,
                        )
                        yield from _with_local_batch(replace(config, parallelism=degrees), shard * replicate)


def _with_local_batch(config: Config, readers: int) -> Iterator[Config]:
    """With the largest local batch, up to the one asked for, whose micro-batches divide the global batch."""
    training = config.training
    for size in range(training.local_batch_size, 0, -1):
        if training.global_batch_size % (size * readers) == 0:
            yield replace(config, training=replace(training, local_batch_size=size))
            return


def _fits(config: Config, used: int, model: PreTrainedConfig) -> bool:
    try:
        check_layout(config, ParallelDims.from_config(config.parallelism, used), model, 0)
    except (LayoutError, ConfigError):
        return False
    return True
