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
    tokens: Tensor, slot_ids: Tensor, weights: Tensor, params: ExpertParams, formula: ExpertsFormula = SWIGLU
) -> Tensor:
    """Contract and shapes: `ExpertsBackend`. fp32, bf16 and fp16.

    Only real routes get a row, so none lies past the last offset, where the product leaves uninitialised memory.

    Raises:
        ValueError: for float64, or where `H` or `I` give rows that are no multiple of 16 bytes.
    """
    if problem := grouped_mm_problem(tokens, params):
        raise ValueError(f"experts backend 'grouped_mm' {problem}; use 'eager'")
    wide = torch.promote_types(tokens.dtype, torch.float32)
    route, counts = sort_routes(slot_ids, len(params.down_projs))
    row, weight = route // slot_ids.shape[1], weights.flatten()[route, None]
    offsets = counts.cumsum(0).to(torch.int32)

    def biased(rows: Tensor, bias: Tensor | None, factor: Tensor | None) -> Tensor:
        if bias is None:
            return rows
        each = bias.repeat_interleave(counts, dim=0, output_size=len(rows))
        return rows + (each if factor is None else (each * factor).to(rows.dtype))

    on_output = formula.weight_on == "output"
    x = tokens[row] if on_output else (tokens[row] * weight).to(tokens.dtype)
    pre_activation = biased(F.grouped_mm(x, params.gate_and_up_projs, offs=offsets), params.gate_and_up_bias, None)
    h = formula.activate(*formula.halves(pre_activation.to(wide)))
    h = (h * weight if on_output else h).to(tokens.dtype)
    outputs = F.grouped_mm(h, params.down_projs, offs=offsets)
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
