"""A test of this machine's ranks: what an MoE layer computes over all of them, and how fast rows travel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from crossdock.moe import MoE
from crossdock.moe_config import MoEConfig
from crossdock.parallel import apply_ep
from crossdock.routing import RouterConfig

__all__ = ["TestedDispatcher", "self_test"]

_HIDDEN, _INTERMEDIATE, _TOP_K, _EXPERTS_PER_RANK = 256, 128, 2, 4
_TOKENS = 512  # Per rank.
_MESSAGE_BYTES = 8 * 2**20  # That a rank sends to all ranks together.
_TIMED_SECONDS = 1.0
# Relative to the largest value; sums come in another order over several ranks.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


class TestedDispatcher(NamedTuple):
    """What came of one dispatcher.

    Attributes:
        name: of it.
        error: largest difference of output and input gradient from those of one process, relative to the largest
            value, over all ranks.
        problem: what is wrong; empty where nothing is.
    """

    name: str
    error: float
    problem: str


def self_test(device: torch.device, dispatchers: Sequence[str]) -> tuple[list[TestedDispatcher], float]:
    """Run a layer, forward and backward, with each of `dispatchers`, and time a plain all-to-all. Collective.

    Returns:
        What came of each, the same on all ranks; and bytes per second that a rank sends to the others in an all-to-all
        (0 with one rank).
    """
    expected = _run(device, None)
    tested = []
    for name in dispatchers:
        problem, error = "", 0.0
        try:
            found = _run(device, name)
            scale = max(float(tensor.abs().max()) for tensor in expected)
            error = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)) / scale
        except (RuntimeError, ValueError) as caught:
            problem = str(caught)
        told: list[tuple[str, float]] = [("", 0.0)] * dist.get_world_size()
        dist.all_gather_object(told, (problem, error))
        problem = next((each for each, _ in told if each), "")
        error = max(each for _, each in told)
        allowed = _TOLERANCE[_dtype(device)]
        if not problem and not error <= allowed:
            problem = f"its numbers are off by {error:.1e} of the largest, more than {allowed:.0e}"
        tested.append(TestedDispatcher(name, error, problem))
    return tested, _all_to_all_rate(device)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _run(device: torch.device, dispatcher: str | None) -> list[Tensor]:
    """Output and input gradient for this rank's tokens; with all experts here where there is no dispatcher."""
    ranks = dist.get_world_size()
    config = MoEConfig(dispatcher=dispatcher or "auto")  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        router = RouterConfig(num_experts=_EXPERTS_PER_RANK * ranks, top_k=_TOP_K)
        layer = MoE(_HIDDEN, _INTERMEDIATE, router, config).to(device, _dtype(device))
        tokens = torch.randn(ranks, _TOKENS, _HIDDEN)[dist.get_rank()]
    if dispatcher is not None and ranks > 1:
        apply_ep(layer, init_device_mesh(device.type, (ranks,), mesh_dim_names=("ep",)))
    x = tokens.to(device, _dtype(device)).requires_grad_()
    y = layer(x[None])[0]
    y.float().square().mean().backward()
    assert x.grad is not None
    return [y.detach().float(), x.grad.float() * y.numel()]


def _all_to_all_rate(device: torch.device) -> float:
    """Bytes per second from one rank to the others, the median of a second's exchanges."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return 0.0
    rows = torch.zeros(ranks, _MESSAGE_BYTES // ranks, dtype=torch.uint8, device=device)
    received = torch.empty_like(rows)
    seconds: list[float] = []
    while True:
        started = time.perf_counter()
        dist.all_to_all_single(received, rows)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        # All stop at the same exchange.
        enough = torch.tensor(float(sum(seconds) > _TIMED_SECONDS), device=device)
        dist.all_reduce(enough, dist.ReduceOp.MAX)
        if enough:
            return rows.nbytes * (ranks - 1) / ranks / statistics.median(seconds)
