"""Tokens to one row per route, and back: the backward pass of either is the other.

`order [M]` has the flat index `u * K + k` of each row's route, `-1` for a row without one; `row_of_route [U, K]` has
the row of each route, `-1` for none (`counting_sort` makes both; a caller that knows the number of real routes cuts
`order` there, one that aligns groups puts `-1` between). Both directions only read by index: no atomics, and each sum
has one order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.kernels.runtime import buffer_dtype, cdiv, device_of, jit, runs, tl

__all__ = ["permute", "permute_reference", "unpermute", "unpermute_reference"]

_BLOCK_ROWS, _BLOCK_COLUMNS, _NUM_WARPS = 8, 256, 8


def permute(tokens: Tensor, order: Tensor, row_of_route: Tensor) -> Tensor:
    """`tokens [U, H]` to rows `[M, H]`: `rows[m] = tokens[order[m] // K]`, 0 where `order[m]` is -1.

    A token's gradient is the sum over its routes, in fp32 (float64 for float64), rounded once.

    Args:
        tokens: `[U, H]`.
        order: `[M]` int64.
        row_of_route: `[U, K]` int64, the inverse of `order`: every row of a route that `order` leaves out is -1.

    Raises:
        ValueError: on other shapes.
    """
    _check(tokens, len(row_of_route), "tokens", order, row_of_route)
    return _Permute.apply(tokens, order, row_of_route)  # type: ignore[return-value]


def unpermute(rows: Tensor, order: Tensor, row_of_route: Tensor) -> Tensor:
    """`rows [M, H]` to the sums over each token's routes `[U, H]`, in fp32 and in the order of `k`, rounded once.

    A token without routes gets 0. `order` and `row_of_route` as in `permute`.
    """
    _check(rows, len(order), "rows", order, row_of_route)
    return _Unpermute.apply(rows, order, row_of_route)  # type: ignore[return-value]


def permute_reference(tokens: Tensor, order: Tensor, row_of_route: Tensor) -> Tensor:
    """What `permute` computes, in torch's own operations and with their gradient."""
    rows = torch.zeros(len(order), tokens.shape[1], dtype=tokens.dtype, device=tokens.device)
    if not tokens.numel():
        return rows + tokens.sum()
    token = order.clamp(min=0) // max(row_of_route.shape[1], 1)
    return torch.where((order >= 0)[:, None], tokens[token], rows)


def unpermute_reference(rows: Tensor, order: Tensor, row_of_route: Tensor) -> Tensor:
    """What `unpermute` computes, in torch's own operations and with their gradient."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(len(row_of_route), rows.shape[1], dtype=wide, device=rows.device)
    if not rows.numel():
        return (total + rows.sum()).to(rows.dtype)
    for row in row_of_route.unbind(1):
        # Chosen, not multiplied by 0: a row that nobody names may hold NaN.
        total = total + torch.where((row >= 0)[:, None], rows[row.clamp(min=0)].to(wide), 0)
    return total.to(rows.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, order: Tensor, row_of_route: Tensor) -> Tensor:
        ctx.save_for_backward(order, row_of_route)
        return _gather(tokens, order, row_of_route)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _sum(grad, *ctx.saved_tensors), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, row_of_route: Tensor) -> Tensor:
        ctx.save_for_backward(order, row_of_route)
        return _sum(rows, order, row_of_route)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _gather(grad, *ctx.saved_tensors), None, None


def _gather(tokens: Tensor, order: Tensor, row_of_route: Tensor) -> Tensor:
    if not runs(tokens, order, row_of_route):
        return permute_reference(tokens, order, row_of_route)
    hidden = tokens.shape[1]
    rows = torch.empty(len(order), hidden, dtype=tokens.dtype, device=tokens.device)
    if rows.numel():
        grid = (cdiv(len(order), _BLOCK_ROWS), cdiv(hidden, _BLOCK_COLUMNS))
        with device_of(tokens):
            _gather_kernel[grid](
                *(tokens.contiguous(), order.contiguous(), rows),
                *(len(order), hidden),
                TOP_K=max(row_of_route.shape[1], 1),
                BLOCK_ROWS=_BLOCK_ROWS,
                BLOCK_COLUMNS=_BLOCK_COLUMNS,
                num_warps=_NUM_WARPS,
            )
    return rows


def _sum(rows: Tensor, order: Tensor, row_of_route: Tensor) -> Tensor:
    if not runs(rows, order, row_of_route):
        return unpermute_reference(rows, order, row_of_route)
    (num_tokens, top_k), hidden = row_of_route.shape, rows.shape[1]
    tokens = torch.empty(num_tokens, hidden, dtype=buffer_dtype(rows.dtype), device=rows.device)
    if tokens.numel():
        grid = (cdiv(num_tokens, _BLOCK_ROWS), cdiv(hidden, _BLOCK_COLUMNS))
        with device_of(rows):
            _sum_kernel[grid](
                *(rows.contiguous(), row_of_route.contiguous(), tokens),
                *(num_tokens, hidden),
                TOP_K=top_k,
                BLOCK_ROWS=_BLOCK_ROWS,
                BLOCK_COLUMNS=_BLOCK_COLUMNS,
                num_warps=_NUM_WARPS,
            )
    return tokens.to(rows.dtype)


@jit
def _gather_kernel(
    tokens_ptr,  # [U, hidden]
    order_ptr,  # [num_rows]
    rows_ptr,  # [num_rows, hidden]
    num_rows,
    hidden,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    route = tl.load(order_ptr + row, mask=row < num_rows, other=-1)
    token = route // TOP_K
    values = tl.load(
        tokens_ptr + token[:, None] * hidden + column, mask=(route >= 0)[:, None] & (column < hidden), other=0
    )
    tl.store(rows_ptr + row[:, None] * hidden + column, values, mask=(row < num_rows)[:, None] & (column < hidden))


@jit
def _sum_kernel(
    rows_ptr,  # [M, hidden]
    row_of_route_ptr,  # [num_tokens, TOP_K]
    tokens_ptr,  # [num_tokens, hidden]
    num_tokens,
    hidden,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_route_ptr + token * TOP_K + k, mask=token < num_tokens, other=-1)
        mask = (row >= 0)[:, None] & (column < hidden)
        total += tl.load(rows_ptr + row[:, None] * hidden + column, mask=mask, other=0).to(tl.float32)
    mask = (token < num_tokens)[:, None] & (column < hidden)
    tl.store(tokens_ptr + token[:, None] * hidden + column, total, mask=mask)


def _check(values: Tensor, length: int, name: str, order: Tensor, row_of_route: Tensor) -> None:
    if order.dim() != 1 or row_of_route.dim() != 2:
        raise ValueError(f"order {list(order.shape)}, row_of_route {list(row_of_route.shape)}: must be [M] and [U, K]")
    if values.dim() != 2 or len(values) != length:
        raise ValueError(f"{name} {list(values.shape)}: must be [{length}, H]")
