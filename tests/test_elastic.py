"""The layout of a run on fewer ranks than it was asked for."""

from __future__ import annotations

import pytest

from crossdock.config import Config, ConfigError, fit, load_config, validate, with_settled_batch

DEBUG = ["--training.local-batch-size", "4"]


def asked(world_size: int, *settings: str) -> Config:
    config = load_config(None, [*DEBUG, *settings])
    return with_settled_batch(config, validate(config, world_size))


def degrees(config: Config) -> dict[str, int]:
    parallelism = config.parallelism
    return {
        "dp_replicate": parallelism.data_parallel_replicate_degree,
        "dp_shard": parallelism.data_parallel_shard_degree,
        "cp": parallelism.context_parallel_degree,
        "tp": parallelism.tensor_parallel_degree,
        "pp": parallelism.pipeline_parallel_degree,
        "ep": parallelism.expert_parallel_degree,
    }


def test_all_ranks_take_what_was_asked_for() -> None:
    config = asked(8, "--parallelism.expert-parallel-degree", "4", "--parallelism.data-parallel-replicate-degree", "2")
    assert fit(config, 8) == (config, 8)


@pytest.mark.parametrize("available", range(1, 9))
def test_what_fits_is_valid_and_keeps_batch_and_what_may_not_shrink(available: int) -> None:
    config = asked(8, "--parallelism.expert-parallel-degree", "8", "--parallelism.tensor-parallel-degree", "1")
    fitting, used = fit(config, available)
    assert used <= available
    dims = validate(fitting, used)
    assert fitting.training.global_batch_size == config.training.global_batch_size == 32
    assert fitting.training.local_batch_size <= 4
    assert dims.ep <= 8
    assert fitting.parallelism.tensor_parallel_degree == 1
    # 32 samples divide over the powers of two alone: the next one below is taken.
    assert used == 1 << (available.bit_length() - 1)


def test_the_most_ranks_then_the_most_expert_parallel_ones() -> None:
    config = asked(8, "--parallelism.expert-parallel-degree", "4", "--parallelism.data-parallel-replicate-degree", "2")
    fitting, used = fit(config, 5)
    assert used == 4
    assert degrees(fitting) == {"dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 1, "pp": 1, "ep": 4}


def test_a_degree_that_may_not_shrink_needs_its_ranks() -> None:
    config = asked(4, "--parallelism.tensor-parallel-degree", "2", "--parallelism.expert-parallel-degree", "2")
    fitting, used = fit(config, 3)
    assert used == 2
    assert fitting.parallelism.tensor_parallel_degree == 2
    with pytest.raises(ConfigError, match="no layout fits 1 ranks where dp_replicate, dp_shard, ep may shrink"):
        fit(config, 1)
    allowed = asked(
        4,
        *("--parallelism.tensor-parallel-degree", "2", "--parallelism.expert-parallel-degree", "2"),
        *("--fault-tolerance.may-shrink", "tp,dp_shard,ep"),
    )
    assert fit(allowed, 1)[1] == 1


def test_a_smaller_local_batch_where_it_would_not_divide_the_global_one() -> None:
    config = asked(6, "--training.local-batch-size", "2", "--parallelism.expert-parallel-degree", "2")
    assert config.training.global_batch_size == 12
    fitting, used = fit(config, 4)
    assert (used, fitting.training.local_batch_size) == (4, 1)
