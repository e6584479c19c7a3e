"""What the plan of a run says when it starts: settings that were left open, and whether memory is estimated to do."""

from __future__ import annotations

from crossdock.config import AUTO_BATCH, Config, ConfigError
from crossdock.parallel import ParallelDims
from crossdock.tools.plan import (
    Estimator,
    UnknownModel,
    found_device,
    is_open,
    plan_model,
    read_model,
    read_skew,
    settle,
)

__all__ = ["memory_warning", "settled_config"]


def settled_config(
    config: Config, world_size: int, ranks_here: int, *, is_elastic: bool = False
) -> tuple[Config, list[str]]:
    """The settings with numbers for those that are left open, and why these; the same on all ranks of like machines.

    Args:
        config: of the run.
        world_size: ranks over all machines.
        ranks_here: on this machine.
        is_elastic: whether the run may go on with other numbers of machines.

    Raises:
        ConfigError: for a setting that cannot work, or a batch that is left open where a step must stay the same.
    """
    if not is_open(config):
        return config, []
    several = is_elastic or config.fault_tolerance.replica_groups > 0
    if several and config.training.local_batch_size == AUTO_BATCH:
        valid = "must be a number where machines or replica groups come and go"
        raise ConfigError("training.local_batch_size", AUTO_BATCH, valid)
    return settle(config, world_size, found_device(ranks_here))


def memory_warning(config: Config, dims: ParallelDims, ranks_here: int) -> str:
    """What to warn of where a rank is estimated to hold more than its device has; empty where it is not."""
    device = found_device(ranks_here)
    try:
        facts = read_model(plan_model(config))
        estimate = Estimator(facts, device, read_skew("uniform", config, facts), spare=0.0).estimate(config, dims)
    except UnknownModel:  # a configuration that names its sizes otherwise
        return ""
    if estimate.fits:
        return ""
    held, there = estimate.memory.total / 2**30, estimate.limit / 2**30
    return (
        f"memory: a rank is estimated to hold {held:.1f} GiB, and its device has {there:.1f}; an estimate has an "
        "error, so the run goes on. crossdock plan looks closer, and says what would help"
    )
