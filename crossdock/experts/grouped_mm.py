"""Experts through `torch.nn.functional.grouped_mm`: all experts' products in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.experts.checks import ALIGNMENT_BYTES, alignment_problem
from crossdock.experts.experts import ExpertParams
from crossdock.experts.formula import SWIGLU, ExpertsFormula
from crossdock.experts.operator import Gradients, Kept, make_backend
from crossdock.experts.routes import sort_routes

__all__ = ["grouped_mm", "grouped_mm_problem"]


def grouped_mm(
    tokens: Tensor,
    slot_ids: Tensor,
    weights: Tensor,
    params: ExpertParams,
    formula: ExpertsFormula = SWIGLU,
    *,
    static: bool = False,
) -> Tensor:
    """Contract and shapes: `ExpertsBackend`. fp32, bf16 and fp16.

    Args:
        static: give every entry of `slot_ids` a row, a route or not, so that no shape depends on the ids and nothing
            syncs; the products leave out what is no route. Otherwise only real routes get a row.

    Raises:
        ValueError: for float64, or where `H` or `I` give rows that are no multiple of 16 bytes.
    """
    if problem := grouped_mm_problem(tokens, params):
        raise ValueError(f"experts backend 'grouped_mm' {problem}; use 'eager'")
    backend = _STATIC if static else _DYNAMIC
    return backend(tokens, slot_ids, weights, params, formula)


def grouped_mm_problem(tokens: Tensor, params: ExpertParams) -> str | None:
    """Why `grouped_mm` cannot compute these `tokens [U, H]` and `params`, or `None` where it can."""
    if tokens.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16, not {tokens.dtype}"
    return alignment_problem(tokens, params)


class _Rows:
    """The sorted routes' rows, and products over them."""

    def __init__(self, route: Tensor, counts: Tensor, shape: torch.Size, *, static: bool) -> None:
        self.route, self.counts, self.shape = route, counts, shape
        self.offsets = counts.cumsum(0).to(torch.int32)
        # Those that are no route, at the end.
        self.is_none = torch.arange(len(route), device=route.device) >= self.offsets[-1] if static else None

    def real(self, rows: Tensor) -> Tensor:
        """Zeros for rows that are no route: past the last offset, a product leaves memory as it was."""
        return rows if self.is_none is None else rows.masked_fill_(self.is_none[:, None], 0)

    def of_tokens(self, per_token: Tensor) -> Tensor:
        """Of `[U, H]`, the row of each route's token."""
        return self.real(per_token[self.route // self.shape[1]])

    def of_routes(self, per_route: Tensor) -> Tensor:
        """Of `[U, K]`, each route's value as a column."""
        return self.real(per_route.flatten()[self.route, None])

    def of_slots(self, per_slot: Tensor) -> Tensor:
        """Of `[P/R, ...]`, the row of each route's slot."""
        repeats = self.counts
        if self.is_none is not None:
            per_slot, repeats = F.pad(per_slot, (0, 0, 0, 1)), torch.cat([repeats, self.is_none.sum()[None]])
        return per_slot.repeat_interleave(repeats, dim=0, output_size=len(self.route))

    def times(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Each row times its slot's matrix."""
        return self.real(F.grouped_mm(rows, matrices, offs=self.offsets))

    def outer(self, left: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
        """Of each slot, `left^T right` over its rows; columns lie together in memory where `transposed`."""
        if transposed:
            return self.outer(right, left).mT
        return F.grouped_mm(left.t(), right, offs=self.offsets)

    def sum_per_slot(self, rows: Tensor) -> Tensor:
        """`[P/R, ...]`: a product with ones, as many as a product's rows need."""
        return self.outer(rows.new_ones(len(rows), ALIGNMENT_BYTES // rows.itemsize), rows)[:, 0]

    def sum_per_token(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """`[U, ...]` in `dtype`: each route has a row of its own, so that the order is one on every device."""
        routes = rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[1]).index_copy_(0, self.route, rows)
        return routes.view(*self.shape, rows.shape[1]).sum(dim=1, dtype=dtype)

    def to_routes(self, per_row: Tensor) -> Tensor:
        """`[U, K]` of a value per row, 0 where there is no route."""
        return per_row.new_zeros(self.shape).view(-1).index_copy_(0, self.route, per_row).view(self.shape)


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
    wide, on_output = torch.promote_types(tokens.dtype, torch.float32), formula.weight_on == "output"
    route, counts = sort_routes(slot_ids, len(params.down_projs), static=static)
    rows = _Rows(route, counts, slot_ids.shape, static=static)
    weight, x = rows.of_routes(weights), rows.of_tokens(tokens)
    if not on_output:
        x = (x * weight).to(tokens.dtype)
    pre_activation = rows.times(x, params.gate_and_up_projs)
    if params.gate_and_up_bias is not None:
        pre_activation += rows.of_slots(params.gate_and_up_bias)
    h = formula.activate(*formula.halves(pre_activation.to(wide)))
    out = rows.times((h * weight if on_output else h).to(tokens.dtype), params.down_projs)
    if params.down_bias is not None:
        bias = rows.of_slots(params.down_bias)
        out += bias * weight if on_output else bias
    return rows.sum_per_token(out, wide).to(tokens.dtype), Kept(pre_activation, route, counts)


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
    static: bool,
) -> Gradients:
    dtype, wide = tokens.dtype, torch.promote_types(tokens.dtype, torch.float32)
    on_output = formula.weight_on == "output"
    rows = _Rows(kept.route, kept.counts, weights.shape, static=static)
    weight, grad_out = rows.of_routes(weights), rows.of_tokens(grad_y)
    grad_h = rows.times(grad_out, params.down_projs.mT).to(wide)
    h, gate_slope, up_slope = torch.empty(3, *grad_h.shape, dtype=wide, device=tokens.device)
    formula.slopes(*formula.halves(kept.pre_activations.to(wide)), h, gate_slope, up_slope)
    grad_weight = (h * grad_h).sum(dim=1)
    if on_output:
        h *= weight
        grad_h *= weight
    grad_pre = torch.empty_like(kept.pre_activations)
    for grad, slope in zip(formula.halves(grad_pre), (gate_slope, up_slope), strict=True):
        if grad is not None:
            torch.mul(grad_h, slope, out=grad)
    x, grad_x = rows.of_tokens(tokens), rows.times(grad_pre, params.gate_and_up_projs.mT)
    if not on_output:
        grad_weight = (x * grad_x.to(wide)).sum(dim=1)
        x, grad_x = (x * weight).to(dtype), (grad_x * weight).to(dtype)
    if params.down_bias is not None and on_output:
        grad_weight += (grad_out * rows.of_slots(params.down_bias).to(wide)).sum(dim=1)
    grads = None
    if needs_params:
        weighted = (grad_out * weight).to(dtype) if on_output else grad_out
        grads = ExpertParams(
            rows.outer(x, grad_pre, transposed=params.gate_and_up_projs.stride(-1) != 1),
            rows.outer(h.to(dtype), grad_out, transposed=params.down_projs.stride(-1) != 1),
            None if params.gate_and_up_bias is None else rows.sum_per_slot(grad_pre),
            None if params.down_bias is None else rows.sum_per_slot(weighted),
        )
    grad_tokens = rows.sum_per_token(grad_x, wide).to(dtype) if needs_tokens else None
    return Gradients(grad_tokens, rows.to_routes(grad_weight.to(weights.dtype)), grads)


_DYNAMIC, _STATIC = (
    make_backend(name, partial(_forward, static=static), partial(_backward, static=static), static=static)
    for name, static in (("grouped_mm_experts", False), ("static_grouped_mm_experts", True))
)
