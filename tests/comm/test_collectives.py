"""Collectives that are under way at the same time."""

from __future__ import annotations

import torch
import torch.distributed as dist

from crossdock.comm import gather_rows
from tests.ranks import RankPool

ROUNDS, WORLD, ROWS = 400, 4, 5
KINDS = ((torch.int64, 3), (torch.float32, 3), (torch.uint8, 264))


def _gather_at_the_same_time() -> int:
    """How many results were wrong."""
    group = dist.group.WORLD
    assert group is not None
    wrong = 0
    for number in range(ROUNDS):
        gathered = [
            gather_rows(torch.full((ROWS, width), dist.get_rank() + number).to(dtype), [ROWS] * WORLD, group.group_name)
            for dtype, width in KINDS
        ]
        of_ranks = (torch.arange(WORLD) + number).repeat_interleave(ROWS)[:, None]
        for each, (dtype, width) in zip(gathered, KINDS, strict=True):
            wrong += not torch.equal(each.wait(), of_ranks.to(dtype).expand(-1, width))
    return wrong


def test_several_gathers_at_the_same_time(ranks: RankPool) -> None:
    """Torch's own all-gather over gloo corrupts the heap then, now and then."""
    assert ranks.run(WORLD, _gather_at_the_same_time) == [0] * WORLD
