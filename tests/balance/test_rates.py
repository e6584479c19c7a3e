"""Measured rates are agreed on, and plausible."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from crossdock.balance import Rates, measure_rates
from tests.ranks import RankPool

CPU = torch.device("cpu")


def _measure(dtype: torch.dtype) -> Rates:
    return measure_rates(dist.group.WORLD, CPU, dtype, 256, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks_agree_on_the_rates(ranks: RankPool, dtype: torch.dtype) -> None:
    first, second = ranks.run(2, _measure, dtype)
    assert first == second
    # Between a modem and a mainframe; and two processes of one machine are no second apart.
    assert 1e5 < first.bytes_per_second < 1e13
    assert 1e6 < first.flops_per_second < 1e16
    assert 0 < first.seconds_per_exchange < 1


def test_one_rank_has_nobody_to_exchange_with() -> None:
    rates = measure_rates(None, CPU, torch.float32, 64, 32)
    assert rates.bytes_per_second == math.inf
    assert rates.seconds_per_exchange == 0
    assert 1e6 < rates.flops_per_second < 1e16
