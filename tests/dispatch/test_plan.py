"""Which dispatcher and how many chunks `auto` picks, and whether its reason says so."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pytest
import torch

from crossdock.comm import Wire
from crossdock.dispatch import DeepEPOptions, DispatchOptions, DispatchSituation, plan_dispatch
from tests.dispatch.deepep_double import Double

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Qwen3-30B-A3B.
LARGE = DispatchSituation(
    num_ranks=16, num_experts=128, top_k=8, hidden_size=2048, dtype=torch.bfloat16, device=GPU, tokens_per_rank=16384
)
NODES_OF_8 = DispatchOptions(ranks_per_node=8)


class Line(NamedTuple):
    """A situation, what is set, and what is picked; `reason` is a pattern of what the plan says."""

    situation: DispatchSituation
    options: DispatchOptions
    dispatcher: str
    chunks: int
    reason: str
    set_dispatcher: str = "auto"
    set_chunks: int = 0


def _like(situation: DispatchSituation, **changes: Any) -> DispatchSituation:
    return replace(situation, **changes)


ON_CPU = _like(LARGE, device=CPU)
SETTINGS = {
    "set": Line(LARGE, NODES_OF_8, "allgather", 3, "as set$", "allgather", 3),
    "set dispatcher, chunks by the rule": Line(LARGE, NODES_OF_8, "alltoall", 2, r"as set; .* MiB", "alltoall"),
    "set chunks, dispatcher by the rule": Line(ON_CPU, NODES_OF_8, "hierarchical", 4, "other nodes", set_chunks=4),
    "one rank": Line(_like(LARGE, num_ranks=1), NODES_OF_8, "local", 1, "one rank holds all experts"),
    "one rank, whatever is set": Line(
        _like(LARGE, num_ranks=1), NODES_OF_8, "local", 1, "one rank holds all experts", "hierarchical", 4
    ),
    "static shapes": Line(
        LARGE, DispatchOptions(8, static_shapes=True), "alltoall", 2, "static_shapes makes it an all-gather"
    ),
}
# Where deepep is out of the question, nodes decide.
NODES = {
    "one node": Line(_like(ON_CPU, num_ranks=8), NODES_OF_8, "alltoall", 1, "all ranks are one node"),
    "fewer ranks than a node has": Line(_like(ON_CPU, num_ranks=4), NODES_OF_8, "alltoall", 1, "one node"),
    "a machine without GPUs": Line(ON_CPU, DispatchOptions(), "alltoall", 1, "all ranks are one node"),
    "nodes of one rank": Line(ON_CPU, DispatchOptions(1), "alltoall", 1, "16 ranks are not nodes of several"),
    "nodes that do not divide": Line(ON_CPU, DispatchOptions(6), "alltoall", 1, "16 ranks are not nodes of several"),
    # 8 (1 - (15/16)^8) ranks and 1 - (1/2)^8 nodes.
    "two nodes, many experts per token": Line(
        ON_CPU, NODES_OF_8, "hierarchical", 1, r"needs 3\.2 ranks on other nodes, and 1\.0 other nodes"
    ),
    # One expert is on one rank and on one node.
    "two nodes, one expert per token": Line(
        _like(ON_CPU, top_k=1), NODES_OF_8, "alltoall", 1, r"needs 0\.5 ranks on other nodes, and 0\.5 other nodes"
    ),
    # Two experts are rarely on one of 16 nodes.
    "many small nodes": Line(
        _like(ON_CPU, num_ranks=32, top_k=2), DispatchOptions(2), "alltoall", 1, r"1\.8 other nodes"
    ),
}
CHUNKS = {
    "on a CPU": Line(ON_CPU, NODES_OF_8, "alltoall", 1, "on a CPU, exchanges and experts share the cores", "alltoall"),
    "unknown number of tokens": Line(
        _like(LARGE, tokens_per_rank=None), NODES_OF_8, "alltoall", 1, "number of tokens is not known", "alltoall"
    ),
    # T (R - 1) (1 - (15/16)^8) rows of 4 KiB.
    "much to send": Line(LARGE, NODES_OF_8, "alltoall", 2, r"sends about 387 MiB", "alltoall"),
    "little to send": Line(_like(LARGE, tokens_per_rank=512), NODES_OF_8, "alltoall", 1, r"about 12 MiB", "alltoall"),
    "twice the bytes of a value": Line(
        _like(LARGE, tokens_per_rank=700, dtype=torch.float32), NODES_OF_8, "alltoall", 2, r"about 33 MiB", "alltoall"
    ),
    "half of that": Line(_like(LARGE, tokens_per_rank=700), NODES_OF_8, "alltoall", 1, r"about 17 MiB", "alltoall"),
}


def _check(line: Line) -> None:
    plan = plan_dispatch(line.set_dispatcher, line.set_chunks, line.situation, line.options)
    assert (plan.dispatcher, plan.overlap_chunks) == (line.dispatcher, line.chunks), plan.reason
    assert re.search(line.reason, plan.reason), plan.reason
    chunks = "1 chunk" if line.chunks == 1 else f"{line.chunks} chunks"
    assert str(plan) == f"{line.dispatcher}, {chunks}: {plan.reason}"


@pytest.fixture
def deepep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of that name can be imported."""
    monkeypatch.setitem(sys.modules, "deep_ep", cast(Any, Double()))


@pytest.fixture
def no_deepep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)


@pytest.mark.usefixtures("deepep")
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_set_is_used_though_deepep_is_there(name: str) -> None:
    _check(SETTINGS[name])


@pytest.mark.usefixtures("deepep")
@pytest.mark.parametrize("name", NODES)
def test_on_a_cpu_the_nodes_decide(name: str) -> None:
    _check(NODES[name])


@pytest.mark.usefixtures("no_deepep")
@pytest.mark.parametrize("name", NODES)
def test_on_a_gpu_without_deepep_the_nodes_decide_and_the_reason_says_what_is_missing(name: str) -> None:
    line = NODES[name]
    if line.options.ranks_per_node == 0 and torch.cuda.is_available():
        pytest.skip("nodes are as large as this machine")
    plan = plan_dispatch("auto", 1, _like(line.situation, device=GPU), line.options)
    assert plan.dispatcher == line.dispatcher
    assert re.search(f"{line.reason}.*without deepep .its library is not installed", plan.reason), plan.reason


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_are_by_what_a_rank_sends(name: str) -> None:
    _check(CHUNKS[name])


@pytest.mark.usefixtures("deepep")
def test_on_a_gpu_deepep_is_taken_where_it_can() -> None:
    plan = plan_dispatch("auto", 0, LARGE, NODES_OF_8)
    assert (plan.dispatcher, plan.overlap_chunks) == ("deepep", 2)
    assert plan.reason.startswith("its library is installed and takes these sizes; ")
    for changes, why in (
        ({"dtype": torch.float32}, r"without deepep \(sends bfloat16, not torch.float32\)"),
        ({"hidden_size": 1000}, r"without deepep \(needs a hidden size that is a multiple of 256, not 1000\)"),
        ({"top_k": 40}, r"without deepep \(takes 32 experts per token at most, not 40\)"),
        ({"num_experts": 4096}, r"without deepep \(takes 2048 experts .* not 4096 and 256\)"),
    ):
        plan = plan_dispatch("auto", 0, _like(LARGE, **changes), NODES_OF_8)
        assert plan.dispatcher == "hierarchical"
        assert re.search(why, plan.reason), plan.reason


@pytest.mark.usefixtures("deepep")
def test_a_wire_of_the_users_keeps_to_dispatchers_that_have_one() -> None:
    plan = plan_dispatch("auto", 0, LARGE, DispatchOptions(8, Wire("fp8")))
    assert plan.dispatcher == "hierarchical"


def test_an_api_that_deepep_lacks_is_no_deepep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", cast(Any, Double(elastic=False)))
    few = _like(LARGE, num_ranks=4)
    assert plan_dispatch("auto", 0, few, DispatchOptions(2)).dispatcher == "deepep"
    options = DispatchOptions(2, deepep=DeepEPOptions("elastic"))
    assert plan_dispatch("auto", 0, few, options).dispatcher == "hierarchical"


def test_ranks_that_deepeps_buffer_does_not_run_on_are_no_deepep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", cast(Any, Double(elastic=False)))
    plan = plan_dispatch("auto", 0, _like(LARGE, num_ranks=3), DispatchOptions())
    assert plan.dispatcher == "alltoall"
    assert "Buffer does not run on 3 ranks" in plan.reason
