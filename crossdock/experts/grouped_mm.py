"""Experts through `torch.nn.functional.grouped_mm`: all experts' products in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.experts.experts import ExpertParams
from crossdock.experts.formula import SWIGLU, ExpertsFormula
from crossdock.experts.routes import sort_routes

__all__ = ["grouped_mm", "grouped_mm_problem"]

_ALIGNMENT_BYTES = 16


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
    wide = torch.promote_types(tokens.dtype, torch.float32)
    route, counts, is_none = sort_routes(slot_ids, len(params.down_projs), static=static)
    offsets = counts.cumsum(0).to(torch.int32)

    def real(rows: Tensor) -> Tensor:
        """Zeros for rows that are no route, here and in the gradient.

        They lie past the last offset, where a product leaves uninitialised memory, in its output and in the gradient of
        its input. So both a product's input and its output pass through here.
        """
        return rows if is_none is None else rows.masked_fill(is_none[:, None], 0)

    def biased(rows: Tensor, bias: Tensor | None, factor: Tensor | None) -> Tensor:
        if bias is None:
            return rows
        repeats = counts
        if is_none is not None:
            bias, repeats = F.pad(bias, (0, 0, 0, 1)), torch.cat([counts, is_none.sum()[None]])
        each = bias.repeat_interleave(repeats, dim=0, output_size=len(rows))
        return rows + (each if factor is None else (each * factor).to(rows.dtype))

    weight, x = real(weights.flatten()[route, None]), real(tokens[route // slot_ids.shape[1]])
    on_output = formula.weight_on == "output"
    if not on_output:
        x = (x * weight).to(tokens.dtype)
    pre_activation = real(F.grouped_mm(x, params.gate_and_up_projs, offs=offsets))
    pre_activation = biased(pre_activation, params.gate_and_up_bias, None)
    h = formula.activate(*formula.halves(pre_activation.to(wide)))
    h = real((h * weight if on_output else h).to(tokens.dtype))
    outputs = real(F.grouped_mm(h, params.down_projs, offs=offsets))
    outputs = biased(outputs, params.down_bias, weight if on_output else None)
    # Each route has a row of its own, so that a token's routes are summed in one order on every device.
    routes = tokens.new_zeros(slot_ids.numel(), tokens.shape[1]).index_copy(0, route, outputs)
    return routes.view(*slot_ids.shape, tokens.shape[1]).sum(dim=1, dtype=wide).to(tokens.dtype)


def grouped_mm_problem(tokens: Tensor, params: ExpertParams) -> str | None:
    """Why `grouped_mm` cannot compute these `tokens [U, H]` and `params`, or `None` where it can."""
    if tokens.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16, not {tokens.dtype}"
    for name, size in (("hidden_size", tokens.shape[1]), ("intermediate_size", params.down_projs.shape[1])):
        if size * tokens.dtype.itemsize % _ALIGNMENT_BYTES:
            return f"needs rows of a multiple of {_ALIGNMENT_BYTES} bytes; {name} = {size} in {tokens.dtype} is none"
    return None
