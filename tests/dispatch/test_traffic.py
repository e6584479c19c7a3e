"""What a dispatcher says that it sent is what the collectives were given, and the least is the least."""

from __future__ import annotations

from itertools import product
from math import comb, prod
from typing import Any, Literal, NamedTuple, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from crossdock import MoE, MoEConfig, RouterConfig, apply_ep
from crossdock.dispatch import (
    HierarchicalDispatcher,
    LocalDispatcher,
    Nodes,
    StaticDispatcher,
    build_dispatcher,
)
from crossdock.dispatch.traffic import Traffic, TrafficMeter
from crossdock.parallel.recompute import ActivationCheckpointConfig, apply_activation_checkpoint
from tests.ranks import RankPool

H, K, EXPERTS, WORLD, RANKS_PER_NODE = 256, 3, 8, 4, 2
Mode = Literal["none", "full", "selective"]
MODES: tuple[Mode, ...] = get_args(Mode)
WIRES: dict[str, dict[str, Any]] = {
    "same": {},
    "fp8 tokens": {"wire_dtype": "fp8"},
    "fp8 both": {"wire_dtype": "fp8", "wire_directions": "both"},
}
CASES: list[tuple[str, Mode]] = [*product(("same",), MODES), ("fp8 tokens", "none"), ("fp8 both", "full")]


class _Counter(TorchDispatchMode):
    """Counts the bytes that collectives are given for other ranks. No metadata of these tests has rows of 200 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.within = self.between = self.metadata = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" and kind != "wait_tensor":
            rows, *_, group_name = args
            group = dist.distributed_c10d._resolve_process_group(group_name)
            assert kind in ("all_to_all_single", "all_gather_into_tensor")
            per_rank = args[2] if kind == "all_to_all_single" else [len(rows)] * group.size()
            row_bytes = prod(rows.shape[1:]) * rows.dtype.itemsize
            for rank, count in zip(dist.get_process_group_ranks(group), per_rank, strict=True):
                if rank == dist.get_rank():
                    continue
                if row_bytes < 200:
                    self.metadata += count * row_bytes
                elif rank // RANKS_PER_NODE == dist.get_rank() // RANKS_PER_NODE:
                    self.within += count * row_bytes
                else:
                    self.between += count * row_bytes
        return func(*args, **(kwargs or {}))


class _Block(nn.Module):
    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.moe = MoE(H, 8, RouterConfig(EXPERTS, K), config)
        self.moe.router.reset_parameters(std=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x)


class Sent(NamedTuple):
    """What was counted beside the dispatchers, what these say, and the rows per direction that are the least."""

    counted: tuple[int, int, int]
    traffic: Traffic
    least_rows: tuple[int, int]


def _steps(dispatcher_name: Any, static: bool) -> dict[tuple[str, Mode], Sent]:
    """Two blocks, in two chunks where shapes are not static; tokens of a different number on each rank, one without."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ep",))
    results = {}
    for wire, mode in CASES:
        torch.manual_seed(0)
        config = MoEConfig(
            dispatcher_name,
            overlap_chunks=1 if static else 2,
            ranks_per_node=RANKS_PER_NODE,
            static_shapes=static,
            experts="grouped_mm" if static else "eager",
            sequence_aux_loss_coeff=0.1,
            **WIRES[wire],
        )
        blocks = nn.ModuleList([_Block(config), _Block(config)])
        apply_activation_checkpoint(apply_ep(blocks, mesh), ActivationCheckpointConfig(mode))
        layers = [module for module in blocks.modules() if isinstance(module, MoE)]
        assert isinstance(layers[0].dispatcher, StaticDispatcher) == static
        chosen: list[Tensor] = []

        def keep(router: nn.Module, args: Any, routing: Any, chosen: list[Tensor] = chosen) -> None:
            chosen.append(routing.expert_ids)

        for layer in layers:
            layer.router.register_forward_hook(keep)
        with _Counter() as counter:
            torch.manual_seed(10 + rank)
            out = torch.randn(0 if rank == 2 else 9 + rank, H).requires_grad_()
            for block in blocks:
                out = block(out)
            within, between = _least_rows(torch.cat(chosen), rank)
            out.square().sum().backward()
        traffic = sum((layer.dispatcher.traffic for layer in layers), Traffic())
        results[wire, mode] = Sent((counter.within, counter.between, counter.metadata), traffic, (within, between))
    return results


def _least_rows(expert_ids: Tensor, rank: int) -> tuple[int, int]:
    """Within nodes and between them, by the definition."""
    within = between = 0
    for experts in expert_ids.tolist():
        ranks = {expert // (EXPERTS // WORLD) for expert in experts} - {rank}
        nodes = {other // RANKS_PER_NODE for other in ranks} - {rank // RANKS_PER_NODE}
        between += len(nodes)
        within += len(ranks) - len(nodes)
    return within, between


Results = tuple[str, list[dict[tuple[str, Mode], Sent]]]


@pytest.fixture(
    scope="module",
    params=[("allgather", False), ("alltoall", False), ("hierarchical", False), ("alltoall", True)],
    ids=["allgather", "alltoall", "hierarchical", "static"],
)
def results(request: pytest.FixtureRequest, ranks: RankPool) -> Results:
    name, static = request.param
    return "static" if static else name, ranks.run(WORLD, _steps, name, static)


def test_what_is_reported_is_what_the_collectives_were_given(results: Results) -> None:
    """Forward, backward, and again where a block is recomputed; with the wire's scales; metadata too."""
    name, by_rank = results
    # With static shapes the first call's counts are exchanged out of sight of modes, in each layer.
    unseen = 2 * 32 * (WORLD - 1) if name == "static" else 0
    for of_rank in by_rank:
        for (wire, mode), (counted, traffic, _) in of_rank.items():
            assert (traffic.within, traffic.between, traffic.metadata - unseen) == counted, f"{wire}, {mode}"
            assert min(counted) > 0


def test_the_least_is_by_definition_in_the_size_of_each_direction(results: Results) -> None:
    """Four times: tokens, results and the gradients of both. fp8 has 256 values and two scales, fp32 4 bytes each."""
    _, by_rank = results
    for wire, there, others in (("same", 1024, 1024), ("fp8 tokens", 264, 1024)):
        sums = {"within": 0, "between": 0, "expected within": 0, "expected between": 0}
        for of_rank in by_rank:
            _, traffic, (within, between) = of_rank[wire, "none"]
            sums["within"] += traffic.least_within
            sums["between"] += traffic.least_between
            sums["expected within"] += within * (there + 3 * others)
            sums["expected between"] += between * (there + 3 * others)
        assert sums["within"] == sums["expected within"] > 0
        assert sums["between"] == sums["expected between"] > 0


def test_nothing_is_sent_in_fewer_bytes_and_what_promises_the_least_sends_it(results: Results) -> None:
    """Under recompute as well: what is sent again is in both numbers."""
    name, by_rank = results
    for wire, mode in CASES:
        in_all = sum((of_rank[wire, mode].traffic for of_rank in by_rank), Traffic())
        sent, least = in_all.within + in_all.between, in_all.least_within + in_all.least_between
        assert in_all.between >= in_all.least_between
        assert sent >= least
        if name == "alltoall":
            assert sent == least
        if name == "hierarchical":
            assert in_all.between == in_all.least_between


def test_recompute_counts_what_it_sends_again_and_selective_recompute_nothing(results: Results) -> None:
    _, by_rank = results
    for of_rank in by_rank:
        none, full, selective = (of_rank["same", mode].traffic for mode in MODES)
        assert selective == none
        assert full.between > none.between
        assert full.metadata > none.metadata


def _uniform() -> tuple[Traffic, int]:
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    torch.manual_seed(rank)
    slot_ids = torch.rand(4096, 128).topk(8, dim=1).indices
    dispatcher = build_dispatcher("alltoall", group, 16)
    x = torch.zeros(4096, 8, dtype=torch.bfloat16)
    arrived = dispatcher.dispatch(x, slot_ids, torch.ones(slot_ids.shape)).wait()
    dispatcher.combine(arrived.tokens, arrived.handle).wait()
    return dispatcher.traffic, int((slot_ids // 16 != rank).sum())


def test_uniform_routing_sends_a_third_less_than_a_copy_per_route(ranks: RankPool) -> None:
    """8 of 128 experts miss the 16 of a rank with probability `C(112, 8) / C(128, 8) = 0.335`. The mean number of ranks
    of 32,768 tokens has a standard error of 0.1 %."""
    by_rank = ranks.run(8, _uniform)
    missed = comb(112, 8) / comb(128, 8)
    row_bytes = 2 * 8 * 2
    sent = sum(traffic.within + traffic.between for traffic, _ in by_rank)
    assert sent / row_bytes == pytest.approx(8 * 4096 * 7 * (1 - missed), rel=0.005)
    per_route = row_bytes * sum(routes for _, routes in by_rank)
    assert sent / per_route == pytest.approx(1 - missed, rel=0.005)
    assert missed == pytest.approx(1 / 3, abs=0.005)


def _limited(topk_group: int) -> tuple[int, int]:
    """Bytes between 4 nodes of 2 ranks in a forward pass, and tokens; the experts' 4 groups are the nodes'."""
    mesh = init_device_mesh("cpu", (8,), mesh_dim_names=("ep",))
    torch.manual_seed(0)
    config = MoEConfig("hierarchical", ranks_per_node=2, experts="eager")
    moe = MoE(16, 8, RouterConfig(32, 6, n_group=4, topk_group=topk_group), config)
    moe.router.reset_parameters(std=1.0)
    apply_ep(nn.ModuleList([moe]), mesh)
    assert isinstance(moe.dispatcher, HierarchicalDispatcher)
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        moe(torch.randn(100, 16))
    return moe.dispatcher.traffic.between, 100


def test_node_limited_routing_bounds_what_crosses_between_nodes(ranks: RankPool) -> None:
    for limit in (1, 2, 4):
        by_rank = ranks.run(8, _limited, limit)
        rows = sum(sent for sent, _ in by_rank) / (2 * 16 * 4)
        tokens = sum(tokens for _, tokens in by_rank)
        assert 0 < rows <= limit * tokens
        if limit == 4:
            assert rows > 2 * tokens, "no limit; 3 (1 - C(24, 6) / C(32, 6)) = 2.55 other nodes if uniform"


def _uneven() -> tuple[Traffic, Traffic]:
    """Least of all tokens with 3 ranks on nodes 0, 1, 0 and each on a node of its own, by a meter alone."""
    assert dist.group.WORLD is not None
    needed = torch.tensor([[True, True, True], [False, True, False], [True, False, True]])
    results = []
    for nodes in (Nodes((0, 1, 0)), Nodes((0, 1, 2))):
        meter = TrafficMeter(dist.group.WORLD, nodes)
        meter.rows(meter.needs(needed))([5, 6, 7], 10)
        results.append(meter.traffic)
    return results[0], results[1]


def test_nodes_need_not_be_alike(ranks: RankPool) -> None:
    uneven, single = ranks.run(3, _uneven)[0]
    assert uneven == Traffic(within=70, between=60, least_within=20, least_between=20)
    assert single == Traffic(within=0, between=130, least_within=0, least_between=40)


def test_one_rank_sends_nothing() -> None:
    dispatcher = LocalDispatcher(4)
    arrived = dispatcher.dispatch(torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)).wait()
    dispatcher.combine(arrived.tokens, arrived.handle).wait()
    assert dispatcher.traffic == Traffic()
