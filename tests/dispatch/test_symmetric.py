"""One-sided exchanges: `alltoall` bit by bit, by virtual ranks of this process and by processes; races; time-outs.

Virtual ranks take turns, phase by phase, which shows that no kernel waits for a later launch: one that did would wait
until it gave up.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from crossdock import MoE, MoEConfig, RouterConfig, apply_ep
from crossdock.comm import SharedFiles, VirtualRanks, Wire
from crossdock.dispatch import (
    AUTO_DISPATCHER,
    Dispatched,
    DispatchOptions,
    DispatchSituation,
    ExchangeBuffers,
    Nodes,
    RankFailure,
    RankTimeout,
    SymmetricDispatcher,
    build_dispatcher,
    plan_dispatch,
    symmetric,
    symmetric_problem,
)
from crossdock.kernels import dequantize_fp8, quantize_fp8_reference, runtime
from crossdock.kernels.symmetric import RowLayout, kernels_run, place_tokens
from crossdock.parallel.recompute import ActivationCheckpointConfig, apply_activation_checkpoint
from tests.dispatch.recorder import Recorder
from tests.dispatch.test_static import _NoSyncs
from tests.ranks import RankPool

pytestmark = pytest.mark.skipif(runtime.tl is None, reason="needs Triton: pip install triton")

H, SLOTS, CAPACITY = 24, 3, 7
DEVICE = torch.device("cpu" if runtime.INTERPRETED else "cuda")
HAS_DEVICE = kernels_run(DEVICE) and (DEVICE.type == "cpu" or torch.cuda.is_available())
virtual = pytest.mark.skipif(not HAS_DEVICE, reason="needs a GPU, or TRITON_INTERPRET=1")
processes = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1: processes over gloo")


def settle() -> None:
    """Let the GPU finish what was launched."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Inputs(NamedTuple):
    """Of all ranks: `x [T, H]`, `slot_ids [T, K]`, `weights [T, K]`, and the gradient of the output `[T, H]`."""

    x: list[Tensor]
    slot_ids: list[Tensor]
    weights: list[Tensor]
    grad: list[Tensor]


def draw(tokens: Sequence[int], top_k: int, dtype: torch.dtype, pattern: str = "any", hidden: int = H) -> Inputs:
    inputs = Inputs([], [], [], [])
    num_slots = len(tokens) * SLOTS
    wide = torch.promote_types(dtype, torch.float32)
    for num_tokens in tokens:
        scores = torch.rand(num_tokens, num_slots)
        if pattern == "one destination":
            scores[:, :SLOTS] += 2
        slot_ids = scores.topk(top_k, dim=1).indices
        if pattern == "missing":
            slot_ids[torch.rand(slot_ids.shape) < 0.5] = -1
        if pattern == "no routes":
            slot_ids.fill_(-1)
        inputs.slot_ids.append(slot_ids.to(DEVICE))
        inputs.weights.append(torch.rand(num_tokens, top_k, dtype=wide).to(DEVICE))
        for drawn in (inputs.x, inputs.grad):
            drawn.append(torch.randn(num_tokens, hidden, dtype=torch.float64).to(dtype).to(DEVICE))
    return inputs


def experts(arrived: Dispatched, rank: int) -> Tensor:
    """`y = scale tanh(x sum_k w_k factor(slot_k))`, another scale on each rank; NaN where no token is."""
    factors = torch.where(arrived.slot_ids < 0, 0, arrived.slot_ids + rank * SLOTS + 1).to(arrived.weights.dtype)
    gate = (arrived.weights * factors).sum(dim=1, keepdim=True)
    y = (arrived.tokens.to(gate.dtype) * gate).tanh() * (1 + rank / 8)
    routed = (arrived.slot_ids >= 0).any(dim=1, keepdim=True)
    return torch.where(routed, y, torch.nan).to(arrived.tokens.dtype)


def independent(inputs: Inputs) -> list[dict[str, Tensor]]:
    """Of each rank: the output and the gradients, token by token and rank by rank: sums in rank order, rounded once."""
    results = []
    for x, slot_ids, weights, grad in zip(*inputs, strict=True):
        dtype, wide = x.dtype, weights.dtype
        out, grad_x = torch.zeros_like(x, dtype=wide), torch.zeros_like(x, dtype=wide)
        grad_weights = torch.zeros_like(weights)
        for rank in range(len(inputs.x)):
            local = slot_ids - rank * SLOTS
            own = (slot_ids >= 0) & (local >= 0) & (local < SLOTS)
            tokens = own.any(dim=1).nonzero().flatten()
            rows = x[tokens].detach().requires_grad_()
            row_weights = weights[tokens].masked_fill(~own[tokens], 0).detach().requires_grad_()
            ids = local[tokens].masked_fill(~own[tokens], -1)
            y = experts(Dispatched(rows, ids, row_weights, ()), rank)
            y.backward(grad[tokens])
            assert rows.grad is not None
            assert row_weights.grad is not None
            out[tokens] += y.detach().to(wide)
            grad_x[tokens] += rows.grad.to(wide)
            grad_weights[tokens] += row_weights.grad.masked_fill(~own[tokens], 0)
        results.append({"out": out.to(dtype), "x": grad_x.to(dtype), "weights": grad_weights})
    return results


def virtual_ranks(num_ranks: int, chunks: int = 1, **options: Any) -> list[SymmetricDispatcher]:
    memory = VirtualRanks(num_ranks)
    return [
        SymmetricDispatcher.of_virtual_rank(memory.of(rank), rank, num_ranks, SLOTS, CAPACITY, chunks=chunks, **options)
        for rank in range(num_ranks)
    ]


def round_trip(dispatchers: list[SymmetricDispatcher], inputs: Inputs) -> list[dict[str, Tensor]]:
    """All ranks phase by phase, backward as well: autograd runs nodes in the reverse of the order they were made in."""
    xs, weights = ([tensor.clone().requires_grad_() for tensor in tensors] for tensors in (inputs.x, inputs.weights))
    arriving = [
        dispatcher.dispatch(x, ids, w)
        for dispatcher, x, ids, w in zip(dispatchers, xs, inputs.slot_ids, weights, strict=True)
    ]
    arrived = [pending.wait() for pending in arriving]
    returning = [
        dispatcher.combine(experts(rows, rank), rows.handle)
        for rank, (dispatcher, rows) in enumerate(zip(dispatchers, arrived, strict=True))
    ]
    outs = [pending.wait() for pending in returning]
    torch.autograd.backward(outs, inputs.grad)
    return [
        {"out": out.detach(), "x": grad(x), "weights": grad(w)} for out, x, w in zip(outs, xs, weights, strict=True)
    ]


def grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def assert_equal(ours: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for rank, (mine, wanted) in enumerate(zip(ours, expected, strict=True)):
        for name, value in wanted.items():
            assert mine[name].dtype == value.dtype
            assert torch.equal(mine[name], value), f"{name} of rank {rank}"


@virtual
@pytest.mark.parametrize("top_k", range(1, 9))
def test_virtual_ranks_equal_an_independent_loop_bit_by_bit(top_k: int) -> None:
    """Twice, in other numbers of tokens, the last rank idle at first; each time the ring turns twice."""
    torch.manual_seed(top_k)
    dtype = (torch.float32, torch.bfloat16, torch.float64)[top_k % 3]
    dispatchers = virtual_ranks(4)
    for tokens in ((7, 3, 1, 0), (2, 7, 7, 5)):
        inputs = draw(tokens, top_k, dtype)
        assert_equal(round_trip(dispatchers, inputs), independent(inputs))


@virtual
@pytest.mark.parametrize(
    ("tokens", "pattern"),
    [((0, 0), "any"), ((0, 5), "any"), ((7, 7), "one destination"), ((4, 6), "missing"), ((3, 3), "no routes")],
    ids=str,
)
def test_unusual_routes_of_virtual_ranks(tokens: tuple[int, ...], pattern: str) -> None:
    torch.manual_seed(sum(tokens))
    dispatchers = virtual_ranks(2)
    for _ in range(3):
        inputs = draw(tokens, 3, torch.bfloat16, pattern)
        assert_equal(round_trip(dispatchers, inputs), independent(inputs))


@virtual
def test_padding_has_no_route_and_no_number_but_zero() -> None:
    torch.manual_seed(0)
    dispatchers = virtual_ranks(3)
    for tokens in ((7, 7, 7), (2, 0, 5), (1, 1, 1)):  # later rows would show what earlier ones left
        inputs = draw(tokens, 2, torch.float32)
        arriving = [d.dispatch(*of_rank) for d, *of_rank in zip(dispatchers, *inputs[:3], strict=True)]
        for rank, pending in enumerate(arriving):
            arrived = pending.wait()
            assert arrived.tokens.shape == (3 * CAPACITY, H)
            for source in range(3):
                owners = inputs.slot_ids[source] // SLOTS == rank
                tokens_of = inputs.x[source][owners.any(dim=1)]
                rows = arrived.tokens[source * CAPACITY :][:CAPACITY]
                assert torch.equal(rows[: len(tokens_of)], tokens_of), "in the order of the source's tokens"
                assert (rows[len(tokens_of) :] == 0).all()
            padding = (arrived.tokens == 0).all(dim=1)
            assert (arrived.slot_ids[padding] == -1).all()
            assert (arrived.weights[padding] == 0).all()
            dispatchers[rank].combine(arrived.tokens, arrived.handle)
            # Nobody waits for what was combined: the last slot is free all the same.
        dispatchers = virtual_ranks(3)


@virtual
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_rows_are_quantised_as_the_wire_does(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    hidden, dispatchers = 272, virtual_ranks(2, wire=Wire("fp8", both=True))
    inputs = draw((5, 7), 2, dtype, hidden=hidden)
    arriving = [d.dispatch(*of_rank) for d, *of_rank in zip(dispatchers, *inputs[:3], strict=True)]
    arrived = [pending.wait() for pending in arriving]

    def coded(rows: Tensor) -> Tensor:
        return dequantize_fp8(*quantize_fp8_reference(rows.cpu()), dtype)

    for rank, rows in enumerate(arrived):
        sent = [x[(ids // SLOTS == rank).any(dim=1)] for x, ids in zip(inputs.x, inputs.slot_ids, strict=True)]
        got = rows.tokens.cpu()
        for source, tokens in enumerate(sent):
            assert torch.equal(got[source * CAPACITY :][: len(tokens)], coded(tokens))
            assert not torch.equal(coded(tokens), tokens.cpu()), "nothing was rounded"
    returning = [d.combine(rows.tokens + 0.1, rows.handle) for d, rows in zip(dispatchers, arrived, strict=True)]
    for x, ids, pending in zip(inputs.x, inputs.slot_ids, returning, strict=True):
        ranks = torch.stack([(ids // SLOTS == rank).any(dim=1) for rank in range(2)], dim=1).sum(dim=1).cpu()
        back = coded(coded(x) + 0.1).float()
        assert torch.equal(pending.wait().cpu(), (back * ranks[:, None]).to(dtype))


def buffers_of(num_ranks: int, num_slots: int, timeout: float, layout: RowLayout) -> list[ExchangeBuffers]:
    memory = VirtualRanks(num_ranks)
    return [
        ExchangeBuffers(memory.of(rank), num_ranks, num_slots, layout.slot_bytes, DEVICE, timeout, side_stream=False)
        for rank in range(num_ranks)
    ]


@virtual
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_fast_rank_does_not_overwrite_what_a_slow_one_still_reads(num_slots: int) -> None:
    """Rank 0 runs ahead of rank 1, which has not read exchange 1, until it needs that slot again."""
    layout = RowLayout(2, 4, H, 1, torch.float32)
    fast, slow = buffers_of(2, num_slots, 0.3, layout)
    places = place_tokens(torch.tensor([[SLOTS], [0]], device=DEVICE), SLOTS, 2)  # a row for each rank

    def begin(buffers: ExchangeBuffers, value: float) -> Any:
        return buffers.send(torch.full((2, H), value, device=DEVICE), places, layout)

    begun = [(begin(fast, number), begin(slow, -number)) for number in range(1, num_slots + 1)]
    for mine, _ in begun:  # rank 0 has read everything
        mine.receive(layout, None, 2, torch.float32, with_routes=False)
    assert fast.status.code == 0
    begin(fast, 99.0)  # waits for rank 1, and gives up
    settle()
    with pytest.raises(
        RankTimeout, match=r"rank 1 of the 2 .* did not finish reading an earlier exchange's rows within 0\.3 s"
    ):
        fast.check()
    for number, (_, theirs) in enumerate(begun, start=1):
        arrived = theirs.receive(layout, None, 2, torch.float32, with_routes=False)
        assert arrived.tokens[:, 0].tolist() == [number, -number]
    with pytest.raises(RankTimeout):
        begin(fast, 100.0)


@virtual
def test_a_combine_is_not_overwritten_before_all_have_read_it() -> None:
    """Rank 0 has read what it wanted of exchange 1 and offers other rows; rank 1 reads the first ones all the same."""
    layout = RowLayout(2, 2, H, 0, torch.float32)
    fast, slow = buffers_of(2, 2, 0.3, layout)
    segments = torch.tensor([[0, 1], [1, 1]], device=DEVICE)
    row = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)  # a token that needs both ranks
    first = [
        b.offer(torch.full((2, H), float(10**b.window.rank), device=DEVICE), segments, layout) for b in (fast, slow)
    ]
    out, _ = first[0].collect(layout, row, torch.float32)
    assert (out == 11).all()
    fast.offer(torch.full((2, H), 5.0, device=DEVICE), segments, layout)
    assert fast.status.code == 0
    out, _ = first[1].collect(layout, row, torch.float32)
    assert (out == 11).all(), "the second exchange has the other slot"
    second = slow.offer(torch.full((2, H), 7.0, device=DEVICE), segments, layout)
    assert (second.collect(layout, row, torch.float32)[0] == 12).all()


@virtual
def test_a_rank_that_never_comes_is_given_up_on_and_named() -> None:
    torch.manual_seed(0)
    dispatchers = virtual_ranks(3, timeout=0.3)
    inputs = draw((4, 5, 6), 2, torch.float32)
    arriving = [
        d.dispatch(*of_rank) for d, *of_rank in zip(dispatchers[:2], *(list(t)[:2] for t in inputs[:3]), strict=True)
    ]
    began = time.monotonic()
    for pending in arriving:
        if DEVICE.type == "cpu":
            with pytest.raises(RankTimeout, match=r"rank 2 of the 3 .* did not send its rows within 0\.3 s"):
                pending.wait()
        else:
            pending.wait()
            settle()
    for dispatcher, x, ids, weights in zip(dispatchers[:2], *inputs[:3], strict=False):
        with pytest.raises(RankTimeout, match="rank 2"):
            dispatcher.dispatch(x, ids, weights)
    assert time.monotonic() - began < 20


@virtual
def test_more_exchanges_than_there_is_room_for_are_refused() -> None:
    layout = RowLayout(1, 2, H, 0, torch.float32)
    (buffers,) = buffers_of(1, 2, 1.0, layout)
    places = place_tokens(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 1, 1)
    x = torch.ones(1, H, device=DEVICE)
    exchanges = [buffers.send(x, places, layout) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"has 2 exchanges begun that nothing has waited for.*overlap_chunks"):
        buffers.send(x, places, layout)
    exchanges[0].receive(layout, None, 1, torch.float32, with_routes=False)
    buffers.send(x, places, layout)


@virtual
def test_an_exchange_syncs_nothing_and_makes_no_shape_of_a_number() -> None:
    """As a CUDA graph needs it: what changes from call to call is on the device."""
    torch.manual_seed(0)
    layout = RowLayout(2, 5, H, 2, torch.float32)
    ranks = buffers_of(2, 2, 10.0, layout)
    for _ in range(3):
        inputs = draw((5, 2), 2, torch.float32)
        with _NoSyncs():
            begun = [
                (b.send(x, place_tokens(ids, SLOTS, 2), layout, ids, w, SLOTS), place_tokens(ids, SLOTS, 2))
                for b, x, ids, w in zip(ranks, *inputs[:3], strict=True)
            ]
            arrived = [exchange.receive(layout, 5, 10, torch.float32) for exchange, _ in begun]
            offered = [
                b.offer(rows.tokens, rows.segments, layout, rows.weights)
                for b, rows in zip(ranks, arrived, strict=True)
            ]
            for exchange, (_, places), ids in zip(offered, begun, inputs.slot_ids, strict=True):
                exchange.collect(layout, places.row, torch.float32, ids, SLOTS)
    assert [int(b._last_ticket) for b in ranks] == [6, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_takes_new_tickets_at_each_replay() -> None:
    torch.manual_seed(0)
    dispatchers = virtual_ranks(2)
    inputs = draw((7, 4), 2, torch.float32)
    round_trip(dispatchers, inputs)  # makes the buffers

    def forward() -> list[Tensor]:
        arriving = [d.dispatch(*of_rank) for d, *of_rank in zip(dispatchers, *inputs[:3], strict=True)]
        arrived = [pending.wait() for pending in arriving]
        returning = [
            d.combine(experts(rows, rank), rows.handle)
            for rank, (d, rows) in enumerate(zip(dispatchers, arrived, strict=True))
        ]
        return [pending.wait() for pending in returning]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = forward()
    for _ in range(5):
        fresh = draw((7, 4), 2, torch.float32)
        for into, values in zip(inputs, fresh, strict=True):
            for old, new in zip(into, values, strict=True):
                old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        for out, expected in zip(outs, independent(inputs), strict=True):
            assert torch.equal(out, expected["out"])


def _stress(rounds: int) -> list[bool]:
    """Ranks that are late in turns, at random, for as many exchanges: does each row arrive as it was sent?"""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    dispatcher = build_dispatcher("symmetric", dist.group.WORLD, SLOTS, DispatchOptions(static_shapes=True))
    delays = np.random.default_rng(rank)
    right = []
    for number in range(rounds):
        torch.manual_seed(number)
        inputs = draw([CAPACITY] * world_size, 2, torch.bfloat16)
        time.sleep(float(delays.random() * 0.05 * (delays.random() < 0.4)))
        pending = dispatcher.dispatch(inputs.x[rank], inputs.slot_ids[rank], inputs.weights[rank])
        time.sleep(float(delays.random() * 0.05 * (delays.random() < 0.4)))
        arrived = pending.wait()
        returning = dispatcher.combine(experts(arrived, rank), arrived.handle)
        time.sleep(float(delays.random() * 0.05 * (delays.random() < 0.4)))
        right.append(torch.equal(returning.wait(), independent(inputs)[rank]["out"]))
    return right


@processes
def test_processes_that_are_late_in_turns_lose_no_row(ranks: RankPool) -> None:
    assert all(all(right) for right in ranks.run(3, _stress, 12))


def _array(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().double().numpy()


class _Block(nn.Module):
    def __init__(self, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.moe = MoE(H, 8, RouterConfig(5, 3), config)
        self.moe.router.reset_parameters(std=1.0)
        self.moe.experts.reset_parameters(std=0.5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def _training(settings: dict[str, Any], mode: Any, dtype: torch.dtype) -> dict[Any, Any]:
    """Two layers of 5 experts, three micro-batches, the last rank without tokens in one: outputs and all gradients."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    results: dict[Any, Any] = {}
    for name in ("alltoall", "symmetric"):
        torch.manual_seed(0)
        blocks = nn.ModuleList([_Block(MoEConfig(name, **settings), dtype) for _ in range(2)])  # type: ignore[arg-type]
        apply_activation_checkpoint(apply_ep(blocks, mesh), ActivationCheckpointConfig(mode))
        values: list[np.ndarray] = []
        with Recorder("symmetric_begin", "symmetric_finish") as recorder:
            for number, tokens in enumerate((6, 5, 3)):
                torch.manual_seed(100 * number + rank)
                x = torch.randn(0 if number == 1 and rank == world_size - 1 else tokens, H, dtype=dtype)
                x.requires_grad_()
                out = x
                for block in blocks:
                    out = block(out)
                out.float().square().sum().backward()
                values += [_array(out), _array(x.grad)]
        values += [_array(parameter.grad) for parameter in blocks.parameters()]
        results[name] = values
        results[name, "exchanges"] = recorder.names.count("symmetric_begin")
        assert recorder.names.count("symmetric_finish") == results[name, "exchanges"]
        dispatcher = next(moe for moe in blocks.modules() if isinstance(moe, MoE)).dispatcher
        results[name, "type"] = type(dispatcher).__name__
        results[name, "rows"] = dispatcher.traffic.within
    return results


LAYERS = {
    "plain": ({}, "none", torch.float32),
    "bfloat16, fp8 both ways": ({"wire_dtype": "fp8", "wire_directions": "both"}, "none", torch.bfloat16),
    "chunks": ({"overlap_chunks": 2, "debug_checks": True}, "none", torch.float32),
    "full recompute": ({}, "full", torch.float32),
    "selective recompute": ({"overlap_chunks": 2}, "selective", torch.float32),
}


@processes
@pytest.mark.parametrize("name", LAYERS)
def test_layers_train_as_with_alltoall_bit_by_bit(name: str, ranks: RankPool) -> None:
    settings, mode, dtype = LAYERS[name]
    passes = 3 if mode == "full" else 2
    for results in ranks.run(2, _training, settings, mode, dtype):
        for ours, theirs in zip(results["symmetric"], results["alltoall"], strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert np.isfinite(ours).all()
        assert results["symmetric", "type"] == "SymmetricDispatcher"
        exchanges = 3 * 2 * 2 * passes * settings.get("overlap_chunks", 1)  # micro-batches, layers, there and back
        assert results["symmetric", "exchanges"] <= exchanges
        if mode != "full":
            assert results["symmetric", "exchanges"] == exchanges, "an exchange was repeated"
        assert results["alltoall", "exchanges"] == 0
        assert results["symmetric", "rows"] == results["alltoall", "rows"] > 0


def _static() -> list[list[np.ndarray]]:
    """Outputs and gradients of batches of several sizes, with `alltoall` and with static shapes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    layers = {}
    for name, settings in (("alltoall", {}), ("symmetric", {"static_shapes": True, "overlap_chunks": 2})):
        torch.manual_seed(0)
        layers[name] = MoE(H, 8, RouterConfig(5, 3), MoEConfig(name, experts="grouped_mm", **settings))  # type: ignore[arg-type]
        layers[name].router.reset_parameters(std=1.0)
        layers[name].experts.reset_parameters(std=0.5)
        apply_ep(nn.ModuleList([layers[name]]), mesh)
    results: list[list[np.ndarray]] = []
    for number, tokens in enumerate((8 - rank, 2 * rank, 0, 8)):
        of_batch = []
        for layer in layers.values():
            torch.manual_seed(100 * number + rank)
            layer.zero_grad()
            x = torch.randn(tokens, H, requires_grad=True)
            out = layer(x)
            out.square().sum().backward()
            of_batch += [_array(value) for value in (out, x.grad, *(p.grad for p in layer.parameters()))]
        half = len(of_batch) // 2
        results += [[ours, theirs] for theirs, ours in zip(of_batch[:half], of_batch[half:], strict=True)]
    dispatcher = layers["symmetric"].dispatcher
    assert isinstance(dispatcher, SymmetricDispatcher)
    assert dispatcher.max_tokens == 4
    with Recorder() as recorder:
        layers["symmetric"](torch.randn(3, H))
    assert recorder.collectives() == [], "counts are exchanged once"
    with pytest.raises(ValueError, match=r"5 tokens are more than the 4 .* largest batch"):
        layers["symmetric"](torch.randn(10, H))
    return results


@processes
def test_static_shapes_compute_the_same_without_an_exchange_of_counts(ranks: RankPool) -> None:
    for results in ranks.run(2, _static):
        for ours, theirs in results:
            assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def _alone(static: bool) -> str:
    """What rank 0 raises where rank 1 stays away, or refuses."""
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    dispatcher = SymmetricDispatcher.of_group(dist.group.WORLD, SLOTS, static_shapes=static, timeout=1.5)
    inputs = draw((4, 4), 2, torch.float32)
    own = (inputs.x[rank], inputs.slot_ids[rank], inputs.weights[rank])
    arrived = dispatcher.dispatch(*own).wait()
    dispatcher.combine(arrived.tokens, arrived.handle).wait()
    if rank == 1:
        if not static:
            dispatcher.refuse(torch.device("cpu"))
        return ""
    try:
        dispatcher.dispatch(*own).wait()
    except (RankFailure, RankTimeout) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@processes
def test_a_process_that_stays_away_ends_the_wait_of_the_others(ranks: RankPool) -> None:
    message, _ = ranks.run(2, _alone, True)
    assert message.startswith("RankTimeout: dispatcher 'symmetric': rank 1 of the 2 that hold the experts did not send")
    message, _ = ranks.run(2, _alone, False)
    assert message.startswith("RankFailure: rank 1 of the 2")


def _growing() -> list[bool]:
    """Batches that grow between forward and backward of an earlier one, which uses the buffers it began with."""
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    dispatcher = build_dispatcher("symmetric", dist.group.WORLD, SLOTS)
    right, outs = [], []
    for tokens in (2, 500, 3):
        torch.manual_seed(tokens)
        inputs = draw((tokens, tokens + 1), 2, torch.float32, hidden=64)
        x = inputs.x[rank].clone().requires_grad_()
        arrived = dispatcher.dispatch(x, inputs.slot_ids[rank], inputs.weights[rank]).wait()
        out = dispatcher.combine(experts(arrived, rank), arrived.handle).wait()
        outs.append((out, x, inputs))
    for out, x, inputs in outs:
        out.backward(inputs.grad[rank])
        expected = independent(inputs)[rank]
        right += [torch.equal(out, expected["out"]), torch.equal(grad(x), expected["x"])]
    return right


@processes
def test_buffers_grow_with_the_batch(ranks: RankPool) -> None:
    assert all(all(right) for right in ranks.run(2, _growing))


def _files() -> tuple[list[str], str]:
    """Mapped files that still have a name, and what ranks on two machines raise."""
    assert dist.group.WORLD is not None
    window = SharedFiles(dist.group.WORLD).allocate(4096, torch.device("cpu"))
    assert len(window.addresses.unique()) == 2
    window.own[window.rank] = 1
    dist.barrier()
    maps = Path("/proc/self/maps").read_text().splitlines()
    left = [line for line in maps if "crossdock-" in line and not line.endswith("(deleted)")]
    name, socket.gethostname = socket.gethostname, lambda: f"host{dist.get_rank()}"
    try:
        with pytest.raises(
            RuntimeError, match="needs ranks of one machine, not of host0, host1; use 'alltoall'"
        ) as caught:
            SharedFiles(dist.group.WORLD).allocate(4096, torch.device("cpu"))
    finally:
        socket.gethostname = name
    dist.barrier()
    return left, str(caught.value)


@processes
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at what is mapped in /proc")
def test_shared_files_leave_nothing_and_refuse_several_machines(ranks: RankPool) -> None:
    for left, message in ranks.run(2, _files):
        assert left == []
        assert message


def _build(options: DispatchOptions) -> str:
    assert dist.group.WORLD is not None
    try:
        return type(build_dispatcher("symmetric", dist.group.WORLD, 1, options)).__name__
    except ValueError as error:
        return str(error)


@processes
def test_what_it_cannot_do_is_refused_in_words(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.run(2, _build, DispatchOptions()) == ["SymmetricDispatcher"] * 2
    for message in ranks.run(2, _build, DispatchOptions(ranks_per_node=1)):
        assert message.startswith(
            "dispatcher 'symmetric' needs ranks that can map each other's memory, those of one NVLink"
        )
        assert message.endswith("use 'alltoall'")
    monkeypatch.setattr(symmetric, "kernels_run", lambda device: False)
    assert "TRITON_INTERPRET=1" in str(symmetric_problem(torch.device("cpu")))
    assert "needs Triton and CUDA" in str(symmetric_problem(torch.device("cuda")))
    assert "2 nodes" in str(symmetric_problem(torch.device("cuda"), Nodes.consecutive(4, 2)))


def test_auto_does_not_pick_it() -> None:
    for device in ("cpu", "cuda"):
        situation = DispatchSituation(8, 128, 8, 2048, torch.bfloat16, torch.device(device), 4096)
        for static in (False, True):
            options = DispatchOptions(static_shapes=static)
            assert plan_dispatch(AUTO_DISPATCHER, 0, situation, options).dispatcher != "symmetric"
    assert plan_dispatch("symmetric", 0, situation, options).dispatcher == "symmetric"


def test_settings_choose_it() -> None:
    MoEConfig("symmetric").check()
    MoEConfig("symmetric", static_shapes=True, wire_dtype="fp8", overlap_chunks=2).check()
    assert Path(symmetric.__file__).name == "symmetric.py"
