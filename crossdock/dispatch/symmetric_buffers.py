"""One rank's side of one-sided exchanges: buffers that peers write to and read from, and the exchanges in them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.comm import PeerMemory, peer_memory
from crossdock.kernels.symmetric import (
    NEVER_RELEASED,
    Places,
    Ring,
    RowLayout,
    Status,
    await_arrivals,
    offer_rows,
    offer_weights,
    open_exchange,
    pull_rows,
    pull_weights,
    push_routes,
    push_rows,
    send_signals,
    take_routes,
    take_rows,
)

__all__ = ["Arrived", "Exchange", "ExchangeBuffers", "RankTimeout", "SharedBuffers", "shared_exchange_buffers"]

# Slots are made in steps of so many bytes, and a quarter larger than the last ones at least.
_STEP, _GROWTH = 2**16, 1.25


class RankTimeout(RuntimeError):
    """A rank has not taken part in an exchange within the time allowed.

    Attributes:
        rank: its place in the group that holds the experts.
    """

    def __init__(self, rank: int, num_ranks: int, seconds: float, *, released: bool) -> None:
        what = "did not finish reading an earlier exchange's rows" if released else "did not send its rows"
        super().__init__(
            f"dispatcher 'symmetric': rank {rank} of the {num_ranks} that hold the experts {what} within "
            f"{seconds:g} s; it has failed or is stuck, and what was computed since then is NaN; look at its error"
        )
        self.rank = rank


class Arrived(NamedTuple):
    """What a rank has received: `tokens [U, H]`; `slot_ids [U, K]` int64 and `weights [U, K]`, where routes came
    along; `segments [2, R]` int64, the first row of each source and how many it has sent."""

    tokens: Tensor
    segments: Tensor
    slot_ids: Tensor | None = None
    weights: Tensor | None = None


class Exchange:
    """An exchange that has begun.

    One that nobody waits for is over for this rank when it is let go: a recompute of activations stops once it has
    what the backward pass needs, which may be between the two, and its slot must be free for later ones.

    Attributes:
        ticket: `[1]` int64 on the device, which one.
    """

    def __init__(
        self, buffers: ExchangeBuffers, number: int, ticket: Tensor, event: Any, keep: tuple[Tensor, ...]
    ) -> None:
        self.ticket = ticket
        self._buffers, self._number, self._event, self._keep = buffers, number, event, keep
        self._is_over = False

    def __del__(self) -> None:
        if not self._is_over and not sys.is_finalizing():
            self._arrive()
            self._end()

    def receive(
        self, layout: RowLayout, stride: int | None, num_rows: int, dtype: torch.dtype, *, with_routes: bool = True
    ) -> Arrived:
        """Wait for the rows that all ranks have sent with `ExchangeBuffers.send`, and copy them out.

        Args:
            layout: as they were sent.
            stride: rows that each source takes of the result, those beyond what it sent padding (zeros, ids -1,
                weights 0); `None`: one source's rows follow another's.
            num_rows: `U`, of the result.
            dtype: of tokens.
        """
        window, ring, status = self._arrive()
        segments = await_arrivals(window, ring, self.ticket, status, self._buffers.timeout, stride)
        tokens = take_rows(window, ring, layout, self.ticket, segments, num_rows, dtype)
        routes = take_routes(window, ring, layout, self.ticket, segments, num_rows) if with_routes else (None, None)
        self._end()
        return Arrived(tokens, segments, *routes)

    def collect(
        self,
        layout: RowLayout,
        row: Tensor,
        dtype: torch.dtype,
        slot_ids: Tensor | None = None,
        slots_per_rank: int = 1,
    ) -> tuple[Tensor, Tensor | None]:
        """Wait for what all ranks have offered with `ExchangeBuffers.offer`, and read and sum this rank's tokens.

        Args:
            row: `[T, R]` int32 of `Places`.
            dtype: of the sums `[T, H]`.
            slot_ids: `[T, K]`, where gradients of weights, `[T, K]`, were offered too.
        """
        window, ring, status = self._arrive()
        await_arrivals(window, ring, self.ticket, status, self._buffers.timeout, 0)
        out = pull_rows(row, window, ring, layout, self.ticket, status, dtype)
        grads = None
        if slot_ids is not None:
            grads = pull_weights(slot_ids, slots_per_rank, row, window, ring, layout, self.ticket)
        self._end()
        return out, grads

    def _arrive(self) -> tuple[Any, Ring, Status]:
        if self._event is not None:
            torch.cuda.current_stream(self.ticket.device).wait_event(self._event)
        self._keep = ()
        return self._buffers.window, self._buffers.ring, self._buffers.status

    def _end(self) -> None:
        self._is_over = True
        self._buffers.release(self._number, self.ticket)


class ExchangeBuffers:
    """A ring of slots on every rank, and the exchanges of this one in it.

    `crossdock/kernels/symmetric/signals.py` says why a slot may be used again, and why nothing hangs. On a GPU rows are
    sent on a stream of its own, beside what else is computed.

    Args:
        memory: of the ranks.
        num_slots: exchanges that may be open at once; with one more, none waits for others to read the last.
        slot_bytes: the most that `RowLayout.slot_bytes` comes to.
        device: of tokens.
        timeout: in seconds, of each wait.
        side_stream: whether rows are sent on a stream of their own.
    """

    def __init__(
        self,
        memory: PeerMemory,
        num_ranks: int,
        num_slots: int,
        slot_bytes: int,
        device: torch.device,
        timeout: float,
        *,
        side_stream: bool = True,
    ) -> None:
        self.ring = Ring(num_ranks, num_slots, slot_bytes)
        self.window = memory.allocate(self.ring.num_bytes, device)
        self.timeout = timeout
        self.status = Status.fresh(device)
        self._counters = torch.zeros(1 + num_slots, dtype=torch.int64, device=device)
        self._no_counts = torch.zeros(num_ranks, dtype=torch.int64, device=device)
        self._stream = torch.cuda.Stream(device) if side_stream and device.type == "cuda" else None
        # As the host counts: a graph's replay moves the device's tickets on, with none open before and after.
        self._last_number = 0
        self._open: set[int] = set()

    def send(
        self,
        x: Tensor,
        places: Places,
        layout: RowLayout,
        slot_ids: Tensor | None = None,
        weights: Tensor | None = None,
        slots_per_rank: int = 1,
    ) -> Exchange:
        """Begin to write tokens `x [T, H]` to the ranks that need them, and their routes `[T, K]` where given."""

        def write(ticket: Tensor) -> None:
            push_rows(x, places.row, self.window, self.ring, layout, ticket, self.status)
            if slot_ids is not None and weights is not None:
                push_routes(
                    *(slot_ids, weights, slots_per_rank, places.row),
                    *(self.window, self.ring, layout, ticket, self.status),
                )

        keep = tuple(tensor for tensor in (x, *places, slot_ids, weights) if tensor is not None)
        return self._begin(write, places.counts, keep)

    def offer(self, y: Tensor, segments: Tensor, layout: RowLayout, grads: Tensor | None = None) -> Exchange:
        """Begin to let sources read `y [U, H]`, rows as `segments` says, and gradients of weights `[U, K]`."""

        def write(ticket: Tensor) -> None:
            offer_rows(y, self.window, self.ring, layout, ticket, segments, self.status)
            if grads is not None:
                offer_weights(grads, self.window, self.ring, layout, ticket, segments, self.status)

        keep = (y, segments) if grads is None else (y, segments, grads)
        return self._begin(write, self._no_counts, keep)

    def _begin(self, write: Callable[[Tensor], None], counts: Tensor, keep: tuple[Tensor, ...]) -> Exchange:
        self.check()
        num_slots, following = self.ring.num_slots, self._last_number + 1
        taken = {number % num_slots for number in self._open}
        if len(taken) == num_slots:
            raise RuntimeError(
                f"dispatcher 'symmetric' has {num_slots} exchanges begun that nothing has waited for, and room for no "
                "more; wait for a dispatch or combine before the next, or set overlap_chunks to as many as are begun"
            )
        number = next(number for number in range(following, following + num_slots) if number % num_slots not in taken)
        skip, self._last_number = number - following, number
        self._open.add(number)
        if self._stream is None:
            return Exchange(self, number, self._write(write, counts, skip), None, keep)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            ticket = self._write(write, counts, skip)
            event = self._stream.record_event()
        return Exchange(self, number, ticket, event, keep)

    def _write(self, write: Callable[[Tensor], None], counts: Tensor, skip: int) -> Tensor:
        ticket = open_exchange(self.window, self.ring, self._counters, self.status, self.timeout, skip)
        write(ticket)
        send_signals(self.window, self.ring, ticket, self.status, counts)
        return ticket

    def release(self, number: int, ticket: Tensor) -> None:
        """Say that this rank reads nothing more of an exchange."""
        send_signals(self.window, self.ring, ticket, self.status, None)
        self._open.remove(number)

    def check(self) -> None:
        """Raise for a wait in vain that the host knows of, without a sync.

        Raises:
            RankTimeout: names the rank.
        """
        if code := self.status.code:
            released, rank = divmod(code - 1, NEVER_RELEASED)
            raise RankTimeout(rank, self.ring.num_ranks, self.timeout, released=released > 0)


class SharedBuffers:
    """The buffers of a group's layers, which take turns; made larger, by all ranks, where an exchange needs it.

    A CUDA graph has addresses in it: after a capture former buffers stay. The last former ones stay anyway, for
    exchanges of other ranks that still read them.
    """

    def __init__(self, make: Callable[[int], ExchangeBuffers]) -> None:
        self._make = make
        self._current: ExchangeBuffers | None = None
        self._former: list[ExchangeBuffers] = []
        self._captured = False

    def __call__(self, slot_bytes: int) -> ExchangeBuffers:
        """Buffers with slots of at least as many bytes. Collective where they are made."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self._current is None or self._current.ring.slot_bytes < slot_bytes:
            if capturing:
                raise RuntimeError(
                    "dispatcher 'symmetric': buffers cannot be made while a CUDA graph is captured; run the layer once "
                    "before, with the largest batch"
                )
            if self._current is not None:
                self._former = [*(self._former if self._captured else ()), self._current]
                slot_bytes = max(slot_bytes, int(_GROWTH * self._current.ring.slot_bytes))
            self._current = self._make(-(-slot_bytes // _STEP) * _STEP)
        self._captured |= capturing
        return self._current


@cache
def _shared() -> WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Any, ...], SharedBuffers]]:
    """The process's buffers by group; then by device, slots and time-out. They end with their group."""
    return WeakKeyDictionary()


def shared_exchange_buffers(
    group: dist.ProcessGroup, device: torch.device, num_slots: int, timeout: float
) -> SharedBuffers:
    """The buffers of `group`, the same for all layers. Nothing is allocated before the first exchange."""
    of_group, num_ranks = ref(group), group.size()

    def make(slot_bytes: int) -> ExchangeBuffers:
        group = of_group()
        assert group is not None, "the process group of these buffers is destroyed"
        return ExchangeBuffers(peer_memory(group, device), num_ranks, num_slots, slot_bytes, device, timeout)

    return _shared().setdefault(group, {}).setdefault((device, num_slots, timeout), SharedBuffers(make))
