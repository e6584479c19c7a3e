"""One-sided exchanges: kernels that write tokens straight into the memory of the ranks that need them, and read back.

Nothing is to be built or installed beside torch and Triton. It has not run on hardware yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from crossdock.comm import UNTOUCHED, PeerMemory, Pending, Splits, Wire
from crossdock.dispatch.agreement import Agreement
from crossdock.dispatch.checks import check_inputs, check_results
from crossdock.dispatch.dispatcher import Dispatched
from crossdock.dispatch.nodes import Nodes
from crossdock.dispatch.symmetric_buffers import ExchangeBuffers, SharedBuffers, shared_exchange_buffers
from crossdock.dispatch.symmetric_ops import Flight, Going, Receive, Send, begin_exchange
from crossdock.dispatch.traffic import Needs, Traffic, TrafficMeter
from crossdock.kernels.symmetric import Places, RowLayout, kernels_run, place_tokens

__all__ = ["SymmetricDispatcher", "SymmetricHandle", "symmetric_problem"]

_TIMEOUT = timedelta(minutes=10)
_WIRES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


def symmetric_problem(device: torch.device, nodes: Nodes | None = None) -> str | None:
    """Why `symmetric` cannot exchange rows on `device` between ranks on `nodes`, or `None` where it can."""
    if nodes is not None and nodes.count > 1:
        return (
            f"needs ranks that can map each other's memory, those of one NVLink domain, and these are on {nodes.count} "
            f"nodes ({nodes}); where NVLink joins machines, say so with ranks_per_node"
        )
    if kernels_run(device):
        return None
    if device.type == "cpu":
        return "needs GPUs, or Triton's interpreter on a CPU, which is for tests (TRITON_INTERPRET=1)"
    return f"needs Triton and CUDA, for tensors on {device}"


class SymmetricHandle(NamedTuple):
    """What `combine` needs of a dispatch.

    `row [T, R]` int32: the place of each (token, rank) pair among this rank's rows there. `counts [R]` and
    `segments [2, R]` int64: rows sent to each rank; the first row of each source here, and how many it sent. `splits`:
    the same counts, where the host knows them. `num_tokens`, `num_rows`: `T`, `U`. `capacity`: rows of a source in a
    buffer. `hidden_size`: `H`. `needs`: what the tokens need.
    """

    row: Tensor
    counts: Tensor
    segments: Tensor
    splits: Splits | None
    num_tokens: int
    num_rows: int
    capacity: int
    hidden_size: int
    needs: Needs


class SymmetricDispatcher:
    """Rows that ranks write into each other's buffers, with signals in between; backward without routes.

    Rows are those of `alltoall`, in its order, and so are the sums: equal to it bit by bit. Where shapes are not
    static, an exchange of counts before each dispatch says how many rows will come: a sync and a collective, as with
    `alltoall`, and in return rows take no more memory than there are, a rank that fails tells the others, and batches
    may grow. With `static_shapes` there is neither; the result has room for the tokens of all ranks, as many each as
    any had in the first call, and what has no token is padding, with ids `-1` and weights 0.

    A rank that never comes is given up on after `timeout`: sums are NaN from then on, and the next call raises
    `RankTimeout`; on a CPU, and with `debug_checks`, the call itself.

    Args:
        rank: this one's place among the ranks.
        num_ranks: `R`.
        slots_per_rank: `P/R`.
        buffers: those of a device, for at least so many bytes per slot; collective.
        meter: counts what is sent.
        agreement: of the ranks; `None` where they are one process, which needs `max_tokens`.
        wire: what rows look like while they travel. `fp8` is quantised and restored by the kernels that copy.
        static_shapes: no sync.
        debug_checks: exchange counts, look at ids, and wait for the GPU in every call.
        max_tokens: of each rank, padding included; the first call finds it if `None`.
    """

    ordered = True

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        slots_per_rank: int,
        buffers: Callable[[torch.device], SharedBuffers],
        meter: TrafficMeter,
        agreement: Agreement | None,
        *,
        wire: Wire = UNTOUCHED,
        static_shapes: bool = False,
        debug_checks: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        self.rank, self.num_ranks, self.slots_per_rank = rank, num_ranks, slots_per_rank
        self.meter, self.agreement, self.wire = meter, agreement, wire
        self.static_shapes, self.debug_checks, self.max_tokens = static_shapes, debug_checks, max_tokens
        self._buffers = buffers

    @classmethod
    def of_group(
        cls,
        group: dist.ProcessGroup,
        slots_per_rank: int,
        nodes: Nodes | None = None,
        *,
        wire: Wire = UNTOUCHED,
        chunks: int = 1,
        static_shapes: bool = False,
        debug_checks: bool = False,
        timeout: float | None = None,
    ) -> SymmetricDispatcher:
        """For the ranks of `group`, a process each.

        Args:
            group: the expert-parallel ranks.
            slots_per_rank: `P/R`.
            nodes: of the ranks; one if `None`.
            wire: what rows look like while they travel.
            chunks: parts that a rank's tokens are dispatched in, each by a call.
            static_shapes: as above.
            debug_checks: as above.
            timeout: in seconds, of each wait; the group's if `None`.

        Raises:
            ValueError: where it cannot run.
        """
        device = torch.device("cuda" if "cuda" in {device.type for device in group._device_types} else "cpu")
        if problem := symmetric_problem(device, nodes):
            raise ValueError(f"dispatcher 'symmetric' {problem}; use 'alltoall'")
        meter = TrafficMeter(group, nodes)
        agreement = Agreement(group, slots_per_rank, wire, chunks=chunks, check_ids=debug_checks, tally=meter.metadata)
        seconds = timeout or _timeout_of(group, device)

        def buffers(device: torch.device) -> SharedBuffers:
            return shared_exchange_buffers(group, device, _slots_for(chunks), seconds)

        return cls(
            *(group.rank(), group.size(), slots_per_rank, buffers, meter, agreement),
            wire=wire,
            static_shapes=static_shapes,
            debug_checks=debug_checks,
        )

    @classmethod
    def of_virtual_rank(
        cls,
        memory: PeerMemory,
        rank: int,
        num_ranks: int,
        slots_per_rank: int,
        max_tokens: int,
        *,
        wire: Wire = UNTOUCHED,
        chunks: int = 1,
        timeout: float = 10.0,
    ) -> SymmetricDispatcher:
        """For one of the ranks of this process, which take turns: all of them begin before any of them waits.

        Args:
            memory: of `VirtualRanks`.
            rank: this one.
            num_ranks: `R`.
            slots_per_rank: `P/R`.
            max_tokens: of each rank; shapes are static.
            wire: as in `of_group`.
            chunks: as in `of_group`.
            timeout: as in `of_group`.
        """

        def make(slot_bytes: int) -> ExchangeBuffers:
            return ExchangeBuffers(
                memory, num_ranks, _slots_for(chunks), slot_bytes, devices[0], timeout, side_stream=False
            )

        devices: list[torch.device] = []
        shared = SharedBuffers(make)

        def buffers(device: torch.device) -> SharedBuffers:
            devices[:] = [device]
            return shared

        meter = TrafficMeter.of_rank(rank, Nodes.consecutive(num_ranks, num_ranks))
        return cls(
            *(rank, num_ranks, slots_per_rank, buffers, meter, None),
            wire=wire,
            static_shapes=True,
            max_tokens=max_tokens,
        )

    @property
    def traffic(self) -> Traffic:
        return self.meter.traffic

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        agreement = self._agreement()
        if agreement is None:
            check_inputs(x, slot_ids, weights, None)
        else:
            agreement.check(x, slot_ids, weights)
        if problem := symmetric_problem(x.device):
            self.refuse(x.device)
            raise ValueError(f"x: dispatcher 'symmetric' {problem}; use 'alltoall'")
        places = place_tokens(slot_ids, self.slots_per_rank, self.num_ranks)
        splits, most = None, len(x)
        if agreement is not None:
            # A recompute of the first call with static shapes exchanges no counts: a selective one must not miss them.
            static = self.static_shapes and not self.debug_checks
            with _disable_current_modes() if static else nullcontext():
                splits, tokens = agreement.exchange_counts(places.counts, x, slot_ids, weights)
            most = max(tokens)
        capacity = self._capacity(most)
        if self.static_shapes:
            splits, stride, num_rows = None, capacity, self.num_ranks * capacity
        else:
            assert splits is not None
            stride, num_rows = None, sum(splits.recv)
        needs = Needs(0, 0) if splits is None else self.meter.needs(places.row >= 0, _others(splits.send, self.rank))

        weights = weights.to(torch.promote_types(x.dtype, torch.float32))
        layout = self._layout(capacity, x, self.wire, weights)
        back = self._layout(capacity, x, self.wire.back, weights)
        dtype, device = x.dtype, x.device
        buffers = self._room(max(layout.slot_bytes, back.slot_bytes), device)
        metadata_bytes = slot_ids.shape[1] * (4 + weights.dtype.itemsize)
        flight = Flight()
        sent: Any = Send.apply(flight, x, weights)
        going = begin_exchange(
            lambda tensors: buffers.send(
                tensors[0], Places(tensors[1], tensors[2]), layout, tensors[3], tensors[4], self.slots_per_rank
            ),
            x.detach(),
            *(*places, slot_ids, weights.detach()),
        )
        if going.ran:
            self._count(
                places.counts, splits and splits.send, needs, self.wire.row_bytes(x.shape[1], dtype), metadata_bytes
            )

        def finish() -> Dispatched:
            tokens, segments, ids, row_weights = going.finish(
                lambda exchange: exchange.receive(layout, stride, num_rows, dtype), self._after(buffers)
            )
            handle = SymmetricHandle(
                places.row,
                places.counts,
                segments,
                splits,
                num_tokens=len(places.row),
                num_rows=num_rows,
                capacity=capacity,
                hidden_size=layout.hidden_size,
                needs=needs,
            )
            row_bytes = self.wire.back.row_bytes(layout.hidden_size, dtype)

            def begin(grads: Sequence[Tensor]) -> Going:
                going = begin_exchange(
                    lambda tensors: buffers.offer(tensors[0], tensors[2], back, tensors[1]), *grads, segments
                )
                self._count(segments[1], splits and splits.recv, needs, row_bytes, metadata_bytes // 2)
                return going

            def end(going: Going) -> tuple[Tensor, ...]:
                return going.finish(
                    lambda exchange: exchange.collect(back, places.row, dtype, slot_ids, self.slots_per_rank),
                    self._after(buffers),
                )

            flight.begin, flight.end = begin, end
            arrived: Any = Receive.apply(flight, sent, tokens, row_weights)
            return Dispatched(arrived[0], ids, arrived[1], handle)

        return Pending(finish)

    def refuse(self, device: torch.device) -> None:
        agreement = self._agreement()
        if agreement is not None:
            agreement.refuse(device)

    def combine(self, y: Tensor, handle: SymmetricHandle) -> Pending[Tensor]:
        row, counts, segments, splits, _, num_rows, capacity, hidden_size, needs = handle
        check_results(y, num_rows, hidden_size)
        layout = self._layout(capacity, y, self.wire.back)
        dtype = y.dtype
        buffers = self._room(layout.slot_bytes, y.device)
        row_bytes = self.wire.back.row_bytes(hidden_size, dtype)
        flight = Flight()
        sent: Any = Send.apply(flight, y)
        going = begin_exchange(lambda tensors: buffers.offer(tensors[0], tensors[1], layout), y.detach(), segments)
        if going.ran:
            self._count(segments[1], splits and splits.recv, needs, row_bytes, 0)

        def finish() -> Tensor:
            (out,) = going.finish(lambda exchange: exchange.collect(layout, row, dtype)[:1], self._after(buffers))

            def begin(grads: Sequence[Tensor]) -> Going:
                going = begin_exchange(
                    lambda tensors: buffers.send(tensors[0], Places(tensors[1], tensors[2]), layout),
                    *grads,
                    row,
                    counts,
                )
                self._count(counts, splits and splits.send, needs, row_bytes, 0)
                return going

            def end(going: Going) -> tuple[Tensor, ...]:
                stride = None if splits is not None else capacity
                return going.finish(
                    lambda exchange: exchange.receive(layout, stride, num_rows, dtype, with_routes=False)[:1],
                    self._after(buffers),
                )

            flight.begin, flight.end = begin, end
            returned: Any = Receive.apply(flight, sent, out)
            return returned[0]

        return Pending(finish)

    def _agreement(self) -> Agreement | None:
        """With which counts are exchanged in this call, if they are."""
        needs_none = self.static_shapes and self.max_tokens is not None and not self.debug_checks
        return None if needs_none else self.agreement

    def _capacity(self, most: int) -> int:
        """Rows of each source in a slot, where the fullest rank known of has `most` tokens."""
        if not self.static_shapes:
            return most
        if self.max_tokens is None:
            self.max_tokens = most
        if most > self.max_tokens:
            raise ValueError(
                f"{most} tokens are more than the {self.max_tokens} that static_shapes has room for, the most of any "
                "rank in the first call; begin with the largest batch, or set static_shapes = false"
            )
        return self.max_tokens

    def _layout(self, capacity: int, rows: Tensor, wire: Wire, weights: Tensor | None = None) -> RowLayout:
        top_k, dtype = (0, torch.float32) if weights is None else (weights.shape[1], weights.dtype)
        hidden = rows.shape[1]
        on_wire = rows.dtype if wire.leaves(hidden, rows.dtype) else _WIRES[wire.dtype]
        return RowLayout(self.num_ranks, capacity, hidden, top_k, on_wire, dtype)

    def _room(self, slot_bytes: int, device: torch.device) -> ExchangeBuffers:
        # Selective recompute must not see what only a first call does.
        with _disable_current_modes(), torch.no_grad():
            return self._buffers(device)(slot_bytes)

    def _after(self, buffers: ExchangeBuffers) -> Callable[[], None]:
        """What follows a wait: to look whether it was in vain, where that costs nothing or is asked for."""

        def look() -> None:
            device = buffers.window.own.device
            if self.debug_checks and device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            if self.debug_checks or device.type == "cpu":
                buffers.check()

        return look

    def _count(
        self, counts: Tensor, on_host: Sequence[int] | None, needs: Needs, row_bytes: int, metadata_bytes: int
    ) -> None:
        """Rows that this rank sends, or lets others read."""
        if on_host is None:
            self.meter.rows_within(counts, row_bytes, metadata_bytes)
        else:
            self.meter.rows(needs)(on_host, row_bytes)
            self.meter.metadata(on_host, metadata_bytes)


def _slots_for(chunks: int) -> int:
    """One more than are open at once, so that the next exchange does not wait for the others to read the last.

    A full recompute has that one as well: all chunks but one are on their way back while it sends all of them again.
    """
    return max(chunks + 1, 2 * chunks - 1)


def _others(counts: Sequence[int], rank: int) -> int:
    return sum(counts) - counts[rank]


def _timeout_of(group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds that collectives of `group` may take."""
    options = getattr(group._get_backend(device), "options", None)
    timeout: timedelta = getattr(options, "_timeout", _TIMEOUT)
    return timeout.total_seconds()
