"""Kernels of one-sided exchanges beside their references, byte by byte; compiled for Hopper; waits that give up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crossdock.comm import VirtualRanks
from crossdock.kernels import FP8_GROUP
from crossdock.kernels.symmetric import (
    NEVER_RELEASED,
    Ring,
    RowLayout,
    Status,
    await_arrivals,
    await_arrivals_reference,
    offer_rows,
    offer_rows_reference,
    offer_weights,
    offer_weights_reference,
    open_exchange,
    open_exchange_reference,
    place_tokens,
    place_tokens_reference,
    pull_rows,
    pull_rows_reference,
    pull_weights,
    pull_weights_reference,
    push_routes,
    push_routes_reference,
    push_rows,
    push_rows_reference,
    send_signals,
    send_signals_reference,
    take_routes,
    take_routes_reference,
    take_rows,
    take_rows_reference,
)

ROOT = Path(__file__).parents[2]
R, SLOTS, TICKET = 3, 4, 5


def draw_ids(num_tokens: int, top_k: int, seed: int, num_ranks: int = R) -> Tensor:
    """Some routes missing, and all of the first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, num_ranks * SLOTS, generator=generator).topk(top_k, dim=1).indices
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
    ids[:1] = -1
    return ids


@pytest.mark.parametrize("num_tokens", [0, 1, 64, 150])
@pytest.mark.parametrize("top_k", range(1, 9))
def test_places_are_counted_in_the_order_of_tokens(num_tokens: int, top_k: int, device: torch.device) -> None:
    slot_ids = draw_ids(num_tokens, top_k, seed=top_k)
    row, counts = place_tokens(slot_ids.to(device), SLOTS, R)
    expected = place_tokens_reference(slot_ids, SLOTS, R)
    assert torch.equal(row.cpu(), expected.row)
    assert torch.equal(counts.cpu(), expected.counts)
    for rank in range(R):
        needing = [
            token for token, ids in enumerate(slot_ids.tolist()) if any(i >= 0 and i // SLOTS == rank for i in ids)
        ]
        assert row[needing, rank].tolist() == list(range(len(needing)))
        assert int((row[:, rank] >= 0).sum()) == len(needing)


class World:
    """Buffers of random bytes, so that whatever is written besides is seen, and copies for the references."""

    def __init__(self, layout: RowLayout, device: torch.device) -> None:
        self.layout, self.ring = layout, Ring(R, 2, layout.slot_bytes + 1024)
        memory = VirtualRanks(R)
        self.windows = [memory.of(rank).allocate(self.ring.num_bytes, device) for rank in range(R)]
        for window in self.windows:
            window.own[self.ring.first_byte :] = torch.randint(0, 256, (self.ring.num_bytes - self.ring.first_byte,))
        self.references = [window.own.cpu().clone() for window in self.windows]
        self.ticket = torch.tensor([TICKET], device=device)
        self.status = Status.fresh(device)

    def assert_same(self) -> None:
        for window, reference in zip(self.windows, self.references, strict=True):
            assert torch.equal(window.own.cpu(), reference)


def bits(values: Tensor) -> Tensor:
    return values.detach().cpu().contiguous().view(torch.uint8)


CASES = [
    (torch.float32, torch.float32, 40),
    (torch.bfloat16, torch.bfloat16, 1032),
    (torch.float64, torch.float64, 7),
    (torch.float16, torch.float16, 24),
    (torch.float32, torch.bfloat16, 24),
    (torch.float64, torch.float16, 24),
    (torch.bfloat16, torch.float8_e4m3fn, 300),
    (torch.float32, torch.float8_e4m3fn, 130),
    (torch.float16, torch.float8_e4m3fn, 128),
    (torch.float64, torch.float8_e4m3fn, 256),
]


@pytest.mark.parametrize(("dtype", "wire", "hidden"), CASES, ids=str)
def test_rows_travel_as_the_references_say(
    dtype: torch.dtype, wire: torch.dtype, hidden: int, device: torch.device
) -> None:
    """Every byte of every buffer, and every value read; -0, NaN and infinity as they are, where nothing is rounded."""
    torch.manual_seed(hidden)
    layout = RowLayout(R, 9, hidden, 3, wire, torch.promote_types(dtype, torch.float32))
    world = World(layout, device)
    xs = [(torch.randn(count, hidden) * torch.rand(count, 1) * 9).to(dtype) for count in (9, 0, 5)]
    if wire == dtype:
        xs[0][0, :4] = torch.tensor([torch.nan, -0.0, torch.inf, -torch.inf], dtype=dtype)
    ids = [draw_ids(len(x), 3, seed) for seed, x in enumerate(xs)]
    ids[0][0] = torch.tensor([0, 5, 11])
    places = [place_tokens_reference(slot_ids, SLOTS, R) for slot_ids in ids]
    for rank, (x, place) in enumerate(zip(xs, places, strict=True)):
        window = world.windows[rank]
        push_rows(x.to(device), place.row.to(device), window, world.ring, layout, world.ticket, world.status)
        push_rows_reference(x, place.row, world.references, rank, world.ring, layout, TICKET)
        world.assert_same()
    counts = torch.stack([place.counts for place in places])
    for rank, window in enumerate(world.windows):
        for stride in (None, layout.capacity):
            begins = counts[:, rank].cumsum(0) - counts[:, rank]
            segments = torch.stack([begins if stride is None else torch.arange(R) * 9, counts[:, rank]])
            num_rows = int(counts[:, rank].sum()) if stride is None else 9 * R
            of_rank = (world.ring, layout, world.ticket, segments.to(device))
            got = take_rows(window, *of_rank, num_rows, dtype)
            wanted = take_rows_reference(world.references[rank], world.ring, layout, TICKET, segments, num_rows, dtype)
            assert got.dtype == dtype
            assert torch.equal(bits(got), bits(wanted))
            offered = torch.where(wanted.isnan(), 1, wanted) * 2
            offer_rows(offered.to(device), window, *of_rank, world.status)
            offer_rows_reference(offered, world.references[rank], world.ring, layout, TICKET, segments)
            world.assert_same()
    for rank, (window, place) in enumerate(zip(world.windows, places, strict=True)):
        got = pull_rows(place.row.to(device), window, world.ring, layout, world.ticket, world.status, dtype)
        wanted = pull_rows_reference(place.row, world.references, rank, world.ring, layout, TICKET, dtype)
        assert torch.equal(bits(got), bits(wanted))
        assert (wanted[(place.row < 0).all(dim=1)] == 0).all()


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_routes_travel_as_the_references_say(top_k: int, device: torch.device) -> None:
    layout = RowLayout(R, 70, 8, top_k, torch.float32)
    world = World(layout, device)
    ids = [draw_ids(count, top_k, seed) for seed, count in enumerate((70, 3, 0))]
    places = [place_tokens_reference(slot_ids, SLOTS, R) for slot_ids in ids]
    for rank, (slot_ids, place) in enumerate(zip(ids, places, strict=True)):
        weights = torch.rand(slot_ids.shape)
        window = world.windows[rank]
        of_rank = (slot_ids.to(device), weights.to(device), SLOTS, place.row.to(device))
        push_routes(*of_rank, window, world.ring, layout, world.ticket, world.status)
        push_routes_reference(slot_ids, weights, SLOTS, place.row, world.references, rank, world.ring, layout, TICKET)
        world.assert_same()
    counts = torch.stack([place.counts for place in places])
    for rank, window in enumerate(world.windows):
        segments = torch.stack([torch.arange(R) * 70, counts[:, rank]])
        got = take_routes(window, world.ring, layout, world.ticket, segments.to(device), 70 * R)
        wanted = take_routes_reference(world.references[rank], world.ring, layout, TICKET, segments, 70 * R)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))
        assert (wanted[0] < SLOTS).all()
        grads = torch.randn(70 * R, top_k)
        offer_weights(grads.to(device), window, world.ring, layout, world.ticket, segments.to(device), world.status)
        offer_weights_reference(grads, world.references[rank], world.ring, layout, TICKET, segments)
        world.assert_same()
    for rank, (slot_ids, place) in enumerate(zip(ids, places, strict=True)):
        window = world.windows[rank]
        got = pull_weights(slot_ids.to(device), SLOTS, place.row.to(device), window, world.ring, layout, world.ticket)
        wanted = pull_weights_reference(slot_ids, SLOTS, place.row, world.references, rank, world.ring, layout, TICKET)
        assert torch.equal(got.cpu(), wanted)
        assert (wanted[slot_ids < 0] == 0).all()


def test_an_id_beyond_all_slots_reaches_no_memory(device: torch.device) -> None:
    """Nothing looks at ids on a GPU: such a token has no row, and its weight no gradient."""
    layout = RowLayout(R, 4, 8, 2, torch.float32)
    world = World(layout, device)
    slot_ids = torch.tensor([[1, R * SLOTS], [10**12, 2**40]], device=device)
    row, counts = place_tokens(slot_ids, SLOTS, R)
    assert counts.tolist() == [1, 0, 0]
    weights = torch.ones(2, 2, device=device)
    of_rank = (world.windows[0], world.ring, layout, world.ticket)
    push_routes(slot_ids, weights, SLOTS, row, *of_rank, world.status)
    push_routes_reference(
        slot_ids.cpu(), weights.cpu(), SLOTS, row.cpu(), world.references, 0, world.ring, layout, TICKET
    )
    world.assert_same()
    grads = pull_weights(slot_ids, SLOTS, row, *of_rank)
    assert grads.tolist() == [[1, 0], [0, 0]]


def test_tickets_and_signals_are_those_of_the_references(device: torch.device) -> None:
    """Through three turns of the ring, with other counts each time."""
    layout = RowLayout(R, 4, 8, 2, torch.float32)
    world = World(layout, device)
    counters = [torch.zeros(1 + world.ring.num_slots, dtype=torch.int64, device=device) for _ in range(R)]
    for ticket in range(1, 7):
        counts = torch.randint(0, 5, (R, R))
        for rank, window in enumerate(world.windows):
            assert open_exchange_reference(world.references[rank], world.ring, max(0, ticket - world.ring.num_slots))
            got = open_exchange(window, world.ring, counters[rank], world.status, timeout=1)
            assert got.tolist() == counters[rank][:1].tolist() == [ticket]
            assert await_arrivals_reference(world.references[-1], world.ring, ticket, None) is None
            send_signals(window, world.ring, got, world.status, counts[rank].to(device))
            send_signals_reference(world.references, world.ring, rank, ticket, counts[rank])
        at = torch.tensor([ticket], device=device)
        for stride in (None, 4):
            for rank, window in enumerate(world.windows):
                got = await_arrivals(window, world.ring, at, world.status, 1, stride)
                wanted = await_arrivals_reference(world.references[rank], world.ring, ticket, stride)
                assert wanted is not None
                assert torch.equal(got.cpu(), wanted)
                assert wanted[1].tolist() == counts[:, rank].tolist()
        for rank, window in enumerate(world.windows):
            assert not open_exchange_reference(world.references[0], world.ring, ticket)
            send_signals(window, world.ring, at, world.status, None)
            send_signals_reference(world.references, world.ring, rank, ticket, None)
        world.assert_same()
    assert world.status.code == 0


@pytest.mark.parametrize("kind", ["arrival", "release"])
def test_a_wait_gives_up_says_for_whom_and_then_nothing_waits_or_writes(kind: str, device: torch.device) -> None:
    layout = RowLayout(R, 4, 8, 2, torch.float32)
    world = World(layout, device)
    window, ticket = world.windows[0], torch.tensor([3], device=device)
    zeros = torch.zeros(R, dtype=torch.int64, device=device)
    for rank in (0, 2):  # 1 is missing
        if kind == "arrival":
            send_signals(world.windows[rank], world.ring, ticket, world.status, zeros + 1)
        else:
            send_signals(world.windows[rank], world.ring, ticket, world.status, None)
    counters = torch.tensor([4, 4, 3], device=device)  # 5 needs the slot of 3

    def wait(timeout: float) -> Tensor:
        if kind == "arrival":
            return await_arrivals(window, world.ring, ticket, world.status, timeout, None)
        return open_exchange(window, world.ring, counters, world.status, timeout)

    began = time.monotonic()
    result = wait(0.2)
    code = int(world.status.on_device)
    assert time.monotonic() - began < 20
    assert code == world.status.code == 2 + (NEVER_RELEASED if kind == "release" else 0)
    if kind == "arrival":
        assert result.tolist() == [[0, 1, 1], [1, 0, 1]], "nothing of the rank that has not come"
    began = time.monotonic()
    wait(1000)
    assert time.monotonic() - began < 20
    before = [window.own.cpu().clone() for window in world.windows]
    place = place_tokens_reference(torch.tensor([[0, 5]]), SLOTS, R)
    x, row = torch.ones(1, 8, device=device), place.row.to(device)
    push_rows(x, row, window, world.ring, layout, ticket, world.status)
    weights = torch.ones(1, 2, device=device)
    ids = torch.tensor([[0, 5]], device=device)
    push_routes(ids, weights, SLOTS, row, window, world.ring, layout, ticket, world.status)
    offer_rows(x, window, world.ring, layout, ticket, torch.tensor([[0] * R, [1, 0, 0]], device=device), world.status)
    send_signals(window, world.ring, ticket, world.status, zeros)
    assert all(torch.equal(window.own.cpu(), old) for window, old in zip(world.windows, before, strict=True))
    assert pull_rows(row, window, world.ring, layout, ticket, world.status, torch.float32).isnan().all()


def test_rows_are_aligned_and_regions_do_not_overlap() -> None:
    for hidden in (1, 7, 128, 300):
        for wire in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
            layout = RowLayout(8, 13, hidden, 5, wire, torch.float64)
            used = hidden * wire.itemsize
            if layout.is_fp8:
                assert layout.scales_byte >= hidden
                used = layout.scales_byte + 4 * -(-hidden // FP8_GROUP)
            assert layout.row_bytes >= used
            assert layout.row_bytes % 16 == 0
            assert layout.ids_byte >= layout.num_rows * layout.row_bytes
            assert layout.weights_byte >= layout.ids_byte + 4 * layout.num_rows * 5
            assert layout.slot_bytes >= layout.weights_byte + 8 * layout.num_rows * 5
            assert layout.slot_bytes % 16 == layout.weights_byte % 16 == 0


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_with_16_byte_accesses(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "kernels" / "compile_symmetric.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 19
    for module, kernel, *accesses in lines:
        if module == "rows":
            assert {"ld.v4.b32", "st.v4.b32"} <= set(accesses), f"{kernel} reads or writes rows in small pieces"
        assert "spills" not in accesses, kernel
