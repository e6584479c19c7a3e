"""Settings that a run leaves to be chosen, by the model that `crossdock plan` uses and the devices that are found."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from crossdock.config import AUTO_BATCH, Config, check_settings
from crossdock.parallel import LayoutError, ParallelDims
from crossdock.tools.plan.devices import Device, read_devices
from crossdock.tools.plan.estimate import Estimator
from crossdock.tools.plan.figures import Estimate
from crossdock.tools.plan.model import plan_model, read_model
from crossdock.tools.plan.routes import read_skew

__all__ = ["batch_sizes", "choose_batch", "choose_reduction", "found_device", "is_open", "known_device", "settle"]

_LARGEST_BATCH = 64
# An estimate has an error: so much of the memory stays free where nobody has looked.
_SPARE = 0.2
# A larger batch, or whole gradients, for less than this gain is memory for nothing.
_GAIN = 1.01


def is_open(config: Config) -> bool:
    """Whether anything is left to `settle`."""
    return config.training.local_batch_size == AUTO_BATCH or config.parallelism.gradient_reduction == "auto"


def settle(config: Config, world_size: int, device: Device) -> tuple[Config, list[str]]:
    """The settings with numbers for `training.local_batch_size` and `parallelism.gradient_reduction`, and why these.

    The same on all ranks that have the same devices. A layout that breaks a rule is left for `validate` to refuse.

    Args:
        config: a run's.
        world_size: ranks over all machines.
        device: of the ranks, with `node_size` as they are launched.

    Raises:
        ConfigError: for a setting that cannot work.
    """
    if not is_open(config):
        return config, []
    check_settings(config)
    one = _with(config, 1, "micro_batch")
    try:
        dims = ParallelDims.from_config(config.parallelism, world_size)
    except LayoutError:
        return one, []
    facts = read_model(plan_model(one))
    estimator = Estimator(facts, device, read_skew("uniform", one, facts), spare=_SPARE)
    reasons = []
    batch = config.training.local_batch_size
    if batch == AUTO_BATCH:
        reduction = config.parallelism.gradient_reduction
        batch, reason = choose_batch(
            estimator, _with(config, 1, "micro_batch" if reduction == "auto" else reduction), dims
        )
        reasons.append(f"local_batch_size = {batch}: {reason}")
    config = _with(config, batch, config.parallelism.gradient_reduction)
    if config.parallelism.gradient_reduction == "auto":
        chosen, reason = choose_reduction(estimator, config, dims)
        config = _with(config, batch, chosen)
        reasons.append(f"gradient_reduction = {chosen}: {reason}")
    return config, reasons


def choose_batch(estimator: Estimator, config: Config, dims: ParallelDims) -> tuple[int, str]:
    """Sequences of a micro-batch: the fewest that come within a per cent of the most tokens per second."""
    found = [
        (size, estimator.estimate(_with(config, size, config.parallelism.gradient_reduction), dims))
        for size in batch_sizes(config, dims)
    ]
    fitting = [(size, each) for size, each in found if each.fits]
    if not fitting:
        size, least = found[0]
        return size, f"not even that is estimated to fit: {_gib(least)}"
    best = max(each.tokens_per_second for _, each in fitting)
    size, chosen = next((s, e) for s, e in fitting if e.tokens_per_second * _GAIN >= best)
    larger = next((f"; {s} would take {_gib(e)}" for s, e in found if s > size and not e.fits), "")
    device = estimator.device
    where = f"{device.name} in nodes of {device.node_size}"
    return size, f"larger ones gain less than a per cent on {where}; {_gib(chosen)}{larger}"


def batch_sizes(config: Config, dims: ParallelDims) -> list[int]:
    """Powers of two, ascending, that the global batch allows."""
    total, readers = config.training.global_batch_size, dims.dp_replicate * dims.dp_shard
    return list(_powers(total, readers)) or [1]


def _powers(total: int, readers: int) -> Iterator[int]:
    size = 1
    while size <= _LARGEST_BATCH:
        if total == -1 or total % (size * readers) == 0:
            yield size
        size *= 2


def choose_reduction(estimator: Estimator, config: Config, dims: ParallelDims) -> tuple[str, str]:
    """`micro_batch` or `step`."""
    batch = config.training.local_batch_size
    often, once = (estimator.estimate(_with(config, batch, name), dims) for name in ("micro_batch", "step"))
    if often.micro_batches == 1:
        return "micro_batch", "a step has one micro-batch"
    if dims.pp > 1:
        return "micro_batch", "a pipeline reduces once per step in any case"
    gain = once.tokens_per_second / often.tokens_per_second
    faster = f"once per step is estimated {100 * (gain - 1):.1f} % faster, with {_gib(once)}"
    if not once.fits:
        return "micro_batch", f"{faster}, which does not fit"
    return ("step" if gain >= _GAIN else "micro_batch"), faster


def _gib(estimate: Estimate) -> str:
    limit = estimate.limit / 2**30
    return f"{estimate.memory.total / 2**30:.1f} GiB of {limit:.1f} that may be used"


def _with(config: Config, batch: int, reduction: str) -> Config:
    training = replace(config.training, local_batch_size=batch)
    parallelism = replace(config.parallelism, gradient_reduction=reduction)  # type: ignore[arg-type]
    return replace(config, training=training, parallelism=parallelism)


def known_device(name: str, table: Mapping[str, Device]) -> Device | None:
    """Of a table the one that a device's own name names, as a whole word: an RTX A1000 is no A100."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((device for key, device in table.items() if key in words), None)


def found_device(ranks_here: int) -> Device:
    """What this machine has, for each of so many ranks: of the table by its name, with the memory that is there.

    A GPU that the table does not know counts as an H100 with its own memory.
    """
    table = read_devices()
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks_here / 2**30
        return replace(table["cpu"], memory_gib=memory, node_size=ranks_here)
    name = torch.cuda.get_device_name()
    known = known_device(name, table) or table["h100"]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return replace(known, memory_gib=memory, node_size=ranks_here)
