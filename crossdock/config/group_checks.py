"""What replica groups need, and how ranks and samples divide over them."""

from __future__ import annotations

import importlib.util
import math
import re
import sys

from crossdock.config.requirements import require
from crossdock.config.settings import Config, ConfigError
from crossdock.parallel import ParallelDims

__all__ = ["check_group_layout", "check_groups", "default_global_batch_size", "ranks_per_group"]

_GROUPS = "fault_tolerance.replica_groups"
_LEAST_HEARTBEAT_MS = 300  # Three of torchft's signs of life.


def check_groups(config: Config) -> None:
    """What does not depend on the number of ranks.

    Raises:
        ConfigError: for the first setting that cannot work.
    """
    settings = config.fault_tolerance
    least, address = "fault_tolerance.min_replica_groups", "fault_tolerance.lighthouse"
    if not settings.replica_groups:
        require(config, least, settings.min_replica_groups == 1, f"must be 1 without {_GROUPS}")
        require(config, address, not settings.lighthouse, f"must be empty without {_GROUPS}")
        return
    require(config, _GROUPS, sys.version_info < (3, 14), "needs torchft, which has no wheel for Python 3.14 or newer")
    found = importlib.util.find_spec("torchft") is not None
    require(config, _GROUPS, found, "needs torchft: pip install 'crossdock[torchft]'")
    valid = f"must be 1 to {settings.replica_groups}, {_GROUPS}"
    require(config, least, 1 <= settings.min_replica_groups <= settings.replica_groups, valid)
    valid = "must be empty or an address http://HOST:PORT, with a port of 1 to 65535"
    match = re.fullmatch(r"(?:http://[^/\s:]+:(\d{1,5}))?", settings.lighthouse)
    require(config, address, match is not None and 0 < int(match[1] or 1) < 2**16, valid)
    longest = config.job.comm_timeout_seconds * 500
    for name, least in (("heartbeat_timeout_ms", _LEAST_HEARTBEAT_MS), ("join_timeout_ms", 1)):
        valid = f"must be {least} to {longest}, half of job.comm_timeout_seconds"
        require(config, f"fault_tolerance.{name}", least <= getattr(settings, name) <= longest, valid)
    degrees = config.parallelism
    valid = f"must be 1 with {_GROUPS}, whose groups are the replicas; each is divided by the other degrees"
    replicas = "parallelism.data_parallel_replicate_degree"
    require(config, replicas, degrees.data_parallel_replicate_degree == 1, valid)
    valid = f"must be 1 with {_GROUPS}: the number of micro-batches of a step changes with that of the groups"
    require(config, "parallelism.pipeline_parallel_degree", degrees.pipeline_parallel_degree == 1, valid)
    valid = f"must be 0 with {_GROUPS}: a group catches up from those that went on"
    require(config, "fault_tolerance.snapshot_interval", not settings.snapshot_interval, valid)
    valid = f"must be another one with {_GROUPS}, whose groups cannot go back together"
    for name in ("on_bad_step", "on_spike"):
        require(config, f"fault_tolerance.{name}", getattr(settings, name) != "rollback", valid)


def check_group_layout(config: Config, dims: ParallelDims) -> None:
    """Whether a step's samples divide over every number of groups that may take part.

    Raises:
        ConfigError: naming the multiple that would.
    """
    total = config.training.global_batch_size
    if not config.fault_tolerance.replica_groups or total == -1:
        return
    step = default_global_batch_size(config, dims)
    numbers = f"{config.fault_tolerance.min_replica_groups} to {config.fault_tolerance.replica_groups}"
    valid = (
        f"-1 or a multiple of {step}: a step has the same samples whatever number of groups ({numbers}) takes part, "
        f"each with micro-batches of {config.training.local_batch_size} rows on {dims.dp_shard} data-parallel ranks"
    )
    require(config, "training.global_batch_size", total % step == 0, valid)


def default_global_batch_size(config: Config, dims: ParallelDims) -> int:
    """What `global_batch_size = -1` comes to: one micro-batch per rank, and with groups the fewest that always divide.

    A pipeline has a micro-batch for each of its ranks, or most would wait.
    """
    settings = config.fault_tolerance
    numbers = range(settings.min_replica_groups, settings.replica_groups + 1) if settings.replica_groups else (1,)
    return config.training.local_batch_size * dims.dp_replicate * dims.dp_shard * dims.pp * math.lcm(*numbers)


def ranks_per_group(config: Config, ranks: int, machines: int = 1) -> int:
    """Ranks of each group, of `ranks` on each of `machines`; all ranks without groups.

    Raises:
        ConfigError: where groups do not divide over machines, or ranks over groups.
    """
    groups = config.fault_tolerance.replica_groups
    if not groups:
        return ranks * machines
    valid = f"must be a multiple of --nnodes, {machines}: a group is on one machine"
    require(config, _GROUPS, groups % machines == 0, valid)
    here = groups // machines
    if ranks % here:
        raise ConfigError("--nproc", ranks, f"must be a multiple of {here}, the replica groups of a machine")
    return ranks // here
