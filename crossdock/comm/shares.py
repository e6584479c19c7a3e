"""What tensor parallelism moves: values that all ranks of a group have, each a part of, or each a term of.

Each function's backward pass is another of them: a value that all ranks have has one gradient, the same on all of them,
where later on all compute the same with it; where each computes its own part, gradients are terms of a sum. Dynamo does
not follow them: a compiled graph ends there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from crossdock.comm.collectives import all_gather, gather_rows, scatter_sum, sum_over_ranks

__all__ = ["enter_parts", "gather_parts", "join_parts", "scatter_terms", "sum_terms", "take_part"]

_wait = torch.ops._c10d_functional.wait_tensor.default

F = TypeVar("F", bound=Callable[..., Any])


def _uncompiled(function: F) -> F:
    return cast(F, torch.compiler.disable(function))


@_uncompiled
def enter_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x`, which all ranks have, for ranks that each compute a part with it: gradients are summed."""
    return _Enter.apply(x, group.group_name)  # type: ignore[return-value]


@_uncompiled
def sum_terms(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' `x`, on all of them; its gradient is that of each term."""
    return _Sum.apply(x, group.group_name)  # type: ignore[return-value]


@_uncompiled
def take_part(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of `x`, which all ranks have, of as many equal ones along `dim` as there are ranks.

    Raises:
        ValueError: where `dim` does not divide.
    """
    if x.shape[dim] % group.size():
        raise ValueError(f"dimension {dim} of {list(x.shape)} must divide over {group.size()} ranks")
    return _Take.apply(x, dim, group.group_name, group.rank(), group.size())  # type: ignore[return-value]


@_uncompiled
def join_parts(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts `x`, of one shape, joined along `dim`, where all ranks then compute the same."""
    return _Join.apply(x, dim, group.group_name, group.rank(), group.size())  # type: ignore[return-value]


@_uncompiled
def gather_parts(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """As `join_parts`, where each rank then computes a part: gradients are summed, each rank's for its part."""
    rows = x.movedim(dim, 0)
    whole = gather_rows(rows.flatten(1), [len(rows)] * group.size(), group.group_name).wait()
    return whole.view(-1, *rows.shape[1:]).movedim(0, dim)


@_uncompiled
def scatter_terms(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part along `dim` of the sum of the ranks' `x`, in fp32 (float64 stays), rounded once."""
    rows = x.movedim(dim, 0)
    counts = [len(rows) // group.size()] * group.size()
    part = scatter_sum(rows.flatten(1), counts, group.group_name).wait()
    return part.view(-1, *rows.shape[1:]).movedim(0, dim)


def _joined(x: Tensor, dim: int, group_name: str, size: int) -> Tensor:
    rows = x.movedim(dim, 0).contiguous()
    return _wait(all_gather(rows, size, group_name)).movedim(0, dim)


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return sum_over_ranks(grads[0].contiguous(), ctx.group_name), None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        return sum_over_ranks(x.contiguous(), group_name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group_name: str, rank: int, size: int) -> Tensor:
        ctx.dim, ctx.group_name, ctx.size = dim, group_name, size
        return x.chunk(size, dim)[rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _joined(grads[0], ctx.dim, ctx.group_name, ctx.size), None, None, None, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group_name: str, rank: int, size: int) -> Tensor:
        ctx.dim, ctx.rank, ctx.size = dim, rank, size
        return _joined(x, dim, group_name, size).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].chunk(ctx.size, ctx.dim)[ctx.rank].contiguous(), None, None, None, None
