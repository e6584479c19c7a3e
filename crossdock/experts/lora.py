"""Experts with low-rank adapters beside their weights (LoRA, arXiv 2106.09685).

Both products get a second term: `z = x Wgu + s (x A1) B1^T`, then `h(z) Wd + s (h(z) A2) B2^T`. The activation is
between them, so that this is no second call of a backend. Autograd derives the backward pass: weights that are frozen
cost it no product, and an adapter's gradient costs two products of `r` columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from crossdock.experts.checks import ALIGNMENT_BYTES, check_dtypes, check_ids
from crossdock.experts.experts import ExpertAdapters, ExpertParams
from crossdock.experts.formula import SWIGLU, ExpertsFormula
from crossdock.experts.grouped_mm import grouped_mm_problem
from crossdock.experts.routes import sort_routes

__all__ = ["eager_lora", "grouped_lora", "lora_experts"]


def lora_experts(
    tokens: Tensor,
    slot_ids: Tensor,
    weights: Tensor,
    params: ExpertParams,
    adapters: ExpertAdapters,
    scale: float,
    formula: ExpertsFormula = SWIGLU,
    *,
    eager: bool = False,
    static: bool = False,
) -> Tensor:
    """`y [U, H]`, with the contract of `ExpertsBackend`: `grouped_lora`, or `eager_lora` where that cannot compute.

    Args:
        tokens: as in `ExpertsBackend`, like the next three.
        slot_ids: `[U, K]`.
        weights: `[U, K]`.
        params: the experts' own.
        adapters: in the dtype of `tokens`.
        scale: `s`.
        formula: as in `ExpertsBackend`.
        eager: take `eager_lora` in any case.
        static: see `grouped_lora`.

    Raises:
        ValueError: where `static` cannot be, or a dtype differs from that of `tokens`.
    """
    problem = grouped_mm_problem(tokens, params)
    if static and problem:
        raise ValueError(f"static_shapes computes experts by 'grouped_mm', which {problem}; use static_shapes = false")
    if static or not (problem or eager):
        return grouped_lora(tokens, slot_ids, weights, params, adapters, scale, formula, static=static)
    return eager_lora(tokens, slot_ids, weights, params, adapters, scale, formula)


def eager_lora(
    tokens: Tensor,
    slot_ids: Tensor,
    weights: Tensor,
    params: ExpertParams,
    adapters: ExpertAdapters,
    scale: float,
    formula: ExpertsFormula = SWIGLU,
) -> Tensor:
    """A readable loop over the experts, in any floating dtype; arguments as in `lora_experts`."""
    _check(tokens, slot_ids, params, adapters)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    y = torch.zeros_like(tokens, dtype=wide)
    num_slots = len(params.down_projs)
    # `unbind`, not `w[e]`: the backward of indexing fills a whole zero tensor for every expert.
    per_slot = [[None] * num_slots if tensor is None else tensor.unbind() for tensor in (*params, *adapters)]
    for slot, (first, down, first_bias, down_bias, a1, b1, a2, b2) in enumerate(zip(*per_slot, strict=True)):
        row, k = (slot_ids == slot).nonzero(as_tuple=True)
        x, weight = tokens[row], weights[row, k, None]
        if formula.weight_on == "input":
            x = (x * weight).to(x.dtype)
        pre_activation = x @ first + scale * (x @ a1 @ b1.mT)
        if first_bias is not None:
            pre_activation = pre_activation + first_bias
        h = formula.activate(*formula.halves(pre_activation.to(wide)))
        if formula.weight_on == "output":
            h = h * weight
        h = h.to(tokens.dtype)
        out = (h @ down + scale * (h @ a2 @ b2.mT)).to(wide)
        if down_bias is not None:
            out = out + (down_bias * weight if formula.weight_on == "output" else down_bias)
        y = y.index_add(0, row, out)
    return y.to(tokens.dtype)


def grouped_lora(
    tokens: Tensor,
    slot_ids: Tensor,
    weights: Tensor,
    params: ExpertParams,
    adapters: ExpertAdapters,
    scale: float,
    formula: ExpertsFormula = SWIGLU,
    *,
    static: bool = False,
) -> Tensor:
    """By `torch.nn.functional.grouped_mm` over routes sorted by slot; arguments as in `lora_experts`.

    Takes what `grouped_mm` takes. Adapters are padded with columns of zeros where `r` columns are no multiple of 16
    bytes.

    Args:
        static: give every entry of `slot_ids` a row, a route or not, so that no shape depends on the ids and nothing
            syncs.

    Raises:
        ValueError: for float64, or where `H` or `I` give rows that are no multiple of 16 bytes.
    """
    if problem := grouped_mm_problem(tokens, params):
        raise ValueError(f"LoRA by 'grouped_mm' {problem}; use 'eager'")
    _check(tokens, slot_ids, params, adapters)
    dtype, wide, on_output = (
        tokens.dtype,
        torch.promote_types(tokens.dtype, torch.float32),
        formula.weight_on == "output",
    )
    route, counts = sort_routes(slot_ids, len(params.down_projs), static=static)
    offsets = counts.cumsum(0).to(torch.int32)
    # Those that are no route, at the end.
    is_none = (torch.arange(len(route), device=route.device) >= offsets[-1])[:, None] if static else None
    slot = slot_ids.flatten()[route].clamp_min(0)

    def real(rows: Tensor) -> Tensor:
        """Zeros, in the backward pass too, past the last offset, where a product leaves memory as it was."""
        return rows if is_none is None else rows.masked_fill(is_none, 0)

    def times(rows: Tensor, matrices: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Each row times its slot's matrix, adapter included."""
        rows = real(rows)
        low = real(F.grouped_mm(rows, _padded(a), offs=offsets))
        return real(F.grouped_mm(rows, matrices, offs=offsets)) + scale * real(
            F.grouped_mm(low, _padded(b).mT, offs=offsets)
        )

    weight, x = real(weights.flatten()[route, None]), _take(tokens, route, slot_ids.shape[1])
    if not on_output:
        x = (x * weight).to(dtype)
    pre_activation = times(x, params.gate_and_up_projs, adapters.gate_and_up_lora_a, adapters.gate_and_up_lora_b)
    if params.gate_and_up_bias is not None:
        pre_activation = pre_activation + params.gate_and_up_bias[slot]
    h = formula.activate(*formula.halves(pre_activation.to(wide)))
    out = times(
        (h * weight if on_output else h).to(dtype), params.down_projs, adapters.down_lora_a, adapters.down_lora_b
    )
    if params.down_bias is not None:
        out = out + (params.down_bias[slot] * weight if on_output else params.down_bias[slot])
    return _sum_per_token(real(out), route, *slot_ids.shape).to(dtype)


def _check(tokens: Tensor, slot_ids: Tensor, params: ExpertParams, adapters: ExpertAdapters) -> None:
    check_dtypes(tokens, params, adapters)
    check_ids(slot_ids, len(params.down_projs))


def _padded(adapter: Tensor) -> Tensor:
    """`[P/R, n, r]` with columns of zeros, so that a row is a multiple of `ALIGNMENT_BYTES`."""
    return F.pad(adapter, (0, -adapter.shape[2] % (ALIGNMENT_BYTES // adapter.itemsize)))


def _take(tokens: Tensor, route: Tensor, top_k: int) -> Tensor:
    """Of `tokens [U, H]`, the row of each route's token, `[N, H]`."""
    return _Take.apply(tokens, route, top_k)  # type: ignore[return-value]


class _Take(Function):
    """Its gradient sums a token's routes in their order, in fp32 or wider; that of indexing has no order on a GPU."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, route: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(route)
        ctx.num_tokens, ctx.top_k = len(tokens), top_k
        return tokens[route // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ((route,), (grad,)) = ctx.saved_tensors, grads
        return _sum_per_token(grad, route, ctx.num_tokens, ctx.top_k), None, None


def _sum_per_token(rows: Tensor, route: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """The sum of each token's routes `[U, H]`, in fp32 or wider, of their `rows [N, H]`."""
    # Each route has a row of its own, so that the order of the sum is one on every device.
    routes = rows.new_zeros(num_tokens * top_k, rows.shape[1]).index_copy(0, route, rows)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return routes.view(num_tokens, top_k, rows.shape[1]).sum(dim=1, dtype=wide).to(rows.dtype)
