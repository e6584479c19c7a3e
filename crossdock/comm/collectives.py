"""Functional collectives with autograd rules, started at one node and waited for at another.

Every exchange is one of torch's functional collective ops, so that selective recompute, tracing and counters see
it as a single op. A start and a wait are separate autograd nodes: whatever the caller computes between the two runs
while rows travel, in the forward pass and, mirrored, in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode

from crossdock.comm.wire import UNTOUCHED, Wire

__all__ = [
    "EXCHANGE_OPS",
    "Pending",
    "Splits",
    "Tally",
    "all_gather",
    "attach_exchange",
    "await_gradient",
    "exchange",
    "exchange_counts",
    "gather_rows",
    "is_from_other_rank",
    "raise_together",
    "scatter_sum",
    "sum_over_ranks",
]

T = TypeVar("T")

_FROM_OTHER_RANK = "raised on rank "

_all_to_all = torch.ops._c10d_functional.all_to_all_single.default
_wait = torch.ops._c10d_functional.wait_tensor.default

_all_reduce = torch.ops._c10d_functional.all_reduce.default
_all_gather = torch.ops._c10d_functional.all_gather_into_tensor.default

Tally = Callable[[Sequence[int], int], None]
"""Is told of everything that is sent, once it is: rows for each rank of the group, and the bytes of a row."""

EXCHANGE_OPS = (_all_to_all, _all_reduce, _all_gather, _wait)
"""The operators of exchanges, which selective recompute must save, so that it never repeats one."""


class Pending(Generic[T]):
    """A value that is on its way. `wait()` yields it, once: a second call would be a second exchange backward."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish

    def wait(self) -> T:
        finish, self._finish = self._finish, None
        if finish is None:
            raise RuntimeError("a pending value can be waited for once")
        return finish()


class Splits(NamedTuple):
    """Rows per rank of one exchange, in rank order: `send[r]` rows go to rank `r`, `recv[r]` rows come from it."""

    send: list[int]
    recv: list[int]

    @property
    def reversed(self) -> Splits:
        return Splits(send=self.recv, recv=self.send)


def exchange_counts(
    send_counts: Tensor, facts: Sequence[int], group_name: str, tally: Tally | None = None
) -> tuple[Splits, list[list[int]]]:
    """Tell every rank how many rows to expect. One collective and one device-to-host copy.

    Args:
        send_counts: `[R]` int64, rows that this rank sends to each rank.
        facts: travel along with each of them; as many on all ranks.
        group_name: name of the process group.
        tally: of what is sent.

    Returns:
        The counts; and each of the facts, as it came from every rank.
    """
    sent = torch.stack([send_counts, *(torch.full_like(send_counts, fact) for fact in facts)], dim=1)
    one_each = [1] * len(sent)
    received = _wait(_start(sent, Splits(one_each, one_each), group_name, tally))
    (send, *_), (recv, *theirs) = torch.stack([sent, received]).transpose(1, 2).tolist()
    return Splits(send, recv), theirs


def exchange(
    rows: Tensor, splits: Splits, group_name: str, wire: Wire = UNTOUCHED, tally: Tally | None = None
) -> Pending[Tensor]:
    """Send `rows` `[sum(splits.send), H]` to their ranks; the result is `[sum(splits.recv), H]`, in rank order.

    Differentiable in `rows`: the backward pass sends gradients the opposite way, with the same splits. Takes part in
    the collective whatever the counts, zero included. Rows travel as `wire` says, gradients as `wire.back`
    does; what that rounds off has no part in the gradient. `tally` is told of both.
    """
    hidden_size = rows.shape[-1]
    placeholder = _AwaitGradient.apply(rows, wire.back)
    travelling = _start(wire.encode(rows.detach()), splits, group_name, tally)

    def finish() -> Tensor:
        return _Finish.apply(placeholder, travelling, splits, group_name, wire, hidden_size, rows.dtype, tally)  # type: ignore[return-value]

    return Pending(finish)


def attach_exchange(
    rows: Tensor, received: Tensor, splits: Splits, group_name: str, tally: Tally | None = None
) -> Tensor:
    """Give `received`, which is `rows` after an exchange by other means, the gradient that `exchange` would have.

    For values that travelled packed with others, or before: `rows [sum(splits.send), ...]`, `received
    [sum(splits.recv), ...]`. `tally` is told of the gradient alone.
    """
    return await_gradient(rows, splits, group_name, tally)(received)


def await_gradient(
    rows: Tensor, splits: Splits, group_name: str, tally: Tally | None = None
) -> Callable[[Tensor], Tensor]:
    """`attach_exchange` in two steps: what is computed between them has its backward pass while gradients travel."""
    placeholder = _AwaitGradient.apply(rows, UNTOUCHED)

    def attach(received: Tensor) -> Tensor:
        return _Finish.apply(placeholder, received, splits, group_name, UNTOUCHED, rows.shape[-1], rows.dtype, tally)  # type: ignore[return-value]

    return attach


def _start(rows: Tensor, splits: Splits, group_name: str, tally: Tally | None) -> Tensor:
    _tell(tally, splits.send, rows)
    return _all_to_all(rows.contiguous(), splits.recv, splits.send, group_name)


def _tell(tally: Tally | None, per_rank: Sequence[int], rows: Tensor) -> None:
    """Tell of `rows` that the next op sends. Selective recompute sends none: it hands out what it has saved."""
    if tally is None or any(isinstance(mode, _CachedTorchDispatchMode) for mode in _get_current_dispatch_mode_stack()):
        return
    tally(per_rank, math.prod(rows.shape[1:]) * rows.dtype.itemsize)


class _AwaitGradient(Function):
    """A placeholder for rows that travel. Its backward waits for the gradients that the later node `_Finish` sent.

    Between the two nodes gradients are as `wire` encodes them, and still on their way: autograd must find no reason to
    look at them, hence a placeholder of just that shape and dtype.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, wire: Wire) -> Tensor:
        ctx.wire, ctx.hidden_size, ctx.dtype = wire, rows.shape[-1], rows.dtype
        return wire.placeholder(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.wire.decode(_wait(grads[0]), ctx.hidden_size, ctx.dtype), None


class _Finish(Function):
    """Waits in the forward pass; its backward starts the reverse exchange, for which `_AwaitGradient` waits."""

    @staticmethod
    def forward(
        ctx: Any,
        placeholder: Tensor,
        travelling: Tensor,
        splits: Splits,
        group_name: str,
        wire: Wire,
        hidden_size: int,
        dtype: torch.dtype,
        tally: Tally | None,
    ) -> Tensor:
        ctx.splits, ctx.group_name, ctx.wire, ctx.tally = splits, group_name, wire.back, tally
        return wire.decode(_wait(travelling), hidden_size, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        travelling = _start(ctx.wire.encode(grads[0]), ctx.splits.reversed, ctx.group_name, ctx.tally)
        return travelling, *(None,) * 7


def gather_rows(
    rows: Tensor, counts: list[int], group_name: str, wire: Wire = UNTOUCHED, tally: Tally | None = None
) -> Pending[Tensor]:
    """All ranks' `rows` `[counts[own rank], H]` in rank order, `[sum(counts), H]`, on every rank.

    Differentiable: the gradients of this rank's rows on all ranks are summed, as `scatter_sum` does. Rows travel as
    `wire` says, gradients as `wire.back` does. `tally` is told of both.
    """
    return _transfer(rows, _GATHER, _SCATTER, counts, group_name, wire, tally)


def scatter_sum(
    rows: Tensor, counts: list[int], group_name: str, wire: Wire = UNTOUCHED, tally: Tally | None = None
) -> Pending[Tensor]:
    """The sum over the ranks of their `rows` `[sum(counts), H]` that are this rank's, `[counts[own rank], H]`.

    In rank order and in fp32 (float64 stays), rounded once. Differentiable: gradients are gathered. `wire` and
    `tally` as in `gather_rows`.
    """
    return _transfer(rows, _SCATTER, _GATHER, counts, group_name, wire, tally)


class _Transfer(NamedTuple):
    """Rows to all ranks, or back from them.

    Attributes:
        start: of encoded rows, counts, the group's name and the tally; what it returns travels.
        finish: of what travelled, decoded, and counts.
    """

    start: Callable[[Tensor, list[int], str, Tally | None], Tensor]
    finish: Callable[[Tensor, list[int]], Tensor]


def all_gather(rows: Tensor, num_ranks: int, group_name: str) -> Tensor:
    """All ranks' `rows` `[U, ...]`, of one shape, in rank order, `[num_ranks * U, ...]`; to be waited for.

    On a CPU by an all-to-all of copies: torch's functional all-gather over gloo corrupts the heap where any other
    collective of the group is under way (torch 2.13; tests/comm/test_collectives.py).
    """
    if rows.device.type != "cpu":
        return _all_gather(rows, num_ranks, group_name)
    per_rank = [len(rows)] * num_ranks
    return _all_to_all(rows.repeat(num_ranks, *(1,) * (rows.dim() - 1)), per_rank, per_rank, group_name)


def _start_gather(rows: Tensor, counts: list[int], group_name: str, tally: Tally | None) -> Tensor:
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    _tell(tally, [len(padded)] * len(counts), padded)
    return all_gather(padded, len(counts), group_name)


def _finish_gather(rows: Tensor, counts: list[int]) -> Tensor:
    per_rank = rows.view(len(counts), max(counts), *rows.shape[1:])
    return torch.cat([rows[:count] for rows, count in zip(per_rank, counts, strict=True)])


def _start_scatter(rows: Tensor, counts: list[int], group_name: str, tally: Tally | None) -> Tensor:
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    return _start(rows, Splits(counts, [counts[group.rank()]] * len(counts)), group_name, tally)


def _finish_scatter(rows: Tensor, counts: list[int]) -> Tensor:
    per_rank = rows.view(len(counts), -1, *rows.shape[1:])
    return per_rank.sum(dim=0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


_GATHER = _Transfer(_start_gather, _finish_gather)
_SCATTER = _Transfer(_start_scatter, _finish_scatter)


def _transfer(
    rows: Tensor,
    transfer: _Transfer,
    reverse: _Transfer,
    counts: list[int],
    group_name: str,
    wire: Wire,
    tally: Tally | None,
) -> Pending[Tensor]:
    travelling = transfer.start(wire.encode(rows.detach()), counts, group_name, tally)

    def finish() -> Tensor:
        return _FinishTransfer.apply(rows, travelling, transfer, reverse, counts, group_name, wire, tally)  # type: ignore[return-value]

    return Pending(finish)


class _FinishTransfer(Function):
    """Waits in the forward pass; its backward sends gradients by the reverse transfer."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        travelling: Tensor,
        transfer: _Transfer,
        reverse: _Transfer,
        counts: list[int],
        group_name: str,
        wire: Wire,
        tally: Tally | None,
    ) -> Tensor:
        ctx.reverse, ctx.counts, ctx.group_name, ctx.wire, ctx.tally = reverse, counts, group_name, wire.back, tally
        return transfer.finish(wire.decode(_wait(travelling), rows.shape[-1], rows.dtype), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        travelling = ctx.reverse.start(ctx.wire.encode(grad), ctx.counts, ctx.group_name, ctx.tally)
        received = ctx.wire.decode(_wait(travelling), grad.shape[-1], grad.dtype)
        return ctx.reverse.finish(received, ctx.counts), *(None,) * 7


def sum_over_ranks(values: Tensor, group_name: str) -> Tensor:
    """The sum of `values` over the ranks of a group, the same on all of them. Without a gradient."""
    return _wait(_all_reduce(values.detach(), "sum", group_name))


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on all ranks of `group` if any rank has an error, so that none waits for a rank that gave up.

    A rank with an error raises its own; the others raise the first rank's, with a note of that (`is_from_other_rank`),
    so errors must pickle. Collective; objects travel, so keep it out of the training step.
    """
    if not dist.is_initialized():
        errors: Sequence[Exception | None] = [error]
    else:
        errors = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, error, group=group)
    if error is not None:
        raise error
    for rank, first in enumerate(errors):
        if first is not None:
            first.add_note(f"{_FROM_OTHER_RANK}{rank}")
            raise first


def is_from_other_rank(error: BaseException) -> bool:
    """Whether `raise_together` raised it for another rank."""
    return any(note.startswith(_FROM_OTHER_RANK) for note in getattr(error, "__notes__", ()))
