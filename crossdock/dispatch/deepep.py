"""DeepEP: exchanges by kernels of its own on NVLink and RDMA, while other work runs. It has not run on hardware yet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from crossdock.comm import UNTOUCHED, Pending, Splits
from crossdock.dispatch.agreement import Agreement
from crossdock.dispatch.checks import check_results
from crossdock.dispatch.deepep_api import Buffers, DeepEPOptions, Template
from crossdock.dispatch.deepep_buffers import choose_deepep_api, load_deepep, shared_buffers
from crossdock.dispatch.dispatcher import Dispatched
from crossdock.dispatch.needs import needed_ranks
from crossdock.dispatch.nodes import Nodes
from crossdock.dispatch.traffic import Needs, Traffic, TrafficMeter
from crossdock.kernels import dequantize_fp8

__all__ = ["DEEPEP_OPS", "DeepEPDispatcher", "DeepEPHandle", "deepep_problem"]

# What the library's kernels are made for.
_HIDDEN_MULTIPLE, _MOST_TOP_K, _MOST_SLOTS, _MOST_SLOTS_PER_RANK = 256, 32, 2048, 256


def deepep_problem(
    num_ranks: int, slots_per_rank: int, hidden_size: int, top_k: int, dtype: torch.dtype, options: DeepEPOptions
) -> str | None:
    """Why `deepep` cannot dispatch `[T, hidden_size]` tokens of `dtype` here, or `None` where it can."""
    try:
        library = load_deepep()
        choose_deepep_api(library, options).check_ranks(library, num_ranks)
    except ValueError as error:
        return "its library is not installed" if isinstance(error.__cause__, ImportError) else str(error)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "it needs GPUs of SM90"
    return _problem_of_slots(num_ranks * slots_per_rank, slots_per_rank) or _problem_of_tokens(
        hidden_size, top_k, dtype, (torch.bfloat16,)
    )


def _problem_of_slots(num_slots: int, slots_per_rank: int) -> str | None:
    if slots_per_rank <= _MOST_SLOTS_PER_RANK and num_slots <= _MOST_SLOTS:
        return None
    return (
        f"takes {_MOST_SLOTS} experts and {_MOST_SLOTS_PER_RANK} per rank at most, not {num_slots} and {slots_per_rank}"
    )


def _problem_of_tokens(hidden_size: int, top_k: int, dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> str | None:
    if dtype not in dtypes:
        return f"sends bfloat16, not {dtype}"
    if hidden_size % _HIDDEN_MULTIPLE:
        return f"needs a hidden size that is a multiple of {_HIDDEN_MULTIPLE}, not {hidden_size}"
    if top_k > _MOST_TOP_K:
        return f"takes {_MOST_TOP_K} experts per token at most, not {top_k}"
    return None


class DeepEPHandle(NamedTuple):
    """The library's handle, taken apart: `template` is the rest of it, `None` where recompute needs none.

    `splits`: rows that this rank sent to each and received from each. `num_rows`: `U`. `hidden_size`: `H`.
    `needs`: what this rank's tokens need.
    """

    layout: tuple[Tensor, ...]
    template: Template | None
    splits: Splits
    num_rows: int
    hidden_size: int
    needs: Needs


class DeepEPDispatcher:
    """Two exchanges by the library, and one of counts before; backward two, with nothing about the routes.

    The counts say how many tokens the fullest rank has, on which all ranks must agree before the library's buffers are
    made or grow. Rows arrive in no promised order.

    Args:
        group: the expert-parallel ranks.
        slots_per_rank: `P/R`.
        nodes: of the ranks, for `traffic`; one if `None`.
        options: the same on all ranks.
        chunks: parts that a rank's tokens are dispatched in, each by a call.
        debug_checks: look at ids, which costs a sync.
        library: the module `deep_ep`; imported if `None`.
        dtypes: of tokens that the library takes. Others are refused, not cast: bf16 would silently be the precision
            of a model that asked for more.

    Raises:
        ValueError: where the library is missing or too old, or does not take so many slots.
    """

    ordered = False

    def __init__(
        self,
        group: dist.ProcessGroup,
        slots_per_rank: int,
        nodes: Nodes | None = None,
        options: DeepEPOptions | None = None,
        *,
        chunks: int = 1,
        debug_checks: bool = False,
        library: Any = None,
        dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    ) -> None:
        self.num_ranks, self.slots_per_rank = group.size(), slots_per_rank
        self.options = options or DeepEPOptions()
        self.dtypes = tuple(dtypes)
        self.rank = group.rank()
        self.meter = TrafficMeter(group, nodes)
        self.agreement = Agreement(
            group, slots_per_rank, UNTOUCHED, chunks=chunks, check_ids=debug_checks, tally=self.meter.metadata
        )
        if problem := _problem_of_slots(self.num_ranks * slots_per_rank, slots_per_rank):
            raise ValueError(f"dispatcher 'deepep' {problem}; use 'alltoall'")
        self.buffers = shared_buffers(load_deepep() if library is None else library, group, self.options)

    @property
    def traffic(self) -> Traffic:
        return self.meter.traffic

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        self.agreement.check(x, slot_ids, weights)
        if problem := _problem_of_tokens(x.shape[1], slot_ids.shape[1], x.dtype, self.dtypes):
            self.refuse(x.device)
            raise ValueError(f"x and slot_ids: dispatcher 'deepep' {problem}; use 'alltoall'")
        needed = needed_ranks(slot_ids, self.slots_per_rank, self.num_ranks)
        splits, tokens_of_ranks = self.agreement.exchange_counts(needed.sum(dim=0), x, slot_ids, weights)
        needs = self.meter.needs(needed, sum(splits.send) - splits.send[self.rank])
        weights = weights.to(torch.promote_types(x.dtype, torch.float32))
        flight = _Flight()
        x, weights = _Send.apply(flight, slot_ids, x, weights)  # type: ignore[misc]
        with _calling(self.buffers, slots_per_rank=self.slots_per_rank, most_tokens=max(tokens_of_ranks)) as call:
            tokens, scales, ids, row_weights, per_slot, *layout = _dispatch_op(
                x.detach(), slot_ids, weights.detach(), [], call.number
            )
        if call.ran:
            self._count_tokens(splits, needs, x, slot_ids.shape[1])

        def finish() -> Dispatched:
            call.land()
            rows = dequantize_fp8(tokens, scales, x.dtype) if scales.shape[1] else tokens
            handle = DeepEPHandle(tuple(layout), call.template, splits, len(rows), rows.shape[1], needs)
            own_weights = row_weights.masked_fill(ids < 0, 0)
            flight.count = partial(self._count_back, handle, own_weights.shape[1], x.dtype)
            arrived: Any = _Receive.apply(flight, self.buffers, handle, ids, x, weights, rows, own_weights)
            return Dispatched(
                arrived[0], ids, arrived[1], handle, tokens_per_slot=per_slot, grouped=self.options.expand
            )

        return Pending(finish)

    def refuse(self, device: torch.device) -> None:
        self.agreement.refuse(device)

    def combine(self, y: Tensor, handle: DeepEPHandle) -> Pending[Tensor]:
        check_results(y, handle.num_rows, handle.hidden_size)
        flight = _Flight()
        y = _SendBack.apply(flight, handle.layout, y)  # type: ignore[assignment]
        with _calling(self.buffers, template=handle.template) as call:
            (out,) = _combine_op(y.detach(), None, handle.layout, call.number)
        if call.ran:
            self._count_back(handle, 0, y.dtype)
        row_bytes = y.shape[1] * y.dtype.itemsize
        flight.count = partial(self.meter.rows(handle.needs), handle.splits.send, row_bytes)

        def finish() -> Tensor:
            call.land()
            return _Collect.apply(flight, self.buffers, handle.template, y.grad_fn, y, out)  # type: ignore[return-value]

        return Pending(finish)

    def _count_tokens(self, splits: Splits, needs: Needs, x: Tensor, top_k: int) -> None:
        hidden = x.shape[1]
        # FP8: a byte per value, and an fp32 scale for each 128.
        row_bytes = hidden + hidden // 32 if self.options.fp8_dispatch else hidden * x.dtype.itemsize
        self.meter.rows(needs)(splits.send, row_bytes)
        self.meter.metadata(splits.send, 12 * top_k)

    def _count_back(self, handle: DeepEPHandle, num_weights: int, dtype: torch.dtype) -> None:
        """Rows that go back, with so many gradients of weights each."""
        self.meter.rows(handle.needs)(handle.splits.recv, handle.hidden_size * dtype.itemsize)
        self.meter.metadata(handle.splits.recv, 4 * num_weights)


def _nothing() -> None:
    pass


class _Flight:
    """An exchange of gradients, from the node that starts it, and counts it, to the node that waits for it."""

    def __init__(self) -> None:
        self.event: Any = None
        self.count: Callable[[], None] = _nothing

    def land(self) -> None:
        """Let the current stream wait for the exchange, once."""
        event, self.event = self.event, None
        if event is not None:
            event.current_stream_wait()


class _Call(_Flight):
    """What an op needs or gives beside tensors. After a selective recompute, which runs no op, nothing was given."""

    def __init__(self, number: int, buffers: Buffers, **inputs: Any) -> None:
        super().__init__()
        self.number, self.buffers, self.inputs = number, buffers, inputs
        self.template: Template | None = None
        self.ran = False


# Operators take numbers, not objects: the calls that are being made, by number. An entry is there during its call.
_CALLS: dict[int, _Call] = {}
_NUMBERS = itertools.count()


@contextmanager
def _calling(buffers: Buffers, **inputs: Any) -> Iterator[_Call]:
    call = _Call(next(_NUMBERS), buffers, **inputs)
    _CALLS[call.number] = call
    try:
        yield call
    finally:
        del _CALLS[call.number]


# `define` rather than `custom_op`, which refuses outputs that share storage, as tensors of a handle may.
torch.library.define(
    "crossdock::deepep_dispatch",
    "(Tensor x, Tensor? slot_ids, Tensor? weights, Tensor[] layout, int call) -> Tensor[]",
)
torch.library.define("crossdock::deepep_combine", "(Tensor y, Tensor? weights, Tensor[] layout, int call) -> Tensor[]")


@torch.library.impl("crossdock::deepep_dispatch", "CompositeExplicitAutograd")
def _run_dispatch(
    x: Tensor, slot_ids: Tensor | None, weights: Tensor | None, layout: Sequence[Tensor], number: int
) -> list[Tensor]:
    """Start sending `x [T, H]`: by `slot_ids [T, K]`, or, without, where the tokens of the call's handle went."""
    call = _CALLS[number]
    call.ran = True
    if slot_ids is None or weights is None:
        rows, call.event = call.buffers.dispatch_again(x, call.inputs["template"], layout)
        return [rows]
    *tensors, received_layout, call.template, call.event = call.buffers.dispatch(x, slot_ids, weights, **call.inputs)
    return [*tensors, *received_layout]


@torch.library.impl("crossdock::deepep_combine", "CompositeExplicitAutograd")
def _run_combine(y: Tensor, weights: Tensor | None, layout: Sequence[Tensor], number: int) -> list[Tensor]:
    """Start sending `y [U, H]`, and `weights [U, K']` if any, back to be summed per token."""
    call = _CALLS[number]
    call.ran = True
    out, out_weights, call.event = call.buffers.combine(y, weights, call.inputs["template"], layout)
    return [out] if out_weights is None else [out, out_weights]


_dispatch_op = torch.ops.crossdock.deepep_dispatch.default
_combine_op = torch.ops.crossdock.deepep_combine.default

# What selective recompute must save, so that it never repeats an exchange.
DEEPEP_OPS = (_dispatch_op, _combine_op)
"""The operators of `deepep`, which selective recompute saves."""


class _Send(Function):
    """Identity of `x [T, H]` and `weights [T, K]`; its backward waits for the gradients that `_Receive` sent."""

    @staticmethod
    def forward(ctx: Any, flight: _Flight, slot_ids: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.flight = flight
        ctx.save_for_backward(slot_ids)
        return x.view_as(x), weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (slot_ids,) = ctx.saved_tensors
        ctx.flight.land()
        # The library promises nothing about a weight whose route is none.
        return None, None, grads[0], grads[1].masked_fill(slot_ids < 0, 0)


class _Receive(Function):
    """What arrived, in place of what was sent; its backward sends the gradients back."""

    @staticmethod
    def forward(
        ctx: Any,
        flight: _Flight,
        buffers: Buffers,
        handle: DeepEPHandle,
        slot_ids: Tensor,
        x: Tensor,
        weights: Tensor,
        rows: Tensor,
        row_weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.flight, ctx.buffers, ctx.template = flight, buffers, handle.template
        # Saved, not kept: after recompute these are the tensors of the exchange that the activations come from.
        ctx.save_for_backward(slot_ids, *handle.layout)
        return rows.view_as(rows), row_weights.view_as(row_weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        slot_ids, *layout = ctx.saved_tensors
        grad_weights = grads[1].masked_fill(slot_ids < 0, 0)
        with _calling(ctx.buffers, template=ctx.template) as call:
            grad_x, grad_weights = _combine_op(grads[0], grad_weights, layout, call.number)
        ctx.flight.count()
        # What is returned is still on its way; nothing but `_Send` lies between.
        ctx.flight.event = call.event
        return None, None, None, None, grad_x, grad_weights, None, None


class _SendBack(Function):
    """Identity of `y [U, H]`; its backward waits for the gradients that `_Collect` sent."""

    @staticmethod
    def forward(ctx: Any, flight: _Flight, layout: tuple[Tensor, ...], y: Tensor) -> Tensor:
        ctx.flight = flight
        # Here and not in `_Collect`, so that a recompute can end before it combines.
        ctx.save_for_backward(*layout)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.flight.land()
        return None, None, grads[0]


class _Collect(Function):
    """The sums per token, in place of `y`; its backward sends their gradients to where the tokens went."""

    @staticmethod
    def forward(
        ctx: Any, flight: _Flight, buffers: Buffers, template: Template | None, sent: Any, y: Tensor, out: Tensor
    ) -> Tensor:
        ctx.flight, ctx.buffers, ctx.template, ctx.sent = flight, buffers, template, sent
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with _calling(ctx.buffers, template=ctx.template) as call:
            (grad_y,) = _dispatch_op(grads[0], None, None, ctx.sent.saved_tensors, call.number)
        ctx.flight.count()
        # What is returned is still on its way; nothing but `_SendBack` lies between.
        ctx.flight.event = call.event
        return None, None, None, None, grad_y, None
