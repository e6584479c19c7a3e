"""One-sided exchanges: `alltoall` bit by bit, by virtual ranks of this process and by processes; races; time-outs.

Virtual ranks take turns, phase by phase, which shows that no kernel waits for a later launch: one that did would wait
until it gave up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from crossdock import MoEConfig
from crossdock.comm import VirtualRanks, Wire
from crossdock.dispatch import (
    AUTO_DISPATCHER,
    Dispatched,
    DispatchOptions,
    DispatchSituation,
    ExchangeBuffers,
    RankTimeout,
    SymmetricDispatcher,
    plan_dispatch,
    symmetric,
)
from crossdock.kernels import dequantize_fp8, quantize_fp8_reference, runtime
from crossdock.kernels.symmetric import RowLayout, kernels_run, place_tokens
from tests.dispatch.test_static import _NoSyncs

pytestmark = pytest.mark.skipif(runtime.tl is None, reason="needs Triton: pip install triton")

H, SLOTS, CAPACITY = 24, 3, 7
DEVICE = torch.device("cpu" if runtime.INTERPRETED else "cuda")
HAS_DEVICE = kernels_run(DEVICE) and (DEVICE.type == "cpu" or torch.cuda.is_available())
virtual = pytest.mark.skipif(not HAS_DEVICE, reason="needs a GPU, or TRITON_INTERPRET=1")


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
def test_exchanges_may_end_in_any_order_or_never() -> None:
    """As in a recompute of activations: the first is open all the while, and some are let go."""
    layout = RowLayout(2, 2, H, 0, torch.float32)
    ranks = buffers_of(2, 3, 0.3, layout)
    places = place_tokens(torch.tensor([[SLOTS], [0]], device=DEVICE), SLOTS, 2)

    def begin(value: float) -> list[Any]:
        return [b.send(torch.full((2, H), value * 10**b.window.rank, device=DEVICE), places, layout) for b in ranks]

    def end(exchanges: list[Any]) -> list[float]:
        received = [each.receive(layout, None, 2, torch.float32, with_routes=False) for each in exchanges]
        return received[0].tokens[:, 0].tolist()

    first = begin(1.0)
    for value in range(2, 9):
        second, third = begin(float(value)), begin(-float(value))
        assert end(third) == [-value, -10 * value]
        if value % 2:
            assert end(second) == [value, 10 * value]
        del second, third
    assert end(first) == [1, 10]
    settle()
    for buffers in ranks:
        buffers.check()


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
    assert [int(b._counters[0]) for b in ranks] == [6, 6]


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
