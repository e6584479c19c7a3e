"""How fast links and products are: a first version."""

from __future__ import annotations

import torch
import torch.distributed as dist

from crossdock.balance.costs import Rates

__all__ = ["measure_rates"]


def measure_rates(
    group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype, hidden_size: int, intermediate_size: int
) -> Rates:
    return Rates(1e9, 1e10, 1e-4)
