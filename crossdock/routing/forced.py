"""Routing that looks at no score: even, for measurements, and skewed by a known law, for experiments."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["deal_out", "draw_zipf"]

# Between the seeds of two periods.
_PERIODS_APART = 1_000_003


def deal_out(
    num_tokens: int, num_experts: int, top_k: int, padding_mask: Tensor | None, device: torch.device
) -> Tensor:
    """Experts in turn, token after token, so that no two experts' counts differ by more than one: `[T, K]` ids."""
    position = torch.arange(num_tokens, device=device)
    if padding_mask is not None:
        position = (~padding_mask).cumsum(0) - 1
    first = position.clamp_min(0)[:, None] * top_k
    return (first + torch.arange(top_k, device=device)) % num_experts


def draw_zipf(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    exponent: float,
    shuffle_seed: int | None,
    device: torch.device,
    period: int = 0,
) -> Tensor:
    """`K` distinct experts for each token, drawn one after another with `p_e` in proportion to `1 / r_e^exponent`.

    Drawn without replacement by the Gumbel trick, from a seed of its own: the same in every call, recompute included.

    Args:
        num_tokens: `T`.
        num_experts: `E`.
        top_k: `K`.
        exponent: 0 is uniform.
        shuffle_seed: of the order of popularity `r`; `None` makes expert 0 the most popular, expert `E - 1` the least.
        device: of the result.
        period: in each other one other experts are popular: shuffled anew, or the order moved on by as many experts.

    Returns:
        `[T, K]` int64 ids.
    """
    # On the CPU, whose generator gives the same numbers on every machine.
    generator = torch.Generator().manual_seed((0 if shuffle_seed is None else shuffle_seed) + _PERIODS_APART * period)
    rank = torch.arange(1, num_experts + 1, dtype=torch.float64).roll(period)
    if shuffle_seed is not None:
        rank = rank[torch.randperm(num_experts, generator=generator)]
    gumbel = -torch.empty(num_tokens, num_experts, dtype=torch.float64).exponential_(generator=generator).log()
    return (gumbel - exponent * rank.log()).topk(top_k, dim=-1).indices.to(device)
