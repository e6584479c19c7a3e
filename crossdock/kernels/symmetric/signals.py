"""Tickets and signals: when a slot may be written, when rows have come, when they have been read.

An exchange of every rank runs through the same kernels, in this order:

    1. `open_exchange` takes the next ticket `t` whose slot `t % n` this rank has no open exchange in, and waits until
       all ranks have released the one before in that slot, `s`;
    2. rows are written;
    3. `send_signals(arrived)`;
    4. `await_arrivals` waits for all ranks' signals;
    5. rows are read;
    6. `send_signals(released)`.

Why a slot may be used again. A rank writes to slot `t % n` of any buffer in step 2, after step 1 has seen every rank's
release of ticket `s`. A rank sends it in step 6, once its reads of that exchange, from its own buffer (dispatch) or
from the peers' (combine), are over: kernels of one stream follow one another, and `wait` is ordered after both. So
nothing that anyone still reads is overwritten, however far a rank runs ahead; it stops in step 1. A signal's word is
itself part of the slot: it is written again by the same source only after the release, which comes after the wait.

Why nothing waits for itself. Step 1 waits for step 6 of an exchange that this rank has ended, step 4 for step 3 of the
same exchange. Both were launched before, on every rank that runs the same program; so kernels may run one after
another, and virtual ranks take turns phase by phase. Exchanges need not end in the order in which they began: a
recompute of activations runs others while gradients are on their way. Tickets are left out then, the same ones on all
ranks.

What makes rows visible: a kernel's writes come before those of the next on its stream, a signal is a release at system
scope by that next kernel, the wait an acquire at system scope, and reads are in a kernel after that. All numbers live
on the device: a captured graph counts on when it is replayed.

A wait gives up after `timeout` seconds (`Status`).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from crossdock.kernels.runtime import INTERPRETED, device_of, jit, tl
from crossdock.kernels.symmetric.memory import Ring, Status, Window, as_pointer, next_power_of_two

__all__ = [
    "NEVER_RELEASED",
    "await_arrivals",
    "await_arrivals_reference",
    "open_exchange",
    "open_exchange_reference",
    "send_signals",
    "send_signals_reference",
]

NEVER_RELEASED = 2**16
"""Of a `Status`: added where a rank has not released a slot, rather than not sent its rows."""


def open_exchange(
    window: Window, ring: Ring, counters: Tensor, status: Status, timeout: float, skip: int = 0
) -> Tensor:
    """Take the next ticket, and wait until its slot is free.

    Args:
        counters: `[1 + num_slots]` int64 on the device, the last ticket of this rank, and of each slot.
        timeout: in seconds.
        skip: tickets that are left out.

    Returns:
        `[1]` int64 on the device, the ticket.
    """
    ticket = torch.empty_like(counters[:1])
    with device_of(counters):
        _open_kernel[(1,)](
            *(window.own[ring.released_byte :].view(torch.int64), counters, ticket),
            *(status.on_device, status.on_host, int(timeout * 1e9), ring.num_ranks, skip),
            NUM_SLOTS=ring.num_slots,
            NEVER_RELEASED=NEVER_RELEASED,
            BLOCK_RANKS=next_power_of_two(ring.num_ranks),
            num_warps=1,
        )
    return ticket


def send_signals(window: Window, ring: Ring, ticket: Tensor, status: Status, counts: Tensor | None) -> None:
    """Tell all ranks that this one's rows are there, or that it reads nothing more.

    Args:
        counts: `[R]` int64, rows for each rank, which go along with `arrived`; `None` is `released`.
    """
    with device_of(ticket):
        _signal_kernel[(1,)](
            *(window.addresses, ticket, counts, status.on_device),
            *(0 if counts is not None else ring.released_byte, window.rank, ring.num_ranks),
            NUM_SLOTS=ring.num_slots,
            BLOCK_RANKS=next_power_of_two(ring.num_ranks),
            num_warps=1,
        )


def await_arrivals(
    window: Window, ring: Ring, ticket: Tensor, status: Status, timeout: float, stride: int | None
) -> Tensor:
    """Wait until all ranks' rows have come.

    Args:
        timeout: in seconds.
        stride: rows that each source has room for in what the caller makes of them; `None`: as many as came.

    Returns:
        `[2, R]` int64: the row that each source's begin at, and how many it has sent.
    """
    segments = torch.empty(2, ring.num_ranks, dtype=torch.int64, device=ticket.device)
    with device_of(ticket):
        _await_kernel[(1,)](
            *(window.own.view(torch.int64), ticket, segments),
            *(status.on_device, status.on_host, int(timeout * 1e9), ring.num_ranks, stride or 0),
            COMPACT=stride is None,
            NUM_SLOTS=ring.num_slots,
            BLOCK_RANKS=next_power_of_two(ring.num_ranks),
            num_warps=1,
        )
    return segments


def _signals(buffer: Tensor, ring: Ring, first_byte: int) -> Tensor:
    words = buffer[first_byte : first_byte + ring.released_byte].view(torch.int64)
    return words.view(ring.num_slots, ring.num_ranks)


def open_exchange_reference(buffer: Tensor, ring: Ring, before: int) -> bool:
    """Whether all ranks have released ticket `before`, the last in its slot, in a rank's `buffer [bytes]`: then
    `open_exchange` of the next one in that slot would not wait."""
    released = _signals(buffer, ring, ring.released_byte)[before % ring.num_slots]
    return bool((released >= before).all())


def send_signals_reference(buffers: list[Tensor], ring: Ring, rank: int, ticket: int, counts: Tensor | None) -> None:
    """What `send_signals` of `rank` writes to all `buffers`."""
    for peer, buffer in enumerate(buffers):
        value = ticket if counts is None else ticket << 32 | int(counts[peer])
        first_byte = 0 if counts is not None else ring.released_byte
        _signals(buffer, ring, first_byte)[ticket % ring.num_slots, rank] = value


def await_arrivals_reference(buffer: Tensor, ring: Ring, ticket: int, stride: int | None) -> Tensor | None:
    """What `await_arrivals` returns, or `None` where it would wait."""
    arrived = _signals(buffer, ring, 0)[ticket % ring.num_slots]
    if bool((arrived >> 32 < ticket).any()):
        return None
    counts = arrived & 0xFFFFFFFF
    starts = counts.cumsum(0) - counts if stride is None else torch.arange(len(counts)) * stride
    return torch.stack([starts, counts])


if INTERPRETED:

    def _nanoseconds() -> Any:  # pyright: ignore[reportRedeclaration]
        time.sleep(1e-4)  # what is waited for may need this processor
        return time.monotonic_ns()

else:

    @jit
    def _nanoseconds() -> Any:
        return tl.extra.cuda.globaltimer()  # pyright: ignore[reportAttributeAccessIssue]


@jit
def _look(signals_ptr, mask, least, SHIFT: tl.constexpr):
    """The signals, and where they are below `least`."""
    zeros = tl.zeros(mask.shape, dtype=tl.int64)
    signals = tl.atomic_add(signals_ptr, zeros, mask=mask, sem="acquire", scope="sys")
    return signals, mask & ((signals >> SHIFT) < least)


@jit
def _give_up(late, rank, status_ptr, host_status_ptr, BASE: tl.constexpr):
    first = tl.min(tl.where(late, rank, 65535), axis=0)
    tl.store(status_ptr, BASE + first)
    tl.store(host_status_ptr, BASE + first)


@jit
def _open_kernel(
    released_ptr,  # [NUM_SLOTS, num_ranks]
    counters_ptr,  # [1 + NUM_SLOTS]
    ticket_ptr,  # [1]
    status_ptr,  # [1]
    host_status_ptr,  # [1]
    timeout,  # in nanoseconds
    num_ranks,
    skip,
    NUM_SLOTS: tl.constexpr,
    NEVER_RELEASED: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    ticket = tl.load(counters_ptr) + 1 + skip
    before = tl.load(counters_ptr + 1 + ticket % NUM_SLOTS)
    tl.store(counters_ptr, ticket)
    tl.store(counters_ptr + 1 + ticket % NUM_SLOTS, ticket)
    tl.store(ticket_ptr, ticket)
    rank = tl.arange(0, BLOCK_RANKS)
    mask = (rank < num_ranks) & (tl.load(status_ptr) == 0)
    signals_ptr = released_ptr + (ticket % NUM_SLOTS) * num_ranks + rank
    _, late = _look(signals_ptr, mask, before, SHIFT=0)
    num_late = tl.sum(late.to(tl.int32), axis=0)
    began = _nanoseconds()
    while (num_late > 0) & (_nanoseconds() - began < timeout):
        _, late = _look(signals_ptr, mask, before, SHIFT=0)
        num_late = tl.sum(late.to(tl.int32), axis=0)
    if num_late > 0:
        _give_up(late, rank, status_ptr, host_status_ptr, BASE=1 + NEVER_RELEASED)


@jit
def _signal_kernel(
    addresses_ptr,  # [num_ranks]
    ticket_ptr,  # [1]
    counts_ptr,  # [num_ranks], or None
    status_ptr,  # [1]
    first_byte,
    rank,
    num_ranks,
    NUM_SLOTS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    peer = tl.arange(0, BLOCK_RANKS)
    mask = (peer < num_ranks) & (tl.load(status_ptr) == 0)
    ticket = tl.load(ticket_ptr)
    value = tl.zeros([BLOCK_RANKS], dtype=tl.int64) + ticket
    if counts_ptr is not None:
        value = (value << 32) | tl.load(counts_ptr + peer, mask=mask, other=0)
    address = tl.load(addresses_ptr + peer, mask=mask, other=0)
    address += first_byte + ((ticket % NUM_SLOTS) * num_ranks + rank) * 8
    tl.atomic_xchg(as_pointer(address, tl.int64), value, mask=mask, sem="release", scope="sys")


@jit
def _await_kernel(
    arrived_ptr,  # [NUM_SLOTS, num_ranks]
    ticket_ptr,  # [1]
    segments_ptr,  # [2, num_ranks]
    status_ptr,  # [1]
    host_status_ptr,  # [1]
    timeout,  # in nanoseconds
    num_ranks,
    stride,
    COMPACT: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    ticket = tl.load(ticket_ptr)
    rank = tl.arange(0, BLOCK_RANKS)
    here = rank < num_ranks
    mask = here & (tl.load(status_ptr) == 0)
    signals_ptr = arrived_ptr + (ticket % NUM_SLOTS) * num_ranks + rank
    signals, late = _look(signals_ptr, mask, ticket, SHIFT=32)
    num_late = tl.sum(late.to(tl.int32), axis=0)
    began = _nanoseconds()
    while (num_late > 0) & (_nanoseconds() - began < timeout):
        signals, late = _look(signals_ptr, mask, ticket, SHIFT=32)
        num_late = tl.sum(late.to(tl.int32), axis=0)
    if num_late > 0:
        _give_up(late, rank, status_ptr, host_status_ptr, BASE=1)
    # Of a rank that has not come, nothing.
    counts = tl.where(mask & (late == 0), signals & 0xFFFFFFFF, 0)
    starts = tl.cumsum(counts, axis=0) - counts if COMPACT else rank.to(tl.int64) * stride
    tl.store(segments_ptr + rank, starts, mask=here)
    tl.store(segments_ptr + num_ranks + rank, counts, mask=here)
