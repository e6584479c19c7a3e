"""DeepEP: exchanges by kernels of its own on NVLink and RDMA, while other work runs. It has not run on hardware yet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from crossdock.comm import Pending, Splits, exchange
from crossdock.dispatch.deepep_api import Buffers, DeepEPOptions, Template
from crossdock.dispatch.deepep_buffers import load_deepep, shared_buffers
from crossdock.dispatch.dispatcher import Dispatched
from crossdock.dispatch.fp8 import dequantise
from crossdock.dispatch.traffic import Traffic

__all__ = ["DEEPEP_OPS", "DeepEPDispatcher", "DeepEPHandle"]

# What the library's kernels are made for.
_HIDDEN_MULTIPLE, _MOST_TOP_K, _MOST_SLOTS, _MOST_SLOTS_PER_RANK = 256, 32, 2048, 256


class DeepEPHandle(NamedTuple):
    """The library's handle, taken apart: `template` is the rest of it, `None` where recompute needs none.

    `splits`: rows that this rank sent to each and received from each.
    """

    layout: tuple[Tensor, ...]
    template: Template | None
    splits: Splits


class DeepEPDispatcher:
    """Two exchanges by the library, and one of counts before; backward two, with nothing about the routes.

    The counts say how many tokens the fullest rank has, on which all ranks must agree before the library's buffers are
    made or grow. Rows arrive in no promised order.

    Args:
        group: the expert-parallel ranks.
        slots_per_rank: `P/R`.
        ranks_per_node: consecutive ranks that make a node, for `traffic`; all of them if `None`.
        options: the same on all ranks.
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
        ranks_per_node: int | None = None,
        options: DeepEPOptions | None = None,
        *,
        library: Any = None,
        dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    ) -> None:
        self.group_name, self.num_ranks, self.rank = group.group_name, group.size(), group.rank()
        self.slots_per_rank = slots_per_rank
        self.ranks_per_node = ranks_per_node or self.num_ranks
        self.options = options or DeepEPOptions()
        self.dtypes = tuple(dtypes)
        self.traffic = Traffic()
        num_slots = self.num_ranks * slots_per_rank
        if slots_per_rank > _MOST_SLOTS_PER_RANK or num_slots > _MOST_SLOTS:
            raise ValueError(
                f"dispatcher 'deepep' takes {_MOST_SLOTS} experts and {_MOST_SLOTS_PER_RANK} per rank at most, not "
                f"{num_slots} and {slots_per_rank}; use 'alltoall'"
            )
        self.buffers = shared_buffers(load_deepep() if library is None else library, group, self.options)

    def dispatch(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Pending[Dispatched]:
        self._check(x, slot_ids)
        splits, most_tokens = self._agree(slot_ids)
        weights = weights.to(torch.promote_types(x.dtype, torch.float32))
        flight = _Flight()
        x, weights = _Send.apply(flight, slot_ids, x, weights)  # type: ignore[misc]
        with _calling(self.buffers, slots_per_rank=self.slots_per_rank, most_tokens=most_tokens) as call:
            tokens, scales, ids, row_weights, per_slot, *layout = _dispatch_op(
                x.detach(), slot_ids, weights.detach(), [], call.number
            )
        self._count(splits, x, slot_ids.shape[1])

        def finish() -> Dispatched:
            call.land()
            rows = dequantise(tokens, scales, x.dtype) if scales.shape[1] else tokens
            handle = DeepEPHandle(tuple(layout), call.template, splits)
            own_weights = row_weights.masked_fill(ids < 0, 0)
            arrived: Any = _Receive.apply(flight, self.buffers, handle, ids, x, weights, rows, own_weights)
            return Dispatched(
                arrived[0], ids, arrived[1], handle, tokens_per_slot=per_slot, grouped=self.options.expand
            )

        return Pending(finish)

    def combine(self, y: Tensor, handle: DeepEPHandle) -> Pending[Tensor]:
        flight = _Flight()
        y = _SendBack.apply(flight, handle.layout, y)  # type: ignore[assignment]
        with _calling(self.buffers, template=handle.template) as call:
            (out,) = _combine_op(y.detach(), None, handle.layout, call.number)
        row_bytes = y.shape[1] * y.dtype.itemsize
        self.traffic.rows(handle.splits.recv, row_bytes, self.rank, self.ranks_per_node)

        def finish() -> Tensor:
            call.land()
            return _Collect.apply(flight, self.buffers, handle.template, y.grad_fn, y, out)  # type: ignore[return-value]

        return Pending(finish)

    def _check(self, x: Tensor, slot_ids: Tensor) -> None:
        if x.dtype not in self.dtypes:
            raise ValueError(f"dispatcher 'deepep' sends bfloat16, not {x.dtype}: train in bfloat16, or use 'alltoall'")
        if x.shape[1] % _HIDDEN_MULTIPLE:
            raise ValueError(
                f"dispatcher 'deepep' needs a hidden size that is a multiple of {_HIDDEN_MULTIPLE}, not {x.shape[1]}; "
                "use 'alltoall'"
            )
        if slot_ids.shape[1] > _MOST_TOP_K:
            raise ValueError(
                f"dispatcher 'deepep' takes {_MOST_TOP_K} experts per token at most, not {slot_ids.shape[1]}; "
                "use 'alltoall'"
            )

    def _agree(self, slot_ids: Tensor) -> tuple[Splits, int]:
        """Rows that this rank sends to and receives from each, and the tokens of the fullest rank: one collective."""
        num_tokens, no_rank = len(slot_ids), self.num_ranks
        ranks = torch.where(slot_ids < 0, no_rank, slot_ids // self.slots_per_rank)
        needed = torch.zeros(num_tokens, no_rank + 1, dtype=torch.int64, device=slot_ids.device).scatter_(1, ranks, 1)
        send = needed.sum(dim=0)[:no_rank]
        own = torch.stack([send, torch.full_like(send, num_tokens)], dim=1)
        ones = [1] * self.num_ranks
        theirs = exchange(own, Splits(ones, ones), self.group_name).wait()
        send_counts, recv_counts, tokens = torch.cat([own[:, :1], theirs], dim=1).t().tolist()
        return Splits(send_counts, recv_counts), max(tokens)

    def _count(self, splits: Splits, x: Tensor, top_k: int) -> None:
        hidden = x.shape[1]
        # FP8: a byte per value, and an fp32 scale for each 128.
        row_bytes = hidden + hidden // 32 if self.options.fp8_dispatch else hidden * x.dtype.itemsize
        self.traffic.rows(splits.send, row_bytes, self.rank, self.ranks_per_node)
        self.traffic.about_routes(splits.send, 12 * top_k, self.rank)
        self.traffic.metadata += 8 * (self.num_ranks - 1)  # each rank's number of tokens


class _Flight:
    """An exchange of gradients, from the node that starts it to the node that waits for it."""

    def __init__(self) -> None:
        self.event: Any = None

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
    if slot_ids is None or weights is None:
        rows, call.event = call.buffers.dispatch_again(x, call.inputs["template"], layout)
        return [rows]
    *tensors, received_layout, call.template, call.event = call.buffers.dispatch(x, slot_ids, weights, **call.inputs)
    return [*tensors, *received_layout]


@torch.library.impl("crossdock::deepep_combine", "CompositeExplicitAutograd")
def _run_combine(y: Tensor, weights: Tensor | None, layout: Sequence[Tensor], number: int) -> list[Tensor]:
    """Start sending `y [U, H]`, and `weights [U, K']` if any, back to be summed per token."""
    call = _CALLS[number]
    out, out_weights, call.event = call.buffers.combine(y, weights, call.inputs["template"], layout)
    return [out] if out_weights is None else [out, out_weights]


_dispatch_op = torch.ops.crossdock.deepep_dispatch.default
_combine_op = torch.ops.crossdock.deepep_combine.default

# What selective recompute must save, so that it never repeats an exchange.
DEEPEP_OPS = (_dispatch_op, _combine_op)


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
        # What is returned is still on its way; nothing but `_SendBack` lies between.
        ctx.flight.event = call.event
        return None, None, None, None, grad_y, None
