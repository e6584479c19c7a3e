"""Which ranks share a node: what is set, or what the launch says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crossdock.dispatch import DispatchOptions, DispatchSituation, build_dispatcher, find_nodes, plan_dispatch
from tests.ranks import RankPool

STRIDED = range(0, 32, 4)
LAUNCHES: dict[str, tuple[Sequence[int], int, list[int], int | None]] = {
    "one machine": (range(8), 8, [0] * 8, 8),
    "a part of a machine": (range(4, 8), 8, [0] * 4, 4),
    "two machines": (range(8), 4, [0] * 4 + [1] * 4, 4),
    "the second half of four machines": (range(8, 16), 4, [0] * 4 + [1] * 4, 4),
    "strided, two of a machine": (STRIDED, 8, [0, 0, 1, 1, 2, 2, 3, 3], 2),
    "strided, each on a machine of its own": (STRIDED, 4, [*range(8)], 1),
    "interleaved": ([0, 8, 1, 9], 8, [0, 1, 0, 1], None),
    "more on one machine than on the other": (range(4, 10), 8, [0] * 4 + [1] * 2, None),
    "as many, but not in order": ([0, 1, 8, 9, 2, 3], 8, [0, 0, 1, 1, 0, 0], None),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`launched(n)`: as torchrun with `n` ranks on each machine; 0: by other means."""

    def launch(per_machine: int) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_machine))
        if not per_machine:
            monkeypatch.delenv("LOCAL_WORLD_SIZE")

    return launch


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_node_is_what_shares_a_machine(name: str, launched: Any) -> None:
    ranks, per_machine, of_ranks, size = LAUNCHES[name]
    launched(per_machine)
    nodes = find_nodes(ranks, 0)
    assert nodes.of_ranks == tuple(of_ranks)
    assert nodes.size == size
    assert nodes.count == len(set(of_ranks))


def test_what_is_set_goes_before_the_launch(launched: Any) -> None:
    launched(8)
    assert find_nodes(range(8), 2).of_ranks == (0, 0, 1, 1, 2, 2, 3, 3)
    assert find_nodes(range(8), 2).size == 2
    assert find_nodes(range(8), 3).size is None
    assert find_nodes(range(8), 100).size == 8


def test_without_the_launchers_word_a_machine_has_a_rank_per_gpu(
    launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_nodes(range(8), 0).size == 8
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_nodes(range(8), 0).size == 4


def test_auto_goes_by_the_machines_of_the_launch(launched: Any) -> None:
    launched(8)
    options, cpu = DispatchOptions(), torch.device("cpu")
    inner = DispatchSituation(16, 128, 8, 2048, torch.bfloat16, cpu, ranks=tuple(range(16)))
    assert plan_dispatch("auto", 0, inner, options).dispatcher == "hierarchical"
    for ranks in (range(0, 128, 8), range(4, 20)):
        plan = plan_dispatch("auto", 0, replace(inner, ranks=tuple(ranks)), options)
        assert plan.dispatcher == "alltoall"
        assert "16 ranks are not nodes of several ranks each" in plan.reason


def _build(per_machine: int) -> list[str]:
    """What `hierarchical` is for the whole world of 6 ranks, and for every second rank of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(per_machine))
        strided = [dist.new_group([first, first + 2, first + 4]) for first in (0, 1)]
        built = []
        for group in (dist.group.WORLD, strided[dist.get_rank() % 2]):
            assert isinstance(group, dist.ProcessGroup)
            try:
                built.append(type(build_dispatcher("hierarchical", group, 2)).__name__)
            except ValueError as error:
                built.append(str(error))
    return built


def test_hierarchical_needs_nodes_that_are_alike(ranks: RankPool) -> None:
    for whole, strided in ranks.run(6, _build, 2):
        assert whole == "HierarchicalDispatcher"
        assert strided == "AllToAllDispatcher", "each on a machine of its own"
    for whole, strided in ranks.run(6, _build, 4):
        assert "ranks_per_node = 0 needs nodes of as many consecutive ranks each; the 6 ranks" in whole
        assert "nodes 0 0 0 0 1 1; use 'alltoall'" in whole
        assert "the 3 ranks" in strided
