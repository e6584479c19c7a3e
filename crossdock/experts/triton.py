"""Experts through Triton kernels: what surrounds the products happens within them (crossdock/kernels/grouped).

    forward     sort routes by slot
                up          x Wgu, rows taken from tokens; h = p a(z) in the same kernel
                down        h Wd
                combine     each token takes its rows and sums them in fp32
    backward    down_grad   dy Wd^T, rows taken from dy; the kept z gives dz, p h and dp in the same kernel
                up_grad     dz Wgu^T, combined as above
                weights     x^T dz and (p h)^T dy, rows taken along the reduction

Kept for the backward pass are `x` (which somebody else holds anyway), `z [N, 2I]` and an index per row. No atomics: the
same numbers in every run. The data flow is SonicMoE's (Guo et al., 2025). It has not run on hardware yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from crossdock.experts.checks import alignment_problem
from crossdock.experts.experts import ExpertParams
from crossdock.experts.formula import SWIGLU, ExpertsFormula
from crossdock.experts.operator import Gradients, Kept, make_backend
from crossdock.kernels import Gating, Tiles, TileTable, counting_sort, invert_order, unpermute
from crossdock.kernels.grouped import (
    RowTiles,
    RowValues,
    SlotMatrices,
    SlotRows,
    down_gradient,
    multiply,
    outer,
    row_tiles,
    up_projection,
)
from crossdock.kernels.runtime import runs_on

__all__ = ["triton", "triton_problem"]

# Columns of a matrix beside which a sum per slot is a product: the least of a tile.
_SUM_COLUMNS = 16


def triton(
    tokens: Tensor,
    slot_ids: Tensor,
    weights: Tensor,
    params: ExpertParams,
    formula: ExpertsFormula = SWIGLU,
    *,
    static: bool = False,
    tiles: TileTable | None = None,
) -> Tensor:
    """Contract and shapes: `ExpertsBackend`. fp32, bf16 and fp16; fp32 without tensor cores.

    Args:
        static: give every entry of `slot_ids` a row, a route or not, so that no shape depends on the ids and nothing
            syncs. Otherwise only real routes get a row.
        tiles: of the kernels; `default_tiles` for those that it has none for.

    Raises:
        ValueError: where kernels cannot run, for float64, or where `H` or `I` give rows that are no multiple of 16
            bytes.
    """
    if problem := triton_problem(tokens, params):
        raise ValueError(f"experts backend 'triton' {problem}; use 'grouped_mm' or 'eager'")
    backend = _STATIC if static else _DYNAMIC
    return backend(tokens, slot_ids, weights, params, formula, tuning=() if tiles is None else tiles.to_ints())


def triton_problem(tokens: Tensor, params: ExpertParams) -> str | None:
    """Why `triton` cannot compute these `tokens [U, H]` and `params`, or `None` where it can."""
    if tokens.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16, not {tokens.dtype}"
    if not runs_on(tokens.device):
        return f"needs Triton and a GPU; tokens are on {tokens.device}"
    return alignment_problem(tokens, params)


class _Products:
    """The products of one pass, each with tiles of its own."""

    def __init__(self, rows: SlotRows, num_slots: int, itemsize: int, table: TileTable) -> None:
        self.rows, self.itemsize, self.table = rows, itemsize, table
        self.rows_per_slot = len(rows.order) / max(num_slots, 1)
        self._row_tiles: dict[int, RowTiles] = {}

    def tiles(self, kernel: str) -> Tiles:
        return self.table.choose(kernel, self.rows_per_slot, self.itemsize)

    def tiled(self, kernel: str) -> tuple[SlotRows, Tiles, RowTiles]:
        """The rows, and what a kernel cuts them into; kernels with as many rows to a tile share the tiles."""
        tiles = self.tiles(kernel)
        if tiles.rows not in self._row_tiles:
            self._row_tiles[tiles.rows] = row_tiles(self.rows, tiles.rows)
        return self.rows, tiles, self._row_tiles[tiles.rows]


def _gating(formula: ExpertsFormula) -> Gating:
    return Gating(formula.activation, formula.gated, formula.limit, formula.up_offset)


def _forward(
    tokens: Tensor,
    slot_ids: Tensor,
    weights: Tensor,
    params: ExpertParams,
    formula: ExpertsFormula,
    tuning: Sequence[int],
    *,
    static: bool,
) -> tuple[Tensor, Kept]:
    num_slots, top_k = len(params.down_projs), max(slot_ids.shape[1], 1)
    order, counts, row_of_route = counting_sort(slot_ids, num_slots)
    if not static:
        order = order[: int(counts.sum())]
    rows = SlotRows(order, counts.cumsum(0).to(torch.int32), top_k)
    products = _Products(rows, num_slots, tokens.itemsize, TileTable.from_ints(tuple(tuning)))
    on_output = formula.weight_on == "output"
    weights = weights.contiguous()
    up_rows, up_tiles, up_row_tiles = products.tiled("up")
    pre, h = up_projection(
        tokens if on_output else _scaled_rows(tokens, weights, rows),
        SlotMatrices.of(params.gate_and_up_projs),
        params.gate_and_up_bias,
        weights if on_output else None,
        up_rows,
        _gating(formula),
        up_tiles,
        up_row_tiles,
        gather=on_output,
    )
    bias_weights = weights if on_output else None
    out = multiply(h, SlotMatrices.of(params.down_projs), params.down_bias, bias_weights, *products.tiled("down"))
    return unpermute(out, order, row_of_route), Kept(pre, order, counts)


def _backward(
    grad_y: Tensor,
    tokens: Tensor,
    weights: Tensor,
    params: ExpertParams,
    kept: Kept,
    formula: ExpertsFormula,
    tuning: Sequence[int],
    *,
    needs_tokens: bool,
    needs_params: bool,
) -> Gradients:
    pre, order, counts = kept
    weights = weights.contiguous()
    on_output = formula.weight_on == "output"
    rows = SlotRows(order, counts.cumsum(0).to(torch.int32), max(weights.shape[1], 1))
    row_of_route = invert_order(order, weights.numel()).view(weights.shape)
    products = _Products(rows, len(counts), tokens.itemsize, TileTable.from_ints(tuple(tuning)))
    down_rows, down_tiles, down_row_tiles = products.tiled("down_grad")
    grads = down_gradient(
        grad_y,
        SlotMatrices.of(params.down_projs).mT,
        weights if on_output else None,
        pre,
        down_rows,
        _gating(formula),
        down_tiles,
        down_row_tiles,
    )
    x, grad_weights = RowValues(tokens, gather=True), grads.weights
    grad_tokens = None
    if needs_tokens or not on_output:
        gate_and_up = SlotMatrices.of(params.gate_and_up_projs).mT
        grad_x = multiply(grads.pre, gate_and_up, None, None, *products.tiled("up_grad"))
        if not on_output:
            grad_weights = (tokens[rows.tokens].float() * grad_x.float()).sum(dim=1)
            grad_x = (grad_x * _weight_of_rows(weights, rows)).to(grad_x.dtype)
            x = RowValues(_scaled_rows(tokens, weights, rows))
        grad_tokens = unpermute(grad_x, order, row_of_route) if needs_tokens else None
    if params.down_bias is not None and on_output:
        grad_weights = grad_weights + _of_down_bias(grad_y, params.down_bias, rows)
    # A row per route, each of which one route names: what stands past the last slot's end is not taken.
    of_routes = (
        torch.where(row_of_route < 0, 0, grad_weights[row_of_route.clamp(min=0)])
        if len(order)
        else torch.zeros_like(weights)
    )
    return Gradients(
        grad_tokens,
        of_routes.to(weights.dtype),
        _of_params(grad_y, x, grads.pre, grads.h, weights if on_output else None, params, products)
        if needs_params
        else None,
    )


def _of_params(
    grad_y: Tensor,
    x: RowValues,
    grad_pre: Tensor,
    h: Tensor,
    weights: Tensor | None,
    params: ExpertParams,
    products: _Products,
) -> ExpertParams:
    """The parameters' gradients; those of matrices lie in memory as the matrices do."""
    rows = products.rows

    def product(left: RowValues, right: RowValues, kernel: str, like: Tensor | None = None) -> Tensor:
        tiles = products.tiles(kernel)
        if like is not None and SlotMatrices.of(like).transposed:
            return outer(right, left, rows, tiles).mT
        return outer(left, right, rows, tiles)

    of_gate_and_up_bias = of_down_bias = None
    if params.gate_and_up_bias is not None:
        ones = RowValues(grad_pre.new_ones(len(grad_pre), _SUM_COLUMNS))
        of_gate_and_up_bias = product(ones, RowValues(grad_pre), "up_weight_grad")[:, 0]
    if params.down_bias is not None:
        weight = h.new_ones(len(h), 1) if weights is None else _weight_of_rows(weights, rows).to(h.dtype)
        factors = RowValues(weight.expand(-1, _SUM_COLUMNS))
        of_down_bias = product(factors, RowValues(grad_y, gather=True), "down_weight_grad")[:, 0]
    return ExpertParams(
        product(x, RowValues(grad_pre), "up_weight_grad", params.gate_and_up_projs),
        product(RowValues(h), RowValues(grad_y, gather=True), "down_weight_grad", params.down_projs),
        of_gate_and_up_bias,
        of_down_bias,
    )


def _weight_of_rows(weights: Tensor, rows: SlotRows) -> Tensor:
    """The routing weight of each row, `[M, 1]`; 0 past the last slot's end."""
    return torch.where(rows.order < 0, 0, weights.flatten()[rows.order.clamp(min=0)])[:, None]


def _scaled_rows(tokens: Tensor, weights: Tensor, rows: SlotRows) -> Tensor:
    """Each row's token times its routing weight, `[M, H]`."""
    return (tokens[rows.tokens] * _weight_of_rows(weights, rows)).to(tokens.dtype)


def _of_down_bias(grad_y: Tensor, bias: Tensor, rows: SlotRows) -> Tensor:
    """`<dy, b>` of each row, `[M]` fp32: what a bias on the output adds to the routing weight's gradient."""
    products = grad_y.float() @ bias.float().t()
    row = torch.arange(len(rows.order), dtype=torch.int32, device=grad_y.device)
    slot = torch.searchsorted(rows.ends, row, right=True).clamp(max=len(rows.ends) - 1)
    return products[rows.tokens, slot]


_DYNAMIC, _STATIC = (
    make_backend(name, partial(_forward, static=static), _backward, static=static)
    for name, static in (("triton_experts", False), ("static_triton_experts", True))
)
