"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import RankPool

# Threads that wait for busy cores make small operations hundreds of times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks.run(world_size, function, *args)`: a function on several ranks over gloo."""
    pool = RankPool()
    yield pool
    pool.close()
