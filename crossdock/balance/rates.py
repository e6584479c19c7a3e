"""How fast ranks exchange weights and compute experts: measured once, where they run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from crossdock.balance.costs import Rates
from crossdock.experts import AUTO, ExpertParams, choose_backend

__all__ = ["measure_rates"]

_SAMPLES = 5
# At most, so that all takes some tenths of a second on slow machines. On a GPU, products of few rows only read weights.
_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
_FEWEST_ROWS = {"cpu": 16, "cuda": 1024}
_MOST_ROWS = 8192
_SECONDS = 3e-3


def measure_rates(
    group: dist.ProcessGroup | None,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    intermediate_size: int,
    experts: str = AUTO,
) -> Rates:
    """What the slowest link and the slowest rank of a group reach, the same numbers on all its ranks. Collective.

    Medians of a few all-to-alls in which each rank sends an expert's weights (or a part of them), spread over all
    ranks; of as many that carry next to nothing; and of forward passes of one SwiGLU expert, whose `6 H I` products
    and sums per route are the flops.

    Args:
        group: the ranks that share experts; `None`, or one rank: nothing is exchanged, which then takes no time.
        device: of the experts.
        dtype: in which they compute and travel.
        hidden_size: `H`.
        intermediate_size: `I`.
        experts: the backend that computes, as `choose_backend` takes it.
    """
    per_flop = _seconds_per_flop(device, dtype, hidden_size, intermediate_size, experts)
    if group is None or dist.get_world_size(group) == 1:
        return Rates(math.inf, 1 / per_flop, 0.0)
    ranks = dist.get_world_size(group)
    per_rank = max(1, min(3 * hidden_size * intermediate_size, _of(_BYTES, device) // dtype.itemsize) // ranks)
    per_exchange = _median(_exchange(1, dtype, device, group), device)
    seconds = _median(_exchange(per_rank, dtype, device, group), device)
    # Where bytes are lost in the noise of the latency, at least half of the time counts as theirs.
    per_byte = max(seconds - per_exchange, seconds / 2) / (per_rank * (ranks - 1) * dtype.itemsize)
    slowest = torch.tensor([per_byte, per_flop, per_exchange], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    per_byte, per_flop, per_exchange = slowest.tolist()
    return Rates(1 / per_byte, 1 / per_flop, per_exchange)


def _of(limits: dict[str, int], device: torch.device) -> int:
    return limits["cpu" if device.type == "cpu" else "cuda"]


@torch.no_grad()
def _seconds_per_flop(device: torch.device, dtype: torch.dtype, H: int, I: int, experts: str) -> float:
    """Of an expert's forward pass, of enough rows that a clock can tell."""
    # Ones: memory that nobody has written may hold denormal numbers, at which some processors are slow.
    params = ExpertParams(*(torch.ones(1, *size, dtype=dtype, device=device) for size in ((H, 2 * I), (I, H))))
    rows = _of(_FEWEST_ROWS, device)
    while True:
        tokens = torch.ones(rows, H, dtype=dtype, device=device)
        weights = torch.ones(rows, 1, dtype=torch.promote_types(dtype, torch.float32), device=device)
        slot_ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        call = partial(choose_backend(experts, tokens, params), tokens, slot_ids, weights, params)
        _timed(call, device)
        samples = [_timed(call, device)]
        if samples[0] >= _SECONDS or rows >= _MOST_ROWS:
            break
        rows *= 4
    while len(samples) < _SAMPLES and sum(samples) < _SAMPLES * 4 * _SECONDS:
        samples.append(_timed(call, device))
    return statistics.median(samples) / (6 * rows * H * I)


def _exchange(
    per_rank: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
) -> Callable[[], object]:
    """An all-to-all that sends so many numbers to each rank."""
    sent = torch.zeros(per_rank * dist.get_world_size(group), dtype=dtype, device=device)
    received = torch.empty_like(sent)
    return lambda: dist.all_to_all_single(received, sent, group=group)


def _median(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; the first one warms up. As many calls on all ranks."""
    return statistics.median([_timed(call, device) for _ in range(_SAMPLES + 1)][1:])


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
